"""The network that ``--model`` names, with its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from attackroute.core.errors import UserError
from attackroute.zoo.card import ModelCard
from attackroute.zoo.checks import check_input
from attackroute.zoo.images import ImageData
from attackroute.zoo.normalisation import Normalise
from attackroute.zoo.presets import preset_folder
from attackroute.zoo.registry import BUILT_IN, build
from attackroute.zoo.spec import ModelSpec
from attackroute.zoo.weights import BEST, LAST, load_weights

_PRESET = "preset:"


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
    """Build the network for the data, and load its weights.

    Args:
        model: Value of ``--model``.
        data: The images that it will see.
        weights: Value of ``--weights``.
        width: Factor on a built-in network's channels.
        classes: Number of logits; None takes that of the data.

    Returns:
        The network on the CPU, in eval mode.

    Raises:
        UserError: Unknown model, missing or mismatching weights, or images that the network cannot take.
    """
    found = find_card(model)
    if found is not None:
        folder, card = found
        _check_classes(card, data, folder)
        if width is not None or classes is not None:
            raise UserError(f"{folder} says itself how wide its network is; leave out --model-width and --classes")
        spec, weights = card.spec, weights or _kept_weights(folder)
    else:
        spec = spec_for(model, data, width=width, classes=classes)
    network = build(spec)
    if found is None:  # after a name that nothing bears is refused
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
    part = getattr(network, "normalise", None)
    if not isinstance(part, Normalise) or _is_factory(spec.name):  # a factory brings its own, and takes none
        return spec
    return replace(spec, mean=part.statistics.mean, std=part.statistics.std)


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
