"""Critical attacking routes of convolutional networks, exactly and from one forward pass.

Public names load their module on first use, so that ``import attackroute`` does not wait for PyTorch. They are listed
once: where type checkers read them, this module reads them too.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attackroute.analysis.channel_statistics import loss_gradient as loss_gradient
    from attackroute.analysis.channel_statistics import sensitivity as sensitivity
    from attackroute.analysis.criteria import rank_channels as rank_channels
    from attackroute.analysis.hardness import hardness as hardness
    from attackroute.analysis.interventions import deactivate as deactivate
    from attackroute.analysis.interventions import transplant as transplant
    from attackroute.analysis.interventions import weaken as weaken
    from attackroute.core import __version__ as __version__
    from attackroute.core.errors import UserError as UserError
    from attackroute.hardening.gradient_penalty import GradientPenalty as GradientPenalty
    from attackroute.hardening.harden import harden as harden
    from attackroute.hardening.settings import HardenSettings as HardenSettings
    from attackroute.hardening.settings import TrainSettings as TrainSettings
    from attackroute.hardening.training import train as train
    from attackroute.hardening.weight_penalty import WeightPenalty as WeightPenalty
    from attackroute.robustness.evaluate import evaluate as evaluate
    from attackroute.robustness.registry import parse_attack as parse_attack
    from attackroute.routes.folder import RouteFolder as RouteFolder
    from attackroute.routes.instance_routes import InstanceRoutes as InstanceRoutes
    from attackroute.routes.route import Route as Route
    from attackroute.tracing.config import TraceConfig as TraceConfig
    from attackroute.tracing.influence import influence as influence
    from attackroute.tracing.trace import trace_routes as trace_routes
    from attackroute.zoo.data import load_data as load_data
    from attackroute.zoo.networks import build_model as build_model
    from attackroute.zoo.spec import normalised as normalised

_SOURCE = Path(__file__).read_text("utf-8")
_HOMES = {name: module for module, name in re.findall(r"^    from (\S+) import (\w+) as", _SOURCE, re.MULTILINE)}

__all__ = list(_HOMES)  # all of them are strings


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
