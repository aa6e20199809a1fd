"""Weights from a file that cannot run code: safetensors, or a state dict read with ``weights_only=True``."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from attackroute.core.errors import UserError

LAST, BEST = "last.safetensors", "best.safetensors"
"""Weights in the folder of a training run: of the last epoch and of the best one."""


_CONTAINERS = ("state_dict", "model")


_PARALLEL_PREFIX = "module."


_COUNTER = "num_batches_tracked"  # of no use in eval mode, and left out by some


_NAMED = 3


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load weights into a model, all of them or none.

    A file that ends in ``.safetensors`` is read as such; any other as PyTorch's, with ``weights_only=True``, so no file
    can run code. The state dict may lie under ``"state_dict"`` or ``"model"`` in a checkpoint, and all its names may
    begin with ``module.``, as those of parallel training do. Only ``num_batches_tracked`` may be missing.

    Args:
        model: Changed in place. Values are converted to its types and devices.
        path: The file.

    Raises:
        UserError: No such file, one that is damaged or is no state dict, or names or shapes that are not the model's.
            The model is then as it was.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"weights {path} do not exist; check the path")
    if path.is_dir():
        raise UserError(f"weights {path} is a folder; name the .safetensors or .pt file in it")
    safe = path.suffix == ".safetensors"
    stored = _read_safetensors(path) if safe else _state_dict(_read_torch(path), path)
    weights = _without_prefix(stored, model)
    _require_fit(weights, model, path)
    model.load_state_dict(weights, strict=False)


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error


def _read_torch(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd pickles; what is wrong with one is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"weights {path} are not a state dict, which holds tensors alone, or are damaged; "
            "save one with torch.save(model.state_dict(), file)"
        ) from error
    except Exception as error:  # damaged bytes make the reader raise nearly anything
        raise _unreadable(path, error) from error


def _state_dict(content: object, path: Path) -> Mapping[str, Tensor]:
    if isinstance(content, Mapping):
        content = next((content[key] for key in _CONTAINERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        held = "nothing" if isinstance(content, Mapping) else f"an object of type {type(content).__name__}"
        raise UserError(f"weights {path} hold {held}, not a state dict; save model.state_dict()")
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise UserError(
                f"weights {path} are not a state dict: {name!r} is of type {type(value).__name__}, not a tensor; "
                "save model.state_dict()"
            )
    return content


def _without_prefix(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    def parallel(names: Mapping[str, Tensor]) -> bool:
        return all(name.startswith(_PARALLEL_PREFIX) for name in names)

    if parallel(weights) and not parallel(model.state_dict()):
        return {name.removeprefix(_PARALLEL_PREFIX): value for name, value in weights.items()}
    return dict(weights)


def _require_fit(weights: Mapping[str, Tensor], model: nn.Module, path: Path) -> None:
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    reshaped = [name for name in expected.keys() & found.keys() if expected[name] != found[name]]
    missing = [name for name in expected.keys() - found.keys() if name.rpartition(".")[2] != _COUNTER]
    unexpected = found.keys() - expected.keys()
    order = {name: place for place, name in enumerate(dict.fromkeys([*expected, *found]))}
    faults = [
        *(f"{name} is {found[name]} instead of {expected[name]}" for name in sorted(reshaped, key=order.__getitem__)),
        *(f"{name} {expected[name]} is missing" for name in sorted(missing, key=order.__getitem__)),
        *(f"{name} {found[name]} is unexpected" for name in sorted(unexpected, key=order.__getitem__)),
    ]
    if faults:
        more = f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise UserError(
            f"weights {path} do not fit the model: {', '.join(faults[:_NAMED])}{more}; "
            "check the network's name, width, image size and number of classes"
        )


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0]
    return UserError(f"weights {path} cannot be read, or are damaged ({reason}); get the file again")
