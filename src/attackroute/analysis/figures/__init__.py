"""Figures of tables, as matplotlib figures that a caller saves: no display, no global state.

In come results; out go figures. Here is what several experiments draw; what one draws stands in its own file. Read
`style.py` first, which all share. matplotlib is loaded when a figure is drawn.
"""
