"""Paired comparison of two treatments of the same samples: the exact sign test."""

from __future__ import annotations

import math
from functools import lru_cache

CLEAR = 0.05
"""Below this probability a difference is called clear; nothing is corrected for the number of comparisons."""


@lru_cache(maxsize=100_000)
def sign_test(wins: int, losses: int) -> float:
    """Two-sided probability of a split at least as uneven, if each discordant sample were a fair coin (McNemar, exact).

    Args:
        wins: Samples that only the one treatment gets right.
        losses: Samples that only the other gets right.
    """
    total, fewer = wins + losses, min(wins, losses)
    logs = (
        math.lgamma(total + 1) - math.lgamma(count + 1) - math.lgamma(total - count + 1) - total * math.log(2)
        for count in range(fewer + 1)
    )
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))
