"""Critical attacking routes of convolutional networks, exactly and from one forward pass.

Public names load their module on first use, so that ``import attackroute`` does not wait for PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from attackroute.version import __version__

if TYPE_CHECKING:
    from attackroute.attacks import parse_attack
    from attackroute.channel_measurements import gradient, sensitivity
    from attackroute.data import load_data
    from attackroute.errors import UserError
    from attackroute.evaluation import evaluate
    from attackroute.evaluation_table import Evaluation
    from attackroute.hardening import HardenResult, harden
    from attackroute.hardness_metric import Hardness, hardness
    from attackroute.instances import InstanceRoutes
    from attackroute.interventions import deactivate, record_outputs, transplant, weaken
    from attackroute.models import build_model, load_weights
    from attackroute.penalties import GradientPenalty, StabilisationPenalty, WeightPenalty
    from attackroute.rivals import rank_channels
    from attackroute.routes import Route
    from attackroute.stored_routes import StoredRoutes
    from attackroute.trace import influence, trace_routes
    from attackroute.training import TrainSettings, train

__all__ = [
    "Evaluation",
    "GradientPenalty",
    "HardenResult",
    "Hardness",
    "InstanceRoutes",
    "Route",
    "StabilisationPenalty",
    "StoredRoutes",
    "TrainSettings",
    "UserError",
    "WeightPenalty",
    "__version__",
    "build_model",
    "deactivate",
    "evaluate",
    "gradient",
    "harden",
    "hardness",
    "influence",
    "load_data",
    "load_weights",
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
    "Evaluation": "evaluation_table",
    "GradientPenalty": "penalties",
    "HardenResult": "hardening",
    "Hardness": "hardness_metric",
    "InstanceRoutes": "instances",
    "Route": "routes",
    "StoredRoutes": "stored_routes",
    "TrainSettings": "training",
    "UserError": "errors",
    "StabilisationPenalty": "penalties",
    "WeightPenalty": "penalties",
    "build_model": "models",
    "deactivate": "interventions",
    "evaluate": "evaluation",
    "gradient": "channel_measurements",
    "harden": "hardening",
    "hardness": "hardness_metric",
    "influence": "trace",
    "load_data": "data",
    "load_weights": "models",
    "parse_attack": "attacks",
    "rank_channels": "rivals",
    "record_outputs": "interventions",
    "sensitivity": "channel_measurements",
    "trace_routes": "trace",
    "train": "training",
    "transplant": "interventions",
    "weaken": "interventions",
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
