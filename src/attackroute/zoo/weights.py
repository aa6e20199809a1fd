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
from attackroute.core.files import write_json
from attackroute.core.model_state import kept_modes
from attackroute.zoo.data import ImageData
from attackroute.zoo.networks import BUILT_IN, build
from attackroute.zoo.spec import ModelSpec, Normalise

CARD = "model.json"
LAST = "last.safetensors"
BEST = "best.safetensors"
PRESETS = Path(__file__).parent / "presets"
TRAINING = "training.json"

_PRESET = "preset:"
_FORMAT = "attackroute model"
_VERSION = 1
_SEQUENCES = ("mean", "std")
_CONTAINERS = ("state_dict", "model")
_PARALLEL_PREFIX = "module."
_COUNTER = "num_batches_tracked"  # of no use in eval mode, and left out by some
_NAMED = 3


@dataclass(frozen=True)
class ModelCard:
    """What ``model.json`` says about the weights beside it.

    Attributes:
        spec: How the network is built.
        classes: Names of the labels that it was trained for.
    """

    spec: ModelSpec
    classes: tuple[str, ...]

    def save(self, folder: Path) -> None:
        """Write ``model.json``, unless the folder describes another network already.

        Raises:
            UserError: It does, or the file cannot be written.
        """
        if (folder / CARD).exists() and ModelCard.load(folder) != self:
            raise UserError(
                f"{folder / CARD} describes another network than this one; "
                "choose another folder, or give the --model, --width and --data that it was made with"
            )
        content = {"format": _FORMAT, "version": _VERSION, "model": asdict(self.spec), "classes": list(self.classes)}
        write_json(folder / CARD, content)

    @classmethod
    def load(cls, folder: Path) -> ModelCard:
        """Read ``model.json``.

        Raises:
            UserError: The file is missing, damaged or something else.
        """
        path = folder / CARD
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{folder} has no {CARD}; name a folder that attackroute train wrote") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); train again, or mend it") from error
        try:
            return cls._parse(content)
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} does not describe a network (version {_VERSION}); train again") from error

    @classmethod
    def _parse(cls, content: Mapping[str, Any]) -> ModelCard:
        if (content["format"], content["version"]) != (_FORMAT, _VERSION):
            raise KeyError("format")
        fields: dict[str, Any] = {
            name: tuple(value) if name in _SEQUENCES and value is not None else value
            for name, value in content["model"].items()
        }
        return cls(ModelSpec(**fields), tuple(map(str, content["classes"])))


def find_card(model: str) -> tuple[Path, ModelCard] | None:
    """The train folder that ``--model`` names, and its card; None where it names something else.

    ``preset:NAME`` is a folder that comes with the package.

    Raises:
        UserError: There is no such preset, or the folder does not describe a network.
    """
    if model.startswith(_PRESET):
        folder = preset_folder(model.removeprefix(_PRESET))
        return folder, ModelCard.load(folder)
    folder = Path(model).expanduser()
    if model in BUILT_IN or not folder.is_dir():
        return None
    return folder, ModelCard.load(folder)


def open_network(
    model: str,
    data: ImageData,
    *,
    weights: Path | None = None,
    width: float | None = None,
    classes: int | None = None,
) -> nn.Module:
    """Build the network that ``--model`` names for the data, and load its weights.

    Args:
        model: A train folder, ``preset:NAME``, or a name as :func:`attackroute.zoo.build_model` takes it.
        data: The images that it will see.
        weights: A file in the place of the folder's own, as :func:`load_weights` reads it.
        width: Factor on a built-in network's channels.
        classes: Number of logits; None takes that of the data.

    Returns:
        The network on the CPU, in eval mode.

    Raises:
        UserError: Unknown model, missing or mismatching weights, or images that the network cannot take.
    """
    trained = find_card(model)
    if trained is not None:
        folder, card = trained
        _check_classes(card, data, folder)
        if width is not None or classes is not None:
            raise UserError(f"{folder} says itself how wide its network is; leave out --model-width and --classes")
        spec, weights = card.spec, weights or _kept_weights(folder)
    else:
        spec = spec_for(model, data, width=width, classes=classes)
    network = build(spec)
    if trained is None:  # after a name that nothing bears is refused
        _require_weights(model, weights)
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
    if not isinstance(normalise, Normalise) or _is_factory(spec.name):  # a factory brings its own, and takes none
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
    safe = path.suffix == ".safetensors"
    stored = _read_safetensors(path) if safe else _state_dict(_read_torch(path), path)
    weights = _without_prefix(stored, model)
    _require_fit(weights, model, path)
    model.load_state_dict(weights, strict=False)


def preset_names() -> list[str]:
    """Names of the presets."""
    return sorted(folder.name for folder in PRESETS.iterdir() if (folder / BEST).is_file())


def preset_folder(name: str) -> Path:
    """Folder of a preset.

    Raises:
        UserError: There is none of that name.
    """
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
    """How a preset was trained: command, data, accuracy on clean test images.

    Raises:
        UserError: There is none of that name.
    """
    content: dict[str, Any] = json.loads((preset_folder(name) / TRAINING).read_bytes())
    return content


def check_input(model: nn.Module, shape: tuple[int, int, int]) -> None:
    """Try a model on one black image, in eval mode and without gradients; it comes back as it was.

    Args:
        model: Maps images (N, C, H, W) to logits.
        shape: (C, H, W) of the images to come.

    Raises:
        UserError: The model cannot take images of this shape.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    image = torch.zeros(1, *shape, dtype=parameter.dtype, device=parameter.device)
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


def _kept_weights(folder: Path) -> Path:
    for name in (BEST, LAST):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} has neither {BEST} nor {LAST}; finish the training, or name a file with --weights")


def _require_weights(model: str, weights: Path | None) -> None:
    """A factory may load its own; any other network without weights would be a random one."""
    if weights is None and not _is_factory(model):
        folder = f"; for the folder of that name write ./{model}" if Path(model).is_dir() else ""
        raise UserError(
            f"{model} has no weights; name a file with --weights, or take a folder of attackroute train{folder}"
        )


def _is_factory(model: str) -> bool:
    """Whether the name is ``package.module:factory``."""
    source, colon, _ = model.partition(":")
    return bool(colon) and source not in ("torchvision", "timm")


def _check_classes(card: ModelCard, data: ImageData, folder: Path) -> None:
    """Labels of other classes would be compared with the wrong logits, in silence."""
    if card.classes != data.classes:
        raise UserError(
            f"{folder} was trained for the classes {_listed(card.classes)}, the data have {_listed(data.classes)}; "
            "give data with the same classes"
        )


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names if len(names) <= 4 else (*names[:2], "...", names[-1])) + f" ({len(names)})"


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
    stored = {name: tuple(value.shape) for name, value in weights.items()}
    reshaped = [name for name in expected.keys() & stored.keys() if expected[name] != stored[name]]
    missing = [name for name in expected.keys() - stored.keys() if name.rpartition(".")[2] != _COUNTER]
    unexpected = stored.keys() - expected.keys()
    order = {name: place for place, name in enumerate(dict.fromkeys([*expected, *stored]))}
    faults = [
        *(f"{name} is {stored[name]} instead of {expected[name]}" for name in sorted(reshaped, key=order.__getitem__)),
        *(f"{name} {expected[name]} is missing" for name in sorted(missing, key=order.__getitem__)),
        *(f"{name} {stored[name]} is unexpected" for name in sorted(unexpected, key=order.__getitem__)),
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
