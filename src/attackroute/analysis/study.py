"""A study of one network: images in two halves, and what all experiments on them share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from attackroute.analysis.channel_statistics import layer_channels
from attackroute.analysis.controls import ROUTE, Comparison, sample_routes
from attackroute.analysis.criteria import ChannelScores, MixedChannelsError, channel_scores
from attackroute.analysis.sites import check_site
from attackroute.core import __version__
from attackroute.core.checks import checked_logits
from attackroute.core.distributed import leading
from attackroute.core.errors import UserError
from attackroute.core.layers import OUTPUT
from attackroute.core.model_state import frozen, placement, weights_digest
from attackroute.robustness.attack import Attack, attack_name, attacked
from attackroute.robustness.gradient_attacks import predicted
from attackroute.robustness.registry import named_attacks
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.route import Route
from attackroute.tracing.config import UNIT, TraceConfig
from attackroute.tracing.trace import Progress, Tracer, trace_routes
from attackroute.zoo.data import ImageBatches, ImageData

BASELINES = ("activation", "weight", "kernel", "gradient", "sensitivity", "attribution")
_TRIED = 8  # images, to see what they cost
SAMPLE_WIDTH = 0.2
"""Share of each layer's channels on a sample's route, as the paper has it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """A network, images in two halves, and everything that experiments share, made when it is first asked for.

    Attributes:
        model: The network on its device.
        images: The images; half of them, drawn by the seed, decide on routes and ranks, the others are measured.
        attacks: One or several, by name or not: specifications such as ``"pgd"``, or any ``(model, images, labels) ->
            images``; shares grow for the first, which baselines and routes that follow noise take too.
        config: How routes are traced.
        layers: Names of layers; None for all.
        share: Share of each layer's channels on the route.
        at: Where channels are changed: the layers' ``"output"``, or after their ``"activation"``.
        draws: Number of random controls.
        batch_size: Images at a time.
        workers: Processes that read images, for each that computes.
        seed: Of the halves.
        folder: Where results, figures and the route go; None writes nothing.
        settings: What else the results depend on, such as the names of model and data.
        note: Called with what there is to say in passing.
        progress: Called with a unit, such as ``"images traced"``; gives a context whose value is called with what is
            done, and of how much.
    """

    model: nn.Module
    images: ImageData
    attacks: Mapping[str, Attack | str] | Sequence[Attack | str] | Attack | str = "pgd"
    config: TraceConfig = field(default_factory=TraceConfig)
    layers: Sequence[str] | None = None
    share: float = 0.3
    at: str = OUTPUT
    draws: int = 5
    batch_size: int = 128
    workers: int = 0
    seed: int = 0
    folder: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    note: Callable[[str], None] = field(default=lambda text: None)
    progress: Callable[[str], AbstractContextManager[Progress]] = lambda unit: nullcontext(lambda done, total: None)

    def __post_init__(self) -> None:
        check_site(self.at)
        self.config.check_attack(self.attack)

    @cached_property
    def named_attacks(self) -> Mapping[str, Attack]:
        """The attacks by name."""
        return named_attacks(self.attacks)

    @property
    def attack(self) -> Attack:
        """The first attack."""
        return next(iter(self.named_attacks.values()))

    @property
    def seeds(self) -> range:
        """Seeds of the random controls."""
        return range(self.draws)

    @cached_property
    def halves(self) -> tuple[list[int], list[int]]:
        """Indices of the images that decide on routes and ranks, and of those that are measured."""
        count = len(self.images)
        if count < 2:
            raise UserError("one image is too few: half of the images decide on the route, the others are measured")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed)).tolist()
        return sorted(order[: count // 2]), sorted(order[count // 2 :])

    @property
    def reference(self) -> ImageBatches:
        """The images that decide on routes and ranks."""
        return self.batches(self.halves[0])

    @property
    def measured(self) -> ImageBatches:
        """The images that are measured."""
        return self.batches(self.halves[1])

    def batches(self, indices: Sequence[int]) -> ImageBatches:
        """Some of the images."""
        images = replace(self.images, dataset=Subset(self.images.dataset, indices))
        return ImageBatches(images, self.batch_size, workers=self.workers)

    def _some(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The first batch of some images and their labels, on the network's device."""
        images, labels = next(iter(self.batches(indices)))
        device, dtype = placement(self.model)
        return images.to(device, dtype), labels.to(device)

    @cached_property
    def routes(self) -> dict[str, InstanceRoutes]:
        """Routes of the reference images by criterion; where routes follow noise, that of the first attack."""
        return self._sample_routes(self.reference, self.traced, self.attack if self.config.follows_noise else None)

    @cached_property
    def all_routes(self) -> dict[str, InstanceRoutes]:
        """Routes by influence of all images, those that are measured too, by criterion."""
        return self._sample_routes(self.batches(range(len(self.images))), self.plain_config)

    @cached_property
    def traced(self) -> TraceConfig:
        """How routes are traced, with the deviations over the reference images where units are of these."""
        return self.config.measured(self.model, self.reference, self.batch_size)

    @property
    def plain_config(self) -> TraceConfig:
        """How routes by influence are traced, whatever the study's follow."""
        return replace(self.traced, carrier=UNIT)

    def _sample_routes(
        self, data: ImageBatches, config: TraceConfig, attack: Attack | None = None
    ) -> dict[str, InstanceRoutes]:
        with self.progress("images traced") as progress:
            return sample_routes(self.model, data, SAMPLE_WIDTH, attack=attack, config=config, progress=progress)

    @cached_property
    def attacked_route(self) -> Route:
        """The model's route by influence under the first attack."""
        with self.progress("attacked images traced") as progress:
            routes = trace_routes(
                self.model, self.reference, SAMPLE_WIDTH, attack=self.attack, config=self.plain_config,
                progress=progress,
            )  # fmt: skip
        return routes.aggregate(self.share)

    @cached_property
    def route(self) -> Route:
        """The model's route, on the layers to study."""
        route = self.routes[ROUTE].aggregate(self.share)
        if self.layers is not None:
            route = route.restrict(self.layers)
        if self.folder is not None and leading():
            route.save(self.folder / "route.json")
        return route

    @cached_property
    def baselines(self) -> dict[str, ChannelScores]:
        """Channels ranked by other criteria on the reference images; attacks on them are the first one.

        The criterion of weights is left out, with a note, where the network mixes channels between two layers.
        """
        scores = {}
        for by in BASELINES:
            with self.progress(f"images ranked by {by}") as progress:
                try:
                    scores[by] = channel_scores(
                        self.model, self.reference, by, attack=self.attack, linear=self.config.linear,
                        units=self.traced.units, progress=progress,
                    )  # fmt: skip
                except MixedChannelsError as error:
                    self.note(f"note: no control by {by}: {error}")
        return scores

    def comparison(self, progress: Progress) -> Comparison:
        """The route beside random channels and baselines, on the images that are measured."""
        return Comparison(
            model=self.model, data=self.measured, route=self.route, baselines=self.baselines, share=self.share,
            seeds=self.seeds, at=self.at, progress=progress,
        )  # fmt: skip

    def examples(self) -> tuple[Tensor, Tensor]:
        """A few images to measure that the network gets right, drawn by the seed."""
        order = torch.randperm(len(self.halves[1]), generator=torch.Generator().manual_seed(self.seed)).tolist()
        images, labels = self._some([self.halves[1][at] for at in order])
        with frozen(self.model), torch.no_grad():
            right = checked_logits(self.model(images), len(images)).argmax(1) == labels
        chosen = right.nonzero().flatten().tolist()[:4] or [0]  # without any it is the experiment that says so
        return images[chosen], labels[chosen]

    @cached_property
    def pair(self) -> Tensor:
        """Two images on the network's device, the first, since nothing but its shapes is learnt from them."""
        return self._some(self.halves[0][:2])[0]

    @cached_property
    def unit_seconds(self) -> tuple[float, ...]:
        """About how many seconds an image each unit of an experiment's work takes, by a try on a few of the images.

        Units are a round of all attacks; a forward pass for each set of channels that an intervention tries, of each
        layer the route's and the controls'; a trace for each attack; and a round of all attacks for each such set.
        """
        images, labels = self._some(self.halves[0][:_TRIED])
        seconds = []
        with frozen(self.model), torch.inference_mode(False):
            tracer = Tracer(self.model, images, SAMPLE_WIDTH, config=self.plain_config)
            layers = self.layers or layer_channels(self.model, images, linear=self.config.linear)
            sets = len(layers) * (1 + self.draws + len(BASELINES))
            for times, step in (
                (1, lambda: [attacked(self.model, attack, images, labels) for attack in self.named_attacks.values()]),
                (sets, lambda: predicted(self.model, images).cpu()),
                (len(self.named_attacks), lambda: tracer.trace(images, labels)),
            ):
                started = time.perf_counter()
                step()
                seconds.append(times * (time.perf_counter() - started) / len(images))
        return *seconds, sets * seconds[0]

    @cached_property
    def all_settings(self) -> dict[str, Any]:
        """All on which a result depends, as JSON values."""
        return {
            **self.settings, "version": __version__, "weights": weights_digest(self.model),
            "split": self.images.split, "images": [len(self.images), *self.images.shape],
            "seed": self.seed, "batch-size": self.batch_size, "share": self.share, "at": self.at, "draws": self.draws,
            "layers": None if self.layers is None else list(self.layers),
            "linear": self.config.linear, "sketches": self.config.sketches, "sketch-seed": self.config.seed,
            "carrier": self.config.carrier, "units": self.config.units_name,
            "attacks": [attack_name(attack) for attack in self.named_attacks.values()],
        }  # fmt: skip
