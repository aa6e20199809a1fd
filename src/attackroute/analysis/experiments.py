"""The experiments of the paper's section 4 and detection, a file each, which `analysis/experiment.py` finds by itself.

In comes a `Study`; out go results with a table, a sentence and figures. Read `occurrence.py` first.
"""
