"""The paper's tables, figures, settings and numbers, with a verdict for each claim."""

from __future__ import annotations
