"""Networks with weights: folders of training runs, presets, and files that cannot run code.

A train folder holds ``model.json``, which says how the network is built, with the weights beside it. Presets are such
folders that come with the package: small networks trained by its own ``train`` and ``harden``, with weights in float16
and ``training.json``, the command that made them and their accuracy.
"""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from attackroute.core.errors import UserError, did_you_mean
from attackroute.core.files import user_path, write_json
from attackroute.core.model_state import kept_modes, placement
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
_PREFIX = "module."
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
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{folder} has no {CARD}; name a folder that attackroute train wrote") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); train again, or mend it") from error
        try:
            if (content["format"], content["version"]) != (_FORMAT, _VERSION):
                raise KeyError("format")
            fields: dict[str, Any] = content["model"]
            fields |= {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
            return cls(ModelSpec(**fields), tuple(map(str, content["classes"])))
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} does not describe a network (version {_VERSION}); train again") from error


def find_card(model: str) -> tuple[Path, ModelCard] | None:
    """The train folder that ``--model`` names, and its card; None where it names something else.

    ``preset:NAME`` is a folder that comes with the package.

    Raises:
        UserError: There is no such preset, or the folder does not describe a network.
    """
    preset = model.startswith(_PRESET)
    folder = preset_folder(model.removeprefix(_PRESET)) if preset else user_path(model)
    return None if model in BUILT_IN or not folder.is_dir() else (folder, ModelCard.load(folder))


def open_network(
    model: str, data: ImageData, *, weights: Path | None = None, width: float | None = None, classes: int | None = None
) -> nn.Module:
    """Build the network that ``--model`` names for the data, on the CPU and in eval mode, and load its weights.

    Args:
        model: A train folder, ``preset:NAME``, or a name as :func:`attackroute.zoo.build_model` takes it.
        data: The images that it will see; they decide on image size and channels, and on the number of logits.
        weights: A file in the place of the folder's own, as :func:`load_weights` reads it.
        width: Factor on a built-in network's channels.
        classes: Another number of logits.

    Raises:
        UserError: Unknown model, missing or mismatching weights, or images that the network cannot take.
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
    weights = _without_prefix(_read(path), model)
    _require_fit(weights, model, path)
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
    """A trained network for images in [0, 1], in float32 and eval mode.

    Args:
        name: Such as ``"vgg16-cifar10"``; see :func:`preset_names`.

    Raises:
        UserError: There is none of that name.
    """
    folder = preset_folder(name)
    model = build(ModelCard.load(folder).spec)
    load_weights(model, folder / BEST)
    return model.eval()


def preset_training(name: str) -> dict[str, Any]:
    """How a preset was trained: command, data, accuracy on clean test images."""
    content: dict[str, Any] = json.loads((preset_folder(name) / TRAINING).read_bytes())
    return content


def check_input(model: nn.Module, shape: tuple[int, int, int]) -> None:
    """Try a model on one black image (C, H, W), in eval mode and without gradients; it comes back as it was.

    Raises:
        UserError: The model cannot take images of this shape.
    """
    device, dtype = placement(model)
    image = torch.zeros(1, *shape, dtype=dtype, device=device)
    with kept_modes(model), torch.no_grad():
        model.eval()
        try:
            model(image)
        except UserError:
            raise
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            channels, height, width = shape
            raise UserError(
                f"the model cannot take images with {channels} channels of {height}x{width} pixels ({reason}); "
                "give images of another size, or another model"
            ) from error


def kept_weights(folder: Path) -> Path:
    """The best weights in a train folder, else the last; a `UserError` if there are none."""
    for path in (folder / BEST, folder / LAST):
        if path.is_file():
            return path
    raise UserError(f"{folder} has neither {BEST} nor {LAST}; finish the training, or name a file with --weights")


def is_factory(model: str) -> bool:
    """Whether the name is ``package.module:factory``."""
    source, colon, _ = model.partition(":")
    return bool(colon) and source not in ("torchvision", "timm")


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names if len(names) <= 4 else (*names[:2], "...", names[-1])) + f" ({len(names)})"


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd pickles; what is wrong with one is said below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"weights {path} are not a state dict, which holds tensors alone, or are damaged; "
            "save one with torch.save(model.state_dict(), file)"
        ) from error
    except Exception as error:  # damaged bytes make a reader raise nearly anything
        reason = str(error).partition("\n")[0]
        raise UserError(f"weights {path} cannot be read, or are damaged ({reason}); get the file again") from error
    return _state_dict(content, path)


def _state_dict(content: object, path: Path) -> Mapping[str, Tensor]:
    if isinstance(content, Mapping):
        containers = (content.get(key) for key in ("state_dict", "model"))
        content = next((inner for inner in containers if isinstance(inner, Mapping)), content)
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
    """The weights without the prefix that parallel training gives all of their names."""
    ours, theirs = (all(name.startswith(_PREFIX) for name in names) for names in (model.state_dict(), weights))
    return {name.removeprefix(_PREFIX) if theirs and not ours else name: value for name, value in weights.items()}


def _require_fit(weights: Mapping[str, Tensor], model: nn.Module, path: Path) -> None:
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    stored = {name: tuple(value.shape) for name, value in weights.items()}
    reshaped = [name for name in expected if stored.get(name, expected[name]) != expected[name]]
    missing = [name for name in expected if name not in stored and name.rpartition(".")[2] != _COUNTER]
    faults = [
        *(f"{name} is {stored[name]} instead of {expected[name]}" for name in reshaped),
        *(f"{name} {expected[name]} is missing" for name in missing),
        *(f"{name} {shape} is unexpected" for name, shape in stored.items() if name not in expected),
    ]
    if faults:
        more = f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise UserError(
            f"weights {path} do not fit the model: {', '.join(faults[:_NAMED])}{more}; "
            "check the network's name, width, image size and number of classes"
        )
