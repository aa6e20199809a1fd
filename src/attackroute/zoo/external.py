"""Networks from elsewhere: torchvision, timm, or the user's own code. Nothing is downloaded."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from attackroute.core.errors import UserError, did_you_mean
from attackroute.zoo.spec import ModelSpec, Statistics, normalised


def torchvision_names() -> list[str]:
    """Names of torchvision's classification networks."""
    from torchvision import models

    return list(models.list_models(module=models))


def from_torchvision(name: str, spec: ModelSpec) -> nn.Module:
    """A classification network of torchvision with random weights, in front of it the normalisation of its own."""
    from torchvision import models

    names = torchvision_names()
    if name not in names:
        raise UserError(f"torchvision has no classification network {name!r}{did_you_mean(name, names)}")
    _refuse_width(spec)
    if spec.in_channels != 3:
        raise UserError(f"{spec.name} takes images with 3 channels, not {spec.in_channels}; choose a built-in network")
    # what torchvision itself sets for these two when it loads their weights
    arguments = {"init_weights": True, "transform_input": True} if name in ("googlenet", "inception_v3") else {}
    network = models.get_model(name, weights=None, num_classes=spec.num_classes, **arguments)
    trained_with = models.get_model_weights(name).DEFAULT.transforms()
    statistics = spec.statistics(Statistics(tuple(trained_with.mean), tuple(trained_with.std)))
    return normalised(network, statistics.mean, statistics.std)


def from_timm(name: str, spec: ModelSpec) -> nn.Module:
    """A network of timm with random weights, in front of it the normalisation that timm's weights expect."""
    try:
        import timm
    except ImportError as error:
        raise UserError(f'{spec.name} needs the timm package: pip install "attackroute[timm]"') from error
    if not timm.is_model(name):  # also refuses hf-hub: and local-dir: names, which would read a configuration
        raise UserError(f"timm {timm.__version__} has no network {name!r}{did_you_mean(name, timm.list_models())}")
    _refuse_width(spec)
    try:
        network: nn.Module = timm.create_model(
            name, pretrained=False, num_classes=spec.num_classes, in_chans=spec.in_channels
        )
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"timm cannot build {name!r}: {reason}") from error
    config: Mapping[str, Any] = getattr(network, "pretrained_cfg", None) or {}
    trained_with = Statistics(tuple(config["mean"]), tuple(config["std"])) if {"mean", "std"} <= set(config) else None
    statistics = spec.statistics(trained_with)
    return normalised(network, statistics.mean, statistics.std)


def from_factory(module_name: str, name: str, spec: ModelSpec) -> nn.Module:
    """The network that the user's own function returns, as it is; the current directory can be imported from."""
    if spec.width != 1 or spec.mean is not None or spec.std is not None:
        raise UserError(f"{spec.name} is taken as it is: set its width, mean and std in {name}() instead")
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise UserError(f"{spec.name} must be written package.module:factory; {module_name!r} is no module's name")
    with _current_directory_first():
        try:
            module = import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise  # the module is there, and something that it imports is not
            raise UserError(
                f"no module {module_name!r} for {spec.name}; run from the folder that holds it, or install it"
            ) from error
        factory = getattr(module, name, None)
        if factory is None:
            names = [key for key, value in vars(module).items() if callable(value)]
            raise UserError(f"{module_name} has no function {name!r}{did_you_mean(name, names)}")
        try:
            if isinstance(factory, nn.Module):
                raise TypeError
            with suppress(ValueError):  # compiled code without a signature
                inspect.signature(factory).bind()
        except TypeError:
            raise UserError(
                f"{spec.name} must be a function that can be called without arguments and returns a module"
            ) from None
        network = factory()
    if not isinstance(network, nn.Module):
        raise UserError(f"{spec.name} returned {type(network).__name__}; it must return a torch.nn.Module")
    return network


def _refuse_width(spec: ModelSpec) -> None:
    if spec.width != 1:
        raise UserError(f"{spec.name} comes in one width; only built-in networks take width={spec.width}")


@contextmanager
def _current_directory_first() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):  # the user's code may have removed it
            sys.path.remove(folder)
