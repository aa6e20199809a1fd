"""Figures, as matplotlib figures that a caller saves: no display, no global state. One kind of picture a module."""

from __future__ import annotations

from attackroute.analysis.figures.style import save_figure

__all__ = ["save_figure"]
