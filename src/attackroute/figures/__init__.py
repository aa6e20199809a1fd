"""Figures, as matplotlib figures that a caller saves: no display, no global state. One kind of picture a module."""

from attackroute.figures.style import save_figure

__all__ = ["save_figure"]
