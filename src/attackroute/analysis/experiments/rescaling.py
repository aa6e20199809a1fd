"""A sanity check of criteria: do they rank the channels of a function, or of one way to write it down in parameters?"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attackroute.analysis.controls import ROUTE
from attackroute.analysis.criteria import MixedChannelsError, channel_scores
from attackroute.analysis.experiment import ExperimentResult, Work, experiment
from attackroute.analysis.figures.style import Figure
from attackroute.analysis.study import BASELINES, SAMPLE_WIDTH, Study
from attackroute.core.checks import checked_logits
from attackroute.core.errors import UserError
from attackroute.core.layers import CHANNEL_DIM
from attackroute.core.model_state import frozen
from attackroute.core.table import Table
from attackroute.routes.route import Route
from attackroute.tracing.config import UNITS
from attackroute.tracing.trace import Progress, trace_routes

FACTORS = (0.1, 10.0)  # on the channels that are not chosen, and that may so gain or lose
_SAMPLES = 64  # images at most: it is what stays that counts, not what is chosen


@dataclass(frozen=True, kw_only=True)
class Rescaling(ExperimentResult):
    """For each criterion and layer the ``channels`` that it chooses, and how many are ``kept`` at the least."""

    kind = "rescaling"
    share: float
    samples: int
    factors: Sequence[float] = FACTORS

    def reading(self) -> str:
        """What stays by each criterion, over all layers."""
        kept = {}
        for criterion, units in dict.fromkeys(zip(*map(self.table.column, ("criterion", "units")), strict=True)):
            rows = self.table.select(criterion=criterion, units=units)
            kept[criterion, units] = sum(rows.column("kept")) / sum(rows.column("channels"))
        parts = ", ".join(f"{by} ({units}) {share:.0%}" for (by, units), share in kept.items())
        factors = " or ".join(f"{factor:g}" for factor in self.factors)
        return f"With all other channels' kernels times {factors}, undone behind them, of a choice stay: {parts}."

    def figures(self) -> Mapping[str, Figure]:
        """None: it is one number for each criterion."""
        return {}


@experiment("rescaling", order=9, title="The same function in other parameters", work=Work(1, traces=6))
def run(study: Study, progress: Progress) -> Rescaling:
    """Which criteria choose the same channels when the network is written down in other parameters."""
    config, attack, images = study.config, study.attack, study.batches(study.halves[0][:_SAMPLES])

    def chosen(model: nn.Module, by: str, units: str) -> Route:
        if by == ROUTE:
            noise_of = attack if config.follows_noise else None
            routes = trace_routes(model, images, SAMPLE_WIDTH, attack=noise_of, config=replace(config, units=units))
            return routes.aggregate(study.share)
        scores = channel_scores(model, images, by, attack=attack, linear=config.linear, units=units)
        return scores.route(study.share)

    rows = []
    ways = [(by, units) for by in (ROUTE, *BASELINES) for units in UNITS]
    for done, (by, units) in enumerate(ways, start=1):
        progress(done, len(ways))
        try:
            before = chosen(study.model, by, units)
        except MixedChannelsError:  # of weights, which then belong to no channel
            continue
        others = [rescaled(study.model, before.complement(), study.pair, factor) for factor in FACTORS]
        kept = [(before & chosen(other, by, units)).indices for other in others]
        for layer, indices in before.indices.items():
            stay = min(len(each[layer]) for each in kept)
            rows.append({"criterion": by, "units": units, "layer": layer, "channels": len(indices), "kept": stay})
    return Rescaling(table=Table.of(rows), share=study.share, samples=len(study.halves[0][:_SAMPLES]))


def rescaled(model: nn.Module, channels: Route, images: Tensor, factor: float) -> nn.Module:
    """A copy of a network that computes the same: the kernels of some channels are scaled, their outputs scaled back.

    Batch norm behind a layer, or a ReLU before a linear map, hides such a factor in just this way. Layers whose kernel
    no convolution or linear module of theirs holds stay as they are.

    Raises:
        UserError: The copy's answers on some images are others, as with kernels that are shared or computed.
    """
    original, model = model, copy.deepcopy(model)
    for name, module in model.named_modules():
        if name in channels and isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = module.weight
            factors = torch.where(channels.mask(name), factor, 1.0).to(weight)
            with torch.no_grad():
                weight.mul_(factors.view(-1, *(1,) * (weight.ndim - 1)))
                if module.bias is not None:
                    module.bias.mul_(factors)
            shape = factors.view(-1, *(1,) * (-1 - CHANNEL_DIM["conv2d" if weight.ndim == 4 else "linear"]))
            module.register_forward_hook(lambda _module, _args, output, shape=shape: output / shape)
    with torch.no_grad(), frozen(original), frozen(model):
        one, two = (checked_logits(each(images.clone()), len(images)) for each in (original, model))
    if not torch.allclose(one, two, rtol=0, atol=1e-3 * float(one.abs().max())):
        raise UserError("the network shares or computes kernels, so that they cannot be scaled: leave out rescaling")
    return model
