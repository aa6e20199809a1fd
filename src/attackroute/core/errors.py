"""Errors whose message is meant for the user, and suggestions for names that were mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


class UserError(ValueError):
    """Bad input, with one line that says what was wrong, where, and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """


def did_you_mean(name: str, names: Iterable[str], prefix: str = "") -> str:
    """``"; did you mean A, B or C?"`` with the nearest names, each after the prefix; nothing where none is near."""
    near = [f"{prefix}{match}" for match in difflib.get_close_matches(name, list(names), n=3, cutoff=0.6)]
    if not near:
        return ""
    *others, last = near
    return f"; did you mean {', '.join(others) + ' or ' if others else ''}{last}?"


def require_known(what: str, name: str, names: Collection[str]) -> None:
    """Raise a `UserError` unless a name is one of those that there are."""
    if name not in names:
        raise UserError(f"unknown {what} {name!r}{did_you_mean(name, names)}; choose from {', '.join(names)}")
