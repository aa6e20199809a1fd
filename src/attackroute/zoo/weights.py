"""Networks with weights: folders of training runs, presets, and files that cannot run code.

A train folder holds ``model.json``, which says how the network is built, with the weights beside it. Presets are such
folders that come with the package: small networks trained by its own ``train`` and ``harden``, with weights in float16
and ``training.json``, the command that made them and their accuracy.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attackroute.core.document import read_object
from attackroute.core.errors import UserError, did_you_mean
from attackroute.core.files import expect_mapping, file_errors, read_weights, user_path, write_json
from attackroute.core.model_state import explained, kept_modes, placement
from attackroute.zoo.data import ImageData
from attackroute.zoo.networks import BUILT_IN, build
from attackroute.zoo.spec import ModelSpec, Normalise

CARD = "model.json"
LAST = "last.safetensors"
BEST = "best.safetensors"
PRESETS = Path(__file__).parent / "presets"
TRAINING = "training.json"

_PRESET = "preset:"
_FORMAT, _VERSION = "attackroute model", 1
_HARMLESS: list[Any] = [  # what people keep beside their weights: options and numbers of NumPy
    argparse.Namespace,
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bhilqBHILQefd"},
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
_COUNTER = "num_batches_tracked"  # of no use in eval mode, and left out by some
_NAMED = 3


@dataclass(frozen=True)
class ModelCard:
    """What ``model.json`` says about the weights beside it: how the network is built, and its labels' names."""

    spec: ModelSpec
    classes: tuple[str, ...]

    def save(self, folder: Path) -> None:
        """Write ``model.json``; a `UserError` if the folder describes another network already."""
        if (folder / CARD).exists() and ModelCard.load(folder) != self:
            raise UserError(
                f"{folder / CARD} describes another network than this one; "
                "choose another folder, or give the --model, --model-width and --data that it was made with"
            )
        content = {"format": _FORMAT, "version": _VERSION, "model": asdict(self.spec), "classes": list(self.classes)}
        write_json(folder / CARD, content)

    @classmethod
    def load(cls, folder: Path) -> ModelCard:
        """Read ``model.json``; a `UserError` if it is missing, damaged or something else."""
        path = folder / CARD
        if not path.exists():
            raise UserError(f"{folder} has no {CARD}; name a folder that attackroute train wrote")
        content = read_object(path)
        with file_errors(path):
            if (content.get("format"), content.get("version")) != (_FORMAT, _VERSION):
                raise UserError(f"does not describe a network (version {_VERSION}); train again")
            model, classes = expect_mapping(content, "model"), content.get("classes")
            if unknown := [name for name in model if name not in ModelSpec.__dataclass_fields__]:
                raise UserError(f"a network has no {unknown[0]!r}; train again")
            if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
                raise UserError("'classes' must be a list of names")
            spec: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in model.items()
            }
            return cls(ModelSpec(**spec), tuple(classes))


def find_card(model: str) -> tuple[Path, ModelCard] | None:
    """The train folder that ``--model`` names, ``preset:NAME`` included, and its card; None for anything else."""
    preset = model.startswith(_PRESET)
    folder = preset_folder(model.removeprefix(_PRESET)) if preset else user_path(model)
    return None if model in BUILT_IN or not folder.is_dir() else (folder, ModelCard.load(folder))


def open_network(
    model: str, data: ImageData, *, weights: Path | None = None, width: float | None = None, classes: int | None = None
) -> nn.Module:
    """Build the network that ``--model`` names for the data, on the CPU and in eval mode, and load its weights.

    The data decide on image size and channels, and, without ``classes``, on the number of logits. A file of weights
    takes the place of the folder's own; ``width`` is a factor on a built-in network's channels.
    """
    trained = find_card(model)
    if trained is None:
        network = build(spec_for(model, data, width=width, classes=classes))
        if weights is None and not is_factory(model):  # a factory may load its own, any other would stay random
            hint = f"; for the folder of that name write ./{model}" if Path(model).is_dir() else ""
            raise UserError(
                f"{model} has no weights; name a file with --weights, or take a folder of attackroute train{hint}"
            )
    else:
        folder, card = trained
        if is_factory(card.spec.name):  # code is called because the user names it, never because a file does
            raise UserError(
                f"{folder / CARD} names code to be called, {card.spec.name}; if you trust it, give the same with "
                f"--model {card.spec.name} --weights {folder / BEST}"
            )
        if card.classes != data.classes:  # other labels would be compared with the wrong logits, in silence
            raise UserError(
                f"{folder} was trained for the classes {_listed(card.classes)}, the data have {_listed(data.classes)}; "
                "give data with the same classes"
            )
        if width is not None or classes is not None:
            raise UserError(f"{folder} says itself how wide its network is; leave out --model-width and --classes")
        network, weights = build(card.spec), weights or kept_weights(folder)
    if weights is not None:
        load_weights(network, weights)
    check_input(network, data.shape)
    return network.eval()


def spec_for(model: str, data: ImageData, *, width: float | None = None, classes: int | None = None) -> ModelSpec:
    """How to build the network of that name for the data."""
    return ModelSpec(
        model,
        num_classes=len(data.classes) if classes is None else classes,
        width=1.0 if width is None else width,
        image_size=data.shape[1],
        in_channels=data.shape[0],
    )


def with_own_normalisation(spec: ModelSpec, network: nn.Module) -> ModelSpec:
    """The spec with the statistics that its network has, so that a later version's defaults cannot change them."""
    normalise = getattr(network, "normalise", None)
    if not isinstance(normalise, Normalise) or is_factory(spec.name):  # a factory brings its own, and takes none
        return spec
    return replace(spec, mean=normalise.statistics.mean, std=normalise.statistics.std)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load weights into a model, all of them or none.

    A file that ends in ``.safetensors`` is read as such; any other as PyTorch's, with ``weights_only=True``, so no file
    can run code. The weights may lie in a checkpoint beside other things, under any name, and all their names may begin
    with a prefix, as those of parallel, averaged, compiled or wrapped models do (``module.``, ``_orig_mod.``,
    ``model.``, ...); then others beside them are left out. Only ``num_batches_tracked`` may be missing.

    Args:
        model: Changed in place. Values are converted to its types and devices.
        path: The file.

    Raises:
        UserError: No such file, one that is damaged or holds no weights, or several that fit, names or shapes that are
            not the model's, or a normaliser of other statistics than the model's. The model is then as it was.
    """
    path = user_path(os.fspath(path))
    if not path.exists():
        raise UserError(f"weights {path} do not exist; check the path")
    if path.is_dir():
        raise UserError(f"weights {path} is a folder; name the .safetensors or .pt file in it")
    sets = _sets_of_weights(_read(path), path)
    expected = model.state_dict()
    fitting = {key: fit for key, values in sets.items() if (fit := _without_prefix(values, expected)) is not None}
    if len(fitting) > 1:
        raise UserError(
            f"weights {path} hold several networks that fit ({', '.join(fitting)}); save the one that you mean: "
            f"torch.save(torch.load(file)[{next(iter(fitting))!r}], new_file)"
        )
    if not fitting:
        _refuse(next(iter(sets.values())), expected, path)
    ((key, weights),) = fitting.items()
    _check_kinds(weights, expected, path)
    _check_normaliser(model, sets[key], path)
    model.load_state_dict(weights, strict=False)


def preset_names() -> list[str]:
    """Names of the presets."""
    return sorted(folder.name for folder in PRESETS.iterdir() if (folder / BEST).is_file())


def preset_folder(name: str) -> Path:
    """Folder of a preset; a `UserError` if there is none of that name."""
    names = preset_names()
    if name not in names:
        raise UserError(f"no preset {name!r}{did_you_mean(name, names)}; there are {', '.join(names)}")
    return PRESETS / name


def load_preset(name: str) -> nn.Module:
    """A trained network for images in [0, 1], such as ``"vgg16-cifar10"``, in float32 and eval mode."""
    folder = preset_folder(name)
    model = build(ModelCard.load(folder).spec)
    load_weights(model, folder / BEST)
    return model.eval()


def check_input(model: nn.Module, shape: tuple[int, int, int]) -> None:
    """Try a model on one black image (C, H, W), in eval mode and without gradients; it comes back as it was."""
    device, dtype = placement(model)
    image = torch.zeros(1, *shape, dtype=dtype, device=device)
    with kept_modes(model), torch.no_grad(), explained(image):
        model.eval()
        model(image)


def kept_weights(folder: Path) -> Path:
    """The best weights in a train folder, else the last; a `UserError` if there are none."""
    for path in (folder / BEST, folder / LAST):
        if path.is_file():
            return path
    raise UserError(f"{folder} has neither {BEST} nor {LAST}; finish the training, or name a file with --weights")


def is_factory(model: str) -> bool:
    """Whether the name is ``package.module:factory``."""
    source, colon, _ = model.partition(":")
    return bool(colon) and f"{source}:" not in ("torchvision:", "timm:", _PRESET)


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names if len(names) <= 4 else (*names[:2], "...", names[-1])) + f" ({len(names)})"


def _read(path: Path) -> object:
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return read_weights(path)
    except pickle.UnpicklingError as error:
        kinds = re.findall(r"GLOBAL ([\w.]+)", str(error))
        held = f", but {kinds[0]} too" if kinds else ""
        raise UserError(
            f"weights {path} are not a state dict, which holds tensors alone{held}, or are damaged; "
            "save one with torch.save(model.state_dict(), file)"
        ) from error
    except Exception as error:  # damaged bytes make a reader raise nearly anything
        reason = str(error).partition("\n")[0]
        raise UserError(f"weights {path} cannot be read, or are damaged ({reason}); get the file again") from error


def _sets_of_weights(content: object, path: Path) -> dict[str, Mapping[str, Tensor]]:
    """The state dicts in a checkpoint, by their names there; a state dict alone bears none."""
    named = content if isinstance(content, Mapping) else {}
    if _is_state_dict(named):
        return {"": named}
    if sets := {str(key): values for key, values in named.items() if _is_state_dict(values)}:
        return sets
    keys = ", ".join(list(map(str, named))[:_NAMED])
    held = f"a {type(content).__name__}" + (f" of {keys}" if keys else "")
    raise UserError(f"weights {path} hold {held}, not a state dict; save model.state_dict()")


def _is_state_dict(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def _without_prefix(weights: Mapping[str, Tensor], expected: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The weights under the shortest prefix with which all that is expected is there; None where there is none.

    Without a prefix there must be nothing else; with one, what stands beside it belongs to something else.
    """
    shapes = {name: value.shape for name, value in expected.items() if isinstance(value, Tensor)}
    needed = [name for name in shapes if name.rpartition(".")[2] != _COUNTER]
    first = needed[0] if needed else ""
    prefixes = {name[: len(name) - len(first)] for name in weights if name == first or name.endswith(f".{first}")}
    for prefix in sorted(prefixes, key=len):
        found = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if all(name in found for name in needed) and all(
            name in shapes and value.shape == shapes[name] for name, value in found.items()
        ):
            return found
    return None


def _refuse(weights: Mapping[str, Tensor], expected: Mapping[str, Any], path: Path) -> None:
    """Say how weights differ from what is expected, at most three names of each, and how the file calls its own."""
    shapes = {name: tuple(value.shape) for name, value in expected.items() if isinstance(value, Tensor)}
    stored = {name: tuple(value.shape) for name, value in weights.items()}
    if not shapes.keys() & stored.keys():
        stripped = {name.partition(".")[2]: shape for name, shape in stored.items()}
        stored = stripped if shapes.keys() & stripped.keys() else stored
    reshaped = [name for name in shapes if stored.get(name, shapes[name]) != shapes[name]]
    missing = [name for name in shapes if name not in stored and name.rpartition(".")[2] != _COUNTER]
    faults = [
        *(f"{name} is {stored[name]} instead of {shapes[name]}" for name in reshaped),
        *(f"{name} {shapes[name]} is missing" for name in missing),
        *(f"{name} {shape} is unexpected" for name, shape in stored.items() if name not in shapes),
    ]
    more = f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
    names = f" (the file's names: {', '.join(list(weights)[:_NAMED])}, ...)" if missing else ""
    raise UserError(
        f"weights {path} do not fit the model: {', '.join(faults[:_NAMED])}{more}{names}; "
        "check the network's name, width, image size and number of classes"
    )


def _check_kinds(weights: Mapping[str, Tensor], expected: Mapping[str, Any], path: Path) -> None:
    """Refuse values that a copy would change beyond rounding, or that are not there; warn of whole numbers."""
    cast = []
    for name, value in weights.items():
        ours = expected[name]
        is_plain = value.layout == torch.strided and not (value.is_quantized or value.is_meta)
        if not is_plain or (value.is_complex() and not ours.is_complex()):
            kind = "without values (meta)" if value.is_meta else f"{value.dtype}, {value.layout}"
            raise UserError(f"weights {path}: {name} is {kind}; save plain tensors of real numbers")
        if ours.is_floating_point() and not value.is_floating_point():
            cast.append(f"{name} ({value.dtype})")
    if cast:
        warnings.warn(f"weights {path} hold no floating numbers in {', '.join(cast[:_NAMED])}", stacklevel=3)


def _check_normaliser(model: nn.Module, stored: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights that were trained behind a normaliser with other statistics than the model's."""
    ours = getattr(model, "normalise", None)
    own = (*ours.statistics.mean, *ours.statistics.std) if isinstance(ours, Normalise) else ()
    ends = {name.rpartition(".")[2]: name for name in stored if name not in model.state_dict()}
    for names in (("mean", "std"), ("mu", "sigma"), ("new_mean", "new_std")):
        if not ends.keys() >= set(names):
            continue
        mean, std = ([round(value, 4) for value in stored[ends[name]].flatten().tolist()] for name in names)
        if len(own) != len(mean + std) or not np.allclose(own, mean + std, atol=1e-3):
            raise UserError(
                f"weights {path} were trained behind a normaliser ({ends[names[0]]}, {ends[names[1]]}): give the model "
                f"mean {mean} and std {std}, by build_model(..., mean=, std=) or attackroute.normalised(...)"
            )
