"""Figures of tables, as matplotlib figures that a caller saves: no display, no global state.

In come results; out go figures. One kind of picture a module; read `style.py` first, which all share. Nothing outside
of this folder loads matplotlib.
"""
