"""Fig. 5: does the Grad-CAM of the route's channels sit on the object, and does an attack move it more than others'?

CIFAR-10 has no boxes of objects; its objects fill the middle of the image, so the middle half stands for them.
"""

from __future__ import annotations

from collections.abc import Iterator

from attackroute.analysis.attention import CLEAN, INSIDE, SHIFT
from attackroute.analysis.rankings import OFF_ROUTE, RANDOM, ROUTE
from attackroute.paper.claims import Claim, markdown, percent, verdict
from attackroute.paper.results import Content, Results, distinct, having, mean, rivals, rows

_CHANCE = 0.25


def table(results: Results) -> str:
    """Energy inside the middle half, and shifts under attack."""
    lines = []
    for network, found in having(results, "gradcam"):
        for name in (ROUTE, OFF_ROUTE, RANDOM, *rivals(found)):
            values = [
                mean(found, "mean", images=CLEAN, criterion=name, measure=INSIDE),
                *(
                    mean(found, "mean", images=_pgd(found), criterion=name, measure=measure)
                    for measure in (INSIDE, SHIFT)
                ),
            ]
            cells = ["" if value is None else percent(value) for value in values]
            lines.append([network.name, network.title(found["layer"]), name, *cells])
    return markdown(["network", "layer", "channels", "inside, clean", "inside, PGD", "shift under PGD"], lines)


def claims(results: Results) -> Iterator[Claim]:
    """What the paper reads from it."""
    for network, found in having(results, "gradcam"):
        texts = {
            (CLEAN, INSIDE): "on clean images the route's Grad-CAM is on the object, more than the other channels'",
            (_pgd(found), SHIFT): "an attack moves the route's Grad-CAM more than that of the other channels",
        }
        for (images, measure), text in texts.items():
            ours, theirs = (
                mean(found, "mean", images=images, criterion=name, measure=measure) or 0.0
                for name in (ROUTE, OFF_ROUTE)
            )
            more = _clearly_more(found, images, measure, OFF_ROUTE)
            yield Claim(
                text,
                "yes",
                network.name,
                f"{percent(ours)} %; others {percent(theirs)} %"
                + (f" ({percent(_CHANCE)} % of the area)" if measure == INSIDE else ""),
                verdict(more and (measure != INSIDE or ours > _CHANCE), ours > theirs),
                tuple(name for name in (RANDOM, *rivals(found)) if not _clearly_more(found, images, measure, name)),
            )


def _pgd(found: Content) -> str:
    return str(next(name for name in distinct(found, "images") if name != CLEAN))


def _clearly_more(found: Content, images: str, measure: str, control: str) -> bool:
    """Whether the route has clearly more than every set of a control, by the paired 95 % interval."""
    own = rows(found, images=images, measure=measure, criterion=control)
    return all(row["route_minus_this_low"] > 0 for row in own)
