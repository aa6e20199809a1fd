"""A claim of the paper, what was found here, and a plain verdict by a rule that is stated with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

HOLDS, PART, FAILS = "holds", "holds in part", "does not hold"


@dataclass(frozen=True)
class Claim:
    """One claim on one network.

    Attributes:
        text: What the paper says.
        paper: The paper's figure; empty where it gives none.
        network: On what it was tried.
        found: The figure found here.
        verdict: :data:`HOLDS`, :data:`PART` or :data:`FAILS`.
        equals: Controls that did as well as the route, or better.
    """

    text: str
    paper: str
    network: str
    found: str
    verdict: str
    equals: tuple[str, ...] = ()

    def cells(self) -> list[str]:
        """The claim as a row of a table."""
        return [self.text, self.paper, self.network, self.found, f"**{self.verdict}**", ", ".join(self.equals)]


HEADER = ("claim", "paper", "network", "found", "verdict", "controls that do as well")


def verdict(whole: bool, part: bool) -> str:
    """The verdict of a rule with two thresholds."""
    return HOLDS if whole else PART if part else FAILS


def by_count(good: int, of: int) -> str:
    """The verdict where a claim is about every one of several cases: all, more than half, or fewer."""
    return verdict(good == of, 2 * good > of)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; empty without rows."""
    body = list(rows)
    lines = [header, ["---"] * len(header), *body] if body else []
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def claims_table(claims: Iterable[Claim]) -> str:
    """Claims as a table in Markdown."""
    return markdown(HEADER, (claim.cells() for claim in claims))


def percent(value: float) -> str:
    """A share for a table."""
    return f"{100 * value:.1f}"
