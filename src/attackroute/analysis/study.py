"""The experiments of ``attackroute analyze``: what each one needs, runs, draws and writes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from attackroute.analysis.accuracy_table import AccuracyTable
from attackroute.analysis.attention import compare_attention
from attackroute.analysis.criteria import ChannelScores, MixedChannelsError, channel_scores
from attackroute.analysis.deactivation import deactivation_accuracy
from attackroute.analysis.detection import detect
from attackroute.analysis.figures.accuracy_curves import accuracy_figures
from attackroute.analysis.figures.attention_maps import attention_figure, attention_panels, panels_figure
from attackroute.analysis.figures.detection_dots import detection_figure
from attackroute.analysis.figures.occurrence_lines import occurrence_figure
from attackroute.analysis.figures.response_boxes import responses_figure
from attackroute.analysis.gradcam import evidence
from attackroute.analysis.occurrence import tabulate_occurrence
from attackroute.analysis.rankings import ROUTE
from attackroute.analysis.responses import compare_responses
from attackroute.analysis.sample_routes import sample_routes
from attackroute.analysis.tables import Result, save_result, to_json
from attackroute.analysis.transplanting import transplant_accuracy
from attackroute.analysis.weakening import weakening_accuracy
from attackroute.cli.console import Output, Progress
from attackroute.core.distributed import leading
from attackroute.core.errors import UserError
from attackroute.core.model_state import frozen, placement, weights_digest
from attackroute.core.version import __version__
from attackroute.robustness.attack import Perturbation
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.route import Route
from attackroute.tracing.connections import Connections
from attackroute.tracing.noise import NOISE, UNIT
from attackroute.tracing.sketches import Sketches
from attackroute.tracing.trace import trace_routes
from attackroute.zoo.data import ImageBatches, ImageData

RIVALS = ("activation", "weight", "gradient", "sensitivity", "attribution")


_UNDER_ATTACK = ("sensitivity", "attribution")


_WIDTH = 0.2  # the paper's, of a sample's route


_SMALLEST_MAP = 4  # positions each way; maps of fewer show nothing


_SHOWN = 4


_NAMED = 3  # layers at most in a note


Figures = dict[str, Figure]


@dataclass
class Study:
    """A network, images in two halves, and everything that experiments share.

    Args:
        network: The network on its device.
        images: The images; half of them, drawn by the seed, decide on routes and ranks, the others are measured.
        attacks: Attacks by name.
        chosen: Names of layers; None for all.
        share: Share of each layer's channels on the route.
        at: Where channels are changed.
        draws: Number of random controls.
        batch_size: Images at a time.
        seed: Of the halves.
        origin: Further terms on which the results depend.
        folder: Where the files go.
        output: Where the words go.
        linear: Whether linear maps are route layers too.
        sketches: Random products for each edge without a closed form: approximate; None for exact routes.
        carrier: What the routes follow: ``"unit"``, or ``"noise"``, that of the first attack.
        workers: Processes that read images, for each that computes.
    """

    network: nn.Module
    images: ImageData
    attacks: Mapping[str, Perturbation]
    chosen: Sequence[str] | None
    share: float
    at: str
    draws: int
    batch_size: int
    seed: int
    origin: Mapping[str, Any]
    folder: Path
    output: Output
    linear: bool = False
    sketches: Sketches = None
    workers: int = 0
    carrier: str = UNIT

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
        return self._batches(self.halves[0])

    @property
    def measured(self) -> ImageBatches:
        """The images that are measured."""
        return self._batches(self.halves[1])

    def _batches(self, indices: Sequence[int]) -> ImageBatches:
        size = self.batch_size
        batches = [indices[start : start + size] for start in range(0, len(indices), size)]
        return ImageBatches(self.images, size, batches=batches, workers=self.workers)

    @cached_property
    def routes(self) -> dict[str, InstanceRoutes]:
        """Routes of the reference images by criterion."""
        with self.output.progress("images traced") as progress:
            return sample_routes(
                self.network, self.reference, _WIDTH, linear=self.linear, sketches=self.sketches,
                noise_of=next(iter(self.attacks.values())) if self.carrier == NOISE else None, progress=progress,
            )  # fmt: skip

    @cached_property
    def all_routes(self) -> dict[str, InstanceRoutes]:
        """Routes of all images, those that are measured too, by criterion."""
        data = ImageBatches(self.images, self.batch_size, workers=self.workers)
        with self.output.progress("images traced") as progress:
            return sample_routes(
                self.network, data, _WIDTH, linear=self.linear, sketches=self.sketches, progress=progress
            )

    @cached_property
    def attacked_route(self) -> Route:
        """The model's route under the first attack."""
        with self.output.progress("attacked images traced") as progress:
            routes = trace_routes(
                self.network, self.reference, _WIDTH, attack=next(iter(self.attacks.values())), linear=self.linear,
                sketches=self.sketches, progress=progress,
            )  # fmt: skip
        return routes.aggregate(self.share)

    @cached_property
    def route(self) -> Route:
        """The model's route."""
        whole = self.routes[ROUTE].aggregate(self.share)
        route = whole if self.chosen is None else whole.restrict(self.chosen)
        if leading():
            route.save(self.folder / "route.json")
        return route

    def check_layers(self) -> None:
        """Let a layer that is not on the route be named before any experiment has run."""
        if self.chosen is not None:
            self.routes[ROUTE].aggregate(self.share).restrict(self.chosen)

    @cached_property
    def rivals(self) -> dict[str, ChannelScores]:
        """Channels ranked by other criteria on the reference images; attacks on them are the first one.

        The criterion of weights is left out, with a note, where the network mixes channels between two layers.
        """
        attack = next(iter(self.attacks.values()))
        found = {}
        for by in RIVALS:
            with self.output.progress(f"images ranked by {by}") as progress:
                under = attack if by in _UNDER_ATTACK else None
                try:
                    found[by] = channel_scores(
                        self.network, self.reference, by, attack=under, linear=self.linear, progress=progress
                    )
                except MixedChannelsError as error:
                    self.output.note(f"note: no control by {by}: {error}")
        return found

    @cached_property
    def joined(self) -> list[str] | None:
        """The route's layers whose kernels can be weakened, if not all; a note says how many others there are.

        Raises:
            UserError: There is none.
        """
        images, _ = next(iter(self.reference))
        connections = Connections.of_route(self.network, images.to(*placement(self.network)), self.route)
        joined = connections.joined(self.route)
        if not joined:
            raise UserError(
                "no kernel slice joins channels of two layers of the route: what stands between them mixes channels or "
                "positions; leave weaken out (--only)"
            )
        mixed = connections.mixed(self.route)
        if not mixed:
            return None
        self.output.note(
            f"note: weaken leaves {len(mixed)} of {len(self.route)} layers as they are, since what stands before "
            f"them mixes channels or positions: {', '.join(mixed[:_NAMED])}{', ...' * (len(mixed) > _NAMED)}"
        )
        return joined

    def run(self, name: str, experiment: Experiment | None = None) -> tuple[Result, dict[str, Any]]:
        """Run one experiment and write its files.

        Args:
            name: What its files are called.
            experiment: None for the one of that name.

        Returns:
            The result, and the content of its JSON file.
        """
        started = time.perf_counter()
        with self.output.progress(f"images, {name}") as progress:
            result, figures = (experiment or EXPERIMENTS[name])(self, progress)
        seconds = time.perf_counter() - started
        if leading():
            save_result(result, figures, self.folder, name, terms=self.terms(name), seconds=seconds)
        return result, {"seconds": seconds, **to_json(result)}

    def finished(self, name: str) -> dict[str, Any] | None:
        """What the experiment's JSON file holds, if it was run on the same terms."""
        try:
            content = json.loads((self.folder / f"{name}.json").read_bytes())
        except (OSError, ValueError):
            return None
        same = isinstance(content, dict) and content.get("terms") == json.loads(json.dumps(self.terms(name)))
        return {key: value for key, value in content.items() if key != "terms"} if same else None

    def terms(self, name: str) -> dict[str, Any]:
        """All on which an experiment's result depends, as JSON values."""
        return {
            **self.origin,
            "version": __version__,
            "weights": self._digest,
            "split": self.images.split,
            "images": [len(self.images), *self.images.shape],
            "seed": self.seed,
            "batch-size": self.batch_size,
            "layers": None if self.chosen is None else list(self.chosen),
            "linear": self.linear,
            "sketches": self.sketches,
            "carrier": self.carrier,
            "share": self.share,
            "at": self.at,
            "draws": self.draws,
            "attacks": [str(attack) for attack in self.attacks.values()],
        }

    @cached_property
    def _digest(self) -> str:
        return weights_digest(self.network)

    def examples(self) -> tuple[Tensor, Tensor]:
        """A few images to measure that the network gets right, out of the first batch."""
        images, labels = next(iter(self.measured))
        device, dtype = placement(self.network)
        images, labels = images.to(device, dtype), labels.to(device)
        with frozen(self.network), torch.no_grad():
            right = (self.network(images).argmax(1) == labels).nonzero().flatten()
        if not len(right):  # then it is the experiment that has to say so
            right = torch.arange(1, device=images.device)
        spread = torch.linspace(0, len(right) - 1, min(_SHOWN, len(right))).long()  # images often come class by class
        chosen = right[spread.to(right.device)]
        return images[chosen], labels[chosen]

    @cached_property
    def pair(self) -> Tensor:
        """Two images on the network's device, to learn its shapes from."""
        images, _ = next(iter(self.reference))
        return images[:2].to(*placement(self.network))

    def mapped_layer(self) -> str:
        """The last layer whose maps have a few positions each way; the last of all if none has."""
        for layer in reversed(self.route.layers):
            try:
                maps = evidence(self.network, self.pair, layer, at=self.at).maps
            except UserError:  # no maps there, or none on which the logits depend
                continue
            if min(maps.shape[2:]) >= _SMALLEST_MAP:
                return layer
        return self.route.layers[-1]


def _occurrence(study: Study, progress: Progress) -> tuple[Result, Figures]:
    follows = study.carrier == NOISE  # then there is no route of clean images, and that of the first attack is known
    first, *others = study.attacks
    routes = {first if follows else "clean": study.routes[ROUTE]}
    for name in others if follows else study.attacks:
        attack = study.attacks[name]
        found = sample_routes(
            study.network, study.reference, _WIDTH, attack=None if follows else attack, rivals=(), linear=study.linear,
            noise_of=attack if follows else None, sketches=study.sketches, progress=progress,
        )  # fmt: skip
        routes[name] = found[ROUTE]
    routes |= {by: own for by, own in study.routes.items() if by != ROUTE}
    models = {by: scores.route(study.share) for by, scores in study.rivals.items() if by not in routes}
    result = tabulate_occurrence(routes, models, width=study.share, seeds=range(study.draws))
    return result, {"occurrence": occurrence_figure(result)}


def _sensitivity(study: Study, progress: Progress) -> tuple[Result, Figures]:
    result = compare_responses(
        study.network, study.measured, study.route, study.attacks, study.rivals, share=study.share,
        seeds=range(study.draws), progress=progress,
    )  # fmt: skip
    return result, {"sensitivity": responses_figure(result)}


def _transplant(study: Study, progress: Progress) -> tuple[Result, Figures]:
    result = transplant_accuracy(
        study.network, study.measured, study.route, study.attacks, study.rivals, seeds=range(study.draws),
        share=study.share, at=study.at, progress=progress,
    )  # fmt: skip
    return result, accuracy_figures(result)


def _deactivate(study: Study, progress: Progress) -> tuple[Result, Figures]:
    result = deactivation_accuracy(
        study.network, study.measured, study.route, study.rivals, seeds=range(study.draws), share=study.share,
        at=study.at, progress=progress,
    )  # fmt: skip
    return result, accuracy_figures(result)


def _weaken(study: Study, progress: Progress) -> tuple[AccuracyTable, Figures]:
    result = weakening_accuracy(
        study.network, study.measured, study.route, study.rivals, seeds=range(study.draws), share=study.share,
        targets=study.joined, progress=progress,
    )  # fmt: skip
    return result, accuracy_figures(result)


def _gradcam(study: Study, progress: Progress) -> tuple[Result, Figures]:
    layer = study.mapped_layer()
    result = compare_attention(
        study.network, study.measured, study.route, layer, study.attacks, study.rivals, share=study.share,
        seeds=range(study.draws), at=study.at, progress=progress,
    )  # fmt: skip
    name, attack = next(iter(study.attacks.items()))
    panels = attention_panels(study.network, *study.examples(), study.route, layer, attack, name, at=study.at)
    maps = panels_figure(panels, study.images.classes)
    return result, {"gradcam": maps, "gradcam-measures": attention_figure(result)}


def _detect(study: Study, progress: Progress) -> tuple[Result, Figures]:
    if study.carrier == NOISE:
        study.output.note("note: detect goes by influence, since an image to judge has no clean partner")
    result = detect(
        study.network, study.measured, study.reference, study.attacks, width=_WIDTH, route_width=study.share,
        seeds=range(study.draws), linear=study.linear, sketches=study.sketches, progress=progress,
    )  # fmt: skip
    return result, {"detect": detection_figure(result)}


Experiment = Callable[[Study, Progress], tuple[Result, Figures]]


EXPERIMENTS: dict[str, Experiment] = {
    "occurrence": _occurrence,
    "sensitivity": _sensitivity,
    "transplant": _transplant,
    "deactivate": _deactivate,
    "weaken": _weaken,
    "gradcam": _gradcam,
    "detect": _detect,
}
