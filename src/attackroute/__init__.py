"""Critical attacking routes of convolutional networks, exactly and from one forward pass.

Public names load their module on first use, so that ``import attackroute`` does not wait for PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from attackroute.core.version import __version__

if TYPE_CHECKING:
    from attackroute.analysis import hardness
    from attackroute.analysis.channel_statistics import loss_gradient, sensitivity
    from attackroute.analysis.criteria import rank_channels
    from attackroute.analysis.hardness import Hardness
    from attackroute.analysis.interventions import deactivate, record_outputs, transplant, weaken
    from attackroute.core.errors import UserError
    from attackroute.hardening.gradient_penalty import GradientPenalty
    from attackroute.hardening.harden import HardenResult, harden
    from attackroute.hardening.settings import HardenSettings, TrainSettings
    from attackroute.hardening.stabilisation_penalty import StabilisationPenalty
    from attackroute.hardening.training import train
    from attackroute.hardening.weight_penalty import WeightPenalty
    from attackroute.robustness.evaluate import evaluate
    from attackroute.robustness.evaluation import Evaluation
    from attackroute.robustness.registry import parse_attack
    from attackroute.routes.folder import RouteFolder
    from attackroute.routes.instance_routes import InstanceRoutes
    from attackroute.routes.route import Route
    from attackroute.tracing.config import TraceConfig
    from attackroute.tracing.influence import influence
    from attackroute.tracing.trace import trace_routes
    from attackroute.zoo.data import load_data
    from attackroute.zoo.networks import build_model
    from attackroute.zoo.weights import load_weights

__all__ = [
    "Evaluation",
    "GradientPenalty",
    "HardenResult",
    "HardenSettings",
    "Hardness",
    "InstanceRoutes",
    "Route",
    "RouteFolder",
    "StabilisationPenalty",
    "TraceConfig",
    "TrainSettings",
    "UserError",
    "WeightPenalty",
    "__version__",
    "build_model",
    "deactivate",
    "evaluate",
    "harden",
    "hardness",
    "influence",
    "load_data",
    "load_weights",
    "loss_gradient",
    "parse_attack",
    "rank_channels",
    "record_outputs",
    "sensitivity",
    "trace_routes",
    "train",
    "transplant",
    "weaken",
]

# A module must never bear the name of a public function: importing it would shadow the function.
_HOMES = {
    "Evaluation": "robustness.evaluation",
    "GradientPenalty": "hardening.gradient_penalty",
    "HardenResult": "hardening.harden",
    "HardenSettings": "hardening.settings",
    "Hardness": "analysis.hardness",
    "InstanceRoutes": "routes.instance_routes",
    "Route": "routes.route",
    "RouteFolder": "routes.folder",
    "TraceConfig": "tracing.config",
    "TrainSettings": "hardening.settings",
    "UserError": "core.errors",
    "StabilisationPenalty": "hardening.stabilisation_penalty",
    "WeightPenalty": "hardening.weight_penalty",
    "build_model": "zoo.networks",
    "deactivate": "analysis.interventions",
    "evaluate": "robustness.evaluate",
    "harden": "hardening.harden",
    "hardness": "analysis",
    "influence": "tracing.influence",
    "load_data": "zoo.data",
    "load_weights": "zoo.weights",
    "loss_gradient": "analysis.channel_statistics",
    "parse_attack": "robustness.registry",
    "rank_channels": "analysis.criteria",
    "record_outputs": "analysis.interventions",
    "sensitivity": "analysis.channel_statistics",
    "trace_routes": "tracing.trace",
    "train": "hardening.training",
    "transplant": "analysis.interventions",
    "weaken": "analysis.interventions",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
