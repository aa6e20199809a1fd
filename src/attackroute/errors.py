"""Errors whose message is meant for the user."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input, with one line that says what was wrong, where, and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """
