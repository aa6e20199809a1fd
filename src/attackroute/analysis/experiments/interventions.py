"""Transplant, inject, hold, deactivate, weaken: accuracy with the route's channels changed (Figs. 3 and 4).

The paper's claim is that "perturbations are mainly propagated via this route". Transplant and inject ask it in both
directions, hold under an attack that knows what is done; docs/definitions.md has the formulas.

Sets of channels grow by rank, each within the next. Random channels are off the given route, so their sets end where
those are used up.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from attackroute.analysis.controls import Comparison, repeated_layers
from attackroute.analysis.experiment import Work, experiment
from attackroute.analysis.figures.accuracy import curves_figure, layers_figure, route_figure
from attackroute.analysis.figures.style import Figure
from attackroute.analysis.intervention_table import CorrectSamples, InterventionTable, Setting, measure
from attackroute.analysis.interventions import deactivate, transplant, weaken
from attackroute.analysis.study import Study
from attackroute.core.errors import UserError
from attackroute.robustness.attack import Attack
from attackroute.robustness.registry import named_attacks
from attackroute.routes.route import Route
from attackroute.tracing.connections import Connections
from attackroute.tracing.trace import Progress

TRANSPLANTED = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
DEACTIVATED = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
BETAS = (1.0, 0.75, 0.5, 0.25, 0.0)
MAIN_BETA = 0.5  # of which the reading speaks


class Transplantation(InterventionTable):
    """Accuracies on attacked images with clean values in some channels."""

    kind = "transplant"
    helps: ClassVar[bool] = True
    done: ClassVar[str] = "transplanted"

    opening = (
        "Transplanting {0.main_share:.0%} of one layer's clean channels at its {0.at} (accuracy without: {0.without}); "
        "in clear effect, by {0.cases}:"
    )

    def figures(self) -> dict[str, Figure]:
        """``transplant-shares`` (Fig. 3a) and ``transplant-layers`` (Fig. 3b)."""
        return {"transplant-shares": curves_figure(self, self.attacks[0]), "transplant-layers": layers_figure(self)}


class Injection(InterventionTable):
    """Accuracies on clean images with attacked values in some channels; untouched, those on the attacked images.

    It is the other direction of a transplant: if the attack is carried by the route, accuracy falls, and falls less
    with as many other channels.
    """

    kind = "inject"
    injects: ClassVar[bool] = True
    done: ClassVar[str] = "injected into clean images"

    opening = (
        "Injecting {0.main_share:.0%} of one layer's attacked channels at its {0.at} into clean images (accuracy on "
        "the attacked images: {0.without}); in clear effect, by {0.cases}:"
    )

    def figures(self) -> dict[str, Figure]:
        """``inject-layers`` and ``inject-shares``, as for transplants."""
        return {"inject-layers": layers_figure(self), "inject-shares": curves_figure(self, self.attacks[0])}


class Holding(InterventionTable):
    """Accuracies with clean values held in some channels, each time under attacks on the network that is held so.

    Gradients flow around the held channels alone. This is an oracle that needs the clean image, not a defence: an upper
    bound of what restoring these channels could save, which a stronger attack may lower. Held channels also tell of the
    clean class (all of a layer give the clean answer on a chain), so that only the difference to controls of the same
    size speaks for a route. Attacks that run only some of the images at a time are made image by image, which takes as
    many times longer.
    """

    kind = "hold"
    helps: ClassVar[bool] = True
    adapts: ClassVar[bool] = True
    done: ClassVar[str] = "held clean, attacked through the held network"

    opening = (
        "Holding {0.main_share:.0%} of one layer's channels clean at its {0.at} while the network is attacked "
        "(accuracy without: {0.without}); in clear effect, by {0.cases}:"
    )

    def figures(self) -> dict[str, Figure]:
        """``hold``: single layers, and several together."""
        return {"hold": layers_figure(self)}


@dataclass(frozen=True, kw_only=True)
class Deactivation(InterventionTable):
    """Accuracies with channels set to zero."""

    kind = "deactivate"
    done: ClassVar[str] = "set to zero"
    route: Route | None = None  # with its frequencies, to draw beside what its deactivation costs
    title: str = ""  # of that picture

    opening = "Setting {0.main_share:.0%} of one layer's channels to zero at its {0.at}; in clear effect, by {0.cases}:"

    def figures(self) -> dict[str, Figure]:
        """``deactivate`` (Fig. 4a), and with a route also ``deactivate-route``."""
        picture = {} if self.route is None else {"deactivate-route": route_figure(self.route, self, self.title)}
        return {"deactivate": curves_figure(self), **picture}


class Weakening(InterventionTable):
    """Accuracies with the connections between channels scaled down."""

    kind = "weaken"

    opening = (
        "Weakening the connections between {0.main_share:.0%} of all layers' channels{0.cases} to {0.main_beta:g}; "
        "in clear effect:"
    )

    def figures(self) -> dict[str, Figure]:
        """``weaken`` (Fig. 4b)."""
        return {"weaken": curves_figure(self)}


@experiment("transplant", order=3, title="Transplant: clean values in attacked images' channels", work=Work(1, 6))
def run_transplant(study: Study, progress: Progress) -> InterventionTable:
    """Accuracy on attacked images with clean values in some channels (Fig. 3)."""
    return transplant_accuracy(study.comparison(progress), study.named_attacks)


@experiment("inject", order=4, title="Injection: attacked values in clean images' channels", work=Work(1, 6))
def run_inject(study: Study, progress: Progress) -> InterventionTable:
    """Accuracy on clean images with attacked values in some channels."""
    return transplant_accuracy(study.comparison(progress), study.named_attacks, result=Injection)


@experiment("hold", order=5, title="Held features: clean values, and an attack around them", work=Work(1, held=1))
def run_hold(study: Study, progress: Progress) -> InterventionTable:
    """Accuracy with clean values held in some channels, under attacks that know."""
    return transplant_accuracy(study.comparison(progress), study.named_attacks, result=Holding, shares=())


@experiment("deactivate", order=6, title="Deactivation: channels set to zero", work=Work(passes=6))
def run_deactivate(study: Study, progress: Progress) -> InterventionTable:
    """Accuracy with channels set to zero (Fig. 4a)."""
    model, images = study.settings.get("model", type(study.model).__name__), len(study.halves[0])
    title = f"The critical attacking route of {model} on {images} images"
    return replace(deactivate_accuracy(study.comparison(progress)), route=study.route, title=title)


@experiment("weaken", order=7, title="Weakening the connections along the route", work=Work(passes=1))
def run_weaken(study: Study, progress: Progress) -> InterventionTable:
    """Accuracy with the connections between channels scaled down (Fig. 4b)."""
    return weaken_accuracy(study.comparison(progress), study.pair, note=study.note)


def transplant_accuracy(
    compared: Comparison,
    attacks: Mapping[str, Attack | str],
    *,
    result: type[InterventionTable] = Transplantation,
    layers: Iterable[str] | None = None,
    shares: Sequence[float] = TRANSPLANTED,
    together: Iterable[Sequence[str]] | None = None,
) -> InterventionTable:
    """Accuracy where some channels have the values of another pass: the route's, and controls of the same size.

    The ``result`` says which pass: a :class:`Transplantation`, an :class:`Injection` or a :class:`Holding`. Every layer
    alone at a growing share (Fig. 3a), and single layers and several together at one share (Fig. 3b), that of
    ``compared``, at which all attacks are tried; ``shares`` grow for the first. Changed alone are ``layers``, or all
    of the route's; together the groups in ``together``, or the first two, three, ... half, and all of ``layers``.
    """
    named = named_attacks(attacks)
    share, route = compared.share, compared.route
    single = tuple(route if layers is None else route.restrict(layers))
    groups = leading_groups(single, repeated_layers(compared.model, route))
    if together is not None:
        groups = [tuple(route.restrict(group)) for group in together]
    first, *_ = named
    settings = []
    for attack in named:
        used = sorted({*shares, share}) if attack == first else [share]
        settings += [Setting((layer,), level, attack) for layer in single for level in used]
        settings += [Setting(group, share, attack) for group in groups]

    def graft(channels: Route, _: float | None, recorded: CorrectSamples) -> AbstractContextManager[None]:
        return transplant(compared.model, recorded.outputs, channels, at=compared.at)

    rankings = compared.rankings({*single, *(layer for group in groups for layer in group)})
    return measure(result, compared, rankings, settings, graft, attacks=named, record=tuple(rankings[0].channels))


def leading_groups(layers: Sequence[str], repeats: Container[str] = ()) -> list[tuple[str, ...]]:
    """The first two, the first three, the first half, and all of the layers; each once.

    Depthwise layers, which repeat the choice before them, come along and are not counted.
    """
    starts = [at for at, layer in enumerate(layers) if layer not in repeats]
    ends = [*starts[1:], len(layers)]
    sizes = sorted({2, 3, len(ends) // 2, len(ends)})
    return [tuple(layers[: ends[size - 1]]) for size in sizes if 2 <= size <= len(ends)]


def deactivate_accuracy(
    compared: Comparison,
    *,
    layers: Iterable[str] | None = None,
    shares: Sequence[float] = DEACTIVATED,
    together: Iterable[Sequence[str]] | None = None,
) -> Deactivation:
    """Accuracy on clean images with channels set to zero: a growing share of each layer alone, and of several together.

    The reading is about the share of ``compared``. Changed alone are ``layers``, or all of the route's; together the
    groups in ``together``, or all of ``layers``.
    """
    route = compared.route
    levels = sorted({*shares, compared.share})
    single = tuple(route if layers is None else route.restrict(layers))
    whole = [single] if together is None else [tuple(route.restrict(group)) for group in together]
    groups = list(dict.fromkeys([*((layer,) for layer in single), *whole]))

    def silence(channels: Route, _: float | None, __: CorrectSamples) -> AbstractContextManager[None]:
        return deactivate(compared.model, channels, at=compared.at)

    rankings = compared.rankings({layer for group in groups for layer in group})
    settings = [Setting(group, level) for group in groups for level in levels]
    return measure(Deactivation, compared, rankings, settings, silence)


def weaken_accuracy(
    compared: Comparison, images: Tensor, *, note: Callable[[str], None] = lambda text: None
) -> Weakening:
    """Accuracy on clean images with the connections between chosen channels of adjacent layers multiplied by a factor.

    All layers are changed together, with a falling factor. Weakened are the kernels of those layers before which, as a
    few ``images`` show, channels stay apart; if these are not all, a ``note`` says how many others there are.
    """
    model, route = compared.model, compared.route
    connections = Connections.of_route(model, images, route)
    joined, mixed = connections.joined(route), connections.mixed(route)
    if not joined:
        raise UserError(
            "no kernel slice joins channels of two layers of the route: what stands between them mixes channels or "
            "positions; leave weaken out (--only)"
        )
    if mixed:
        note(
            f"note: weaken leaves {len(mixed)} of {len(route)} layers as they are, since what stands before "
            f"them mixes channels or positions: {', '.join(mixed[:3])}{', ...' * (len(mixed) > 3)}"
        )
    targets = joined if mixed else None

    def intervene(channels: Route, beta: float | None, _: CorrectSamples) -> AbstractContextManager[object]:
        assert beta is not None
        return weaken(model, channels, beta, targets, connections=connections)

    settings = [Setting(route.layers, compared.share, None, beta) for beta in BETAS]
    result = measure(Weakening, compared, compared.rankings(), settings, intervene)
    return replace(result, main_beta=MAIN_BETA, at="weights", targets=targets)
