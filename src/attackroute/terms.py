"""The terms of a long computation: all that must be the same for a broken one to go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attackroute.errors import UserError


def require_same_terms(what: str, stored: object, terms: Mapping[str, Any]) -> None:
    """Compare what a file holds with the terms of this run.

    Args:
        what: What is to go on, and where it is, for the message.
        stored: The terms that were written down, as JSON gives them back.
        terms: Those of this run, as JSON values.

    Raises:
        UserError: One of them differs, and which.
    """
    known = stored if isinstance(stored, dict) else {}
    for name in dict.fromkeys([*terms, *known]):
        if known.get(name) != terms.get(name):
            raise UserError(
                f"{what} has {name} {known.get(name)!r}, not {terms.get(name)!r}; "
                "give the same to resume it, or choose another folder"
            )
