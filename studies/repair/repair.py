"""Which criterion repairs most per channel replaced: clean values in growing shares of each layer, and of all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attackroute.analysis.controls import Ranking
from attackroute.analysis.interventions import record_outputs, transplant
from attackroute.core.errors import UserError
from attackroute.core.journal import Journal
from attackroute.core.model_state import frozen
from attackroute.routes.masks import top_k
from attackroute.routes.route import Route
from studies.repair.criteria import (
    ATTRIBUTION,
    EQUAL_COMPUTE,
    INFLUENCE,
    INFLUENCE_ATTACKED,
    INFLUENCE_STD,
    NOISE_GRADIENT,
    NOISE_MEAN,
    NOISE_ROUTE,
    NOISE_SIGNED,
    PATH,
    RANDOM,
    SENSITIVITY,
    VARIANTS,
    Layers,
    Pairs,
)

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
"""Of one layer's channels; 0 and 1 are the same for all criteria, and measured once."""
BUDGETS = (0.01, 0.02, 0.05, 0.1)
"""Of all channels: the same share of every layer, or the best ones wherever they are."""
CRITERIA = (
    INFLUENCE, INFLUENCE_ATTACKED, INFLUENCE_STD, NOISE_ROUTE, NOISE_MEAN, NOISE_SIGNED, NOISE_GRADIENT, ATTRIBUTION,
    EQUAL_COMPUTE, PATH, SENSITIVITY, RANDOM,
)  # fmt: skip
RULE = (
    "of the variants of the noise route, the one with the largest area under the curve of accuracy over the share of a "
    "layer replaced, averaged over layers and networks, under the first attack, on images that neither rank nor judge; "
    "within 0.1 points the plainer one"
)

PATH_RULE = (
    "path beats a criterion on a network if the paired 95 % interval over images of the difference of their mean areas "
    "is above 0, and loses to it if it is below; on an architecture if it does so on every network. It is worth its "
    "price only where it beats attribution of equal compute"
)

EVERY, ANY = "every layer", "any layer"
"""Where the channels of a budget are."""

_CLOSE = 0.001
_ROWS = 256

Values = np.ndarray[Any, np.dtype[np.float64]]
"""One for each image, float64."""

Curves = dict[str, dict[str, Values]]
"""By criterion and layer, whether each image is right at each share: ``(shares, N)``."""


@dataclass(frozen=True, eq=False)
class Repaired:
    """What criteria repair under one attack.

    Attributes:
        untouched: Whether each image is right under attack, ``(N,)``.
        whole: By layer, the same with all of its channels replaced.
        curves: By criterion and layer, ``(shares, N)``.
        budgets: By criterion, ``(budgets, N)``, the same share of every layer replaced, all together.
        pooled: By criterion, ``(budgets, N)``, the best channels replaced, whatever their layers.
    """

    untouched: Values
    whole: Mapping[str, Values]
    curves: Curves
    budgets: dict[str, Values] = field(default_factory=dict)
    pooled: dict[str, Values] = field(default_factory=dict)

    def area(self, criterion: str, layer: str) -> Values:
        """Area under each image's curve over the share of a layer, in [0, 1]: ``(N,)``."""
        heights = np.stack([self.untouched, *self.curves[criterion][layer], self.whole[layer]])
        widths = np.diff((0.0, *SHARES, 1.0))
        return np.asarray(widths @ (heights[1:] + heights[:-1]) / 2)

    def areas(self, criterion: str) -> Values:
        """The mean of the areas over layers, ``(N,)``."""
        return np.asarray(np.mean([self.area(criterion, layer) for layer in self.whole], axis=0))

    def records(self, attack: str) -> list[dict[str, Any]]:
        """A tidy table."""
        rows: list[dict[str, Any]] = []
        for criterion, layers in self.curves.items():
            for layer, curve in layers.items():
                rows += [
                    _row(attack, criterion, layer, share, right) for share, right in zip(SHARES, curve, strict=True)
                ]
                rows.append(_row(attack, criterion, layer, None, self.area(criterion, layer)))
        for place, budgets in {EVERY: self.budgets, ANY: self.pooled}.items():
            for criterion, accuracies in budgets.items():
                parts = zip(BUDGETS, accuracies, strict=True)
                rows += [_row(attack, criterion, place, share, right) for share, right in parts]
        return rows


def _row(attack: str, criterion: str, layer: str, share: float | None, values: Any) -> dict[str, Any]:
    return {
        "attack": attack, "criterion": criterion, "layer": layer, "share": share,
        "measure": "area" if share is None else "accuracy", "value": float(np.mean(values)), "images": len(values),
    }  # fmt: skip


def chosen_variant(networks: Sequence[Repaired]) -> str:
    """What :data:`RULE` says of some networks."""
    variants = [name for name in VARIANTS if all(name in each.curves for each in networks)]
    areas = {name: float(np.mean([each.areas(name).mean() for each in networks])) for name in variants}
    best = max(areas.values())
    return next(name for name, area in areas.items() if area >= best - _CLOSE)


class Repair:
    """Transplants into some images under attack, each of which is written down.

    Args:
        model: The network.
        pairs: The images; those that the network gets wrong when clean are left out.
        journal: Where the measurements are kept.
        key: What they are of, such as the name of an attack.
        advance: Called after every transplant of all images.

    Raises:
        UserError: The network gets no image right.
    """

    def __init__(
        self,
        model: nn.Module,
        pairs: Pairs,
        journal: Journal,
        key: tuple[str, ...],
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._journal, self._key, self._advance = model, journal, key, advance
        with frozen(model), torch.no_grad():
            right = torch.cat([model(part.clean).argmax(1) == part.labels for part in pairs.parts()])
        index = right.nonzero().flatten()
        if not len(index):
            raise UserError(
                f"the network gets none of {len(right)} images right when they are clean, so that nothing can be "
                "repaired: check its weights and its labels, or give more --samples"
            )
        self.pairs = Pairs(pairs.clean[index], pairs.attacked[index], pairs.labels[index])
        self._layers: Sequence[str] = ()
        self._outputs: list[dict[str, Tensor]] = []

    def under(self, key: tuple[str, ...]) -> Repair:
        """Transplants into the same images, written down as something else; what layers give is kept once for both."""
        other = copy.copy(self)
        other._key = key
        return other

    def measure(
        self,
        scores: Mapping[str, Layers],
        *,
        alone: bool = True,
        together: bool = True,
        pooled: Mapping[str, Layers] | None = None,
    ) -> Repaired:
        """Replace shares of each layer, and of all of them together, by each criterion.

        Args:
            scores: By criterion, every layer's scores.
            alone: Whether to measure every layer alone.
            together: Whether to measure all layers together.
            pooled: Scores that compare channels of all layers, where they are not those in ``scores``; also of
                criteria that are measured in no other way.
        """
        rankings = {name: Ranking.of_scores(values, name) for name, values in scores.items()}
        self._layers = layers = list(next(iter(scores.values())))
        some = next(iter(rankings.values()))
        untouched = self._right("untouched", "", 0, None)
        whole = {layer: self._right("whole", layer, 1, some.route(1, [layer])) for layer in layers} if alone else {}
        curves: Curves = {
            name: {
                layer: np.stack([self._right(name, layer, share, ranking.route(share, [layer])) for share in SHARES])
                for layer in whole
            }
            for name, ranking in rankings.items()
        }
        repaired = Repaired(untouched, whole, curves)
        for name, ranking in rankings.items() if together else ():
            routes = [ranking.route(share, layers) for share in BUDGETS]
            repaired.budgets[name] = self._budgets(name, EVERY, routes)
        for name, best in {**scores, **(pooled or {})}.items() if together else ():
            repaired.pooled[name] = self._budgets(name, ANY, [best_of_all(best, share) for share in BUDGETS])
        return repaired

    def _budgets(self, name: str, place: str, routes: Sequence[Route | None]) -> Values:
        pairs = zip(BUDGETS, routes, strict=True)
        return np.stack([self._right(name, place, share, route) for share, route in pairs])

    def _right(self, name: str, place: str, share: float, route: Route | None) -> Values:
        """Whether each image is right with a route's channels replaced."""
        key = (*self._key, name, place, f"{share:g}")
        record = self._journal.recall(key, "")
        if record is None:
            bits = torch.cat(list(self._passes(route))).cpu().numpy()
            record = self._journal.keep(key, "", right=np.packbits(bits).tobytes().hex(), images=len(bits))
        self._advance()
        packed = np.frombuffer(bytes.fromhex(record["right"]), dtype=np.uint8)
        return np.unpackbits(packed, count=record["images"]).astype(np.float64)

    def _passes(self, route: Route | None) -> Iterator[Tensor]:
        with frozen(self._model), torch.no_grad():
            for batch, outputs in self._recorded():
                with nullcontext() if route is None else transplant(self._model, outputs, route):
                    yield self._model(batch.attacked).argmax(1) == batch.labels

    def _recorded(self) -> Iterator[tuple[Pairs, Mapping[str, Tensor]]]:
        """Batches, and what the layers give for their clean images."""
        batches = self.pairs.parts(_ROWS)
        if not self._outputs:
            self._outputs += [record_outputs(self._model, batch.clean, self._layers) for batch in batches]
        return zip(batches, self._outputs, strict=True)


def best_of_all(scores: Layers, share: float) -> Route:
    """The best share of all channels, whatever their layers; ties go to the earlier layer and the lower index."""
    chosen = top_k(torch.cat([values.double().cpu() for values in scores.values()]), share)
    masks = dict(zip(scores, chosen.split([len(values) for values in scores.values()]), strict=True))
    return Route.from_masks({layer: mask for layer, mask in masks.items() if mask.any()})
