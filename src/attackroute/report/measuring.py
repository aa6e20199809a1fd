"""What a page needs beyond the files of a run: measurements of channels, and traces that are not there yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from attackroute.analysis.channel_measurements import gradient, sensitivity
from attackroute.core.batches import Data, batches
from attackroute.core.errors import UserError
from attackroute.core.model_state import frozen
from attackroute.report.pictures import Pictures, take_pictures
from attackroute.robustness.application import Attack, attack_name, attacked
from attackroute.robustness.attack_order import brief, by_radius
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.layer_map import require_same
from attackroute.routes.route import Route
from attackroute.tracing.influence import MeanInfluence, mean_influence
from attackroute.tracing.trace import trace_routes

Progress = Callable[[int, "int | None"], None]

_BATCH = 128


@dataclass(frozen=True)
class Condition:
    """What is known of a network on one kind of images: as they are, or after one attack.

    Attributes:
        attack: The attack's name; None for images as they are.
        routes: Routes of samples; None where there are none.
        route: The model's route as a file has it; its frequencies serve where there are no samples' routes.
        rows: Which of the routes' samples are those that the page shows; None where that is not known.
        influence: Mean influence; None without the network.
        gradient: Mean loss gradient at each channel, by layer (Fig. 2b).
        sensitivity: What the attack changes of each channel, by layer (Fig. 2a); None for images as they are.
        traced: Whether the routes were traced for the page.
    """

    attack: str | None
    routes: InstanceRoutes | None = None
    route: Route | None = None
    rows: Sequence[int] | None = None
    influence: MeanInfluence | None = None
    gradient: Mapping[str, Tensor] | None = None
    sensitivity: Mapping[str, Tensor] | None = None
    traced: bool = False

    @property
    def name(self) -> str:
        """What the images are, in short."""
        return "clean images" if self.attack is None else f"images after {brief(self.attack)}"

    @property
    def is_empty(self) -> bool:
        """Whether nothing is known that could be drawn."""
        return self.routes is None and self.route is None

    @property
    def channels(self) -> Mapping[str, int]:
        """Channels of each layer, in forward order; empty where nothing is known."""
        found = self.routes if self.routes is not None else self.route
        return {} if found is None else found.channels


@dataclass(frozen=True)
class Measured:
    """A network on images as they are, and after attacks.

    Attributes:
        clean: On images as they are.
        attacked: After each attack, those of one kind by rising radius.
        pictures: The images that the page shows, and where in them each channel responds most.
    """

    clean: Condition
    attacked: tuple[Condition, ...] = ()
    pictures: Pictures | None = None

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """All of them, clean images first."""
        return (self.clean, *self.attacked)

    @property
    def strongest(self) -> Condition | None:
        """After the last attack; None without any."""
        return self.attacked[-1] if self.attacked else None


def unmeasured(
    clean: InstanceRoutes | None, attacked: Sequence[InstanceRoutes] = (), route: Route | None = None
) -> Measured:
    """What the files of a run say without its network."""
    found = tuple(Condition(routes.provenance.attack, routes) for routes in attacked)
    return Measured(Condition(None, clean, route), found)


def same_samples(ours: InstanceRoutes | None, theirs: InstanceRoutes | None) -> bool:
    """Whether row i of both is the same image, as far as can be told: as many, and their labels agree."""
    if ours is None or theirs is None or len(ours) != len(theirs):
        return False
    mine, other = ours.provenance, theirs.provenance
    labels = ours.labels is not None and theirs.labels is not None and torch.equal(ours.labels, theirs.labels)
    return labels and (mine.data, mine.seed) == (other.data, other.seed)


def measure(
    model: nn.Module,
    data: Data,
    known: Measured,
    attacks: Mapping[str, Attack],
    *,
    rows: Sequence[int] | None = None,
    linear: bool = False,
    width: float = 0.2,
    shown: int = 0,
    progress: Progress | None = None,
) -> Measured:
    """Influence, gradients and sensitivities on clean and on attacked images, and the traces that the run lacks.

    Args:
        model: The network of the run.
        data: A few images with labels; their attacked twins are held in memory, for one attack at a time.
        known: What the run's files say.
        attacks: What to do to the images, by name; those that the run has traced bear the same name there.
        rows: Which samples of the run's traces the images are, where they are some of them.
        linear: Whether linear maps are route layers too.
        width: Share of each layer's channels on a sample's route, for new traces.
        shown: The first so many images become pictures in the page.
        progress: Called with the batches' samples that are done, for each of the passes.

    Raises:
        UserError: The model has other layers than the run's routes, or cannot be traced.
    """
    influence = mean_influence(model, data, linear=linear, progress=progress)
    for condition in known.conditions:
        for part in (condition.routes, condition.route):
            if part is not None:
                require_same(part.channels, influence.channels, "the model")
    trace = partial(trace_routes, model, width=width, linear=linear, progress=progress)
    here = known.clean.routes is not None
    clean = replace(
        known.clean,
        routes=known.clean.routes if here else trace(data),
        rows=rows if here else range(influence.samples),
        influence=influence,
        gradient=gradient(model, data, linear=linear, progress=progress),
        traced=not here,
    )
    traced = {found.routes.provenance.attack: found for found in known.attacked if found.routes is not None}
    conditions = []
    for name, attack in attacks.items():
        images = _attacked_batches(model, data, attack)
        found = traced.pop(name, None)
        routes = None if found is None else found.routes
        if routes is None:
            routes = trace(images)
            routes = replace(routes, provenance=replace(routes.provenance, attack=attack_name(attack)))
        conditions.append(
            Condition(
                name,
                routes,
                rows=range(influence.samples)
                if found is None
                else rows
                if same_samples(clean.routes, routes)
                else None,
                influence=mean_influence(model, images, linear=linear, progress=progress),
                gradient=gradient(model, images, linear=linear, progress=progress),
                sensitivity=sensitivity(model, _images(data), _images(images), linear=linear, progress=progress),
                traced=found is None,
            )
        )
    pictures = take_pictures(model, data, shown, linear=linear) if shown else None
    together = sorted([*traced.values(), *conditions], key=lambda item: by_radius(item.attack or ""))
    return Measured(clean, tuple(together), pictures)


def _images(data: Data) -> Data:
    """Tensors without their labels, as pairs of images take them; batches keep theirs, which do not matter."""
    return data[0] if isinstance(data, tuple) else data


def _attacked_batches(model: nn.Module, data: Data, attack: Attack) -> list[tuple[Tensor, Tensor]]:
    with frozen(model):
        found = [attacked(model, attack, images, labels) for images, labels in batches(model, data, _BATCH)]
    if not found:
        raise UserError("the data hold no sample: the loader is empty")
    return found
