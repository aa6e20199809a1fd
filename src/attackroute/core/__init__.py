"""What every room stands on: layers of a running model, batches, checks, files, random numbers, tables.

In come users' models and data; out go batches on the model's device, checked values and files that are never half
written. Read `layers.py` first, then `batches.py`.
"""

__version__ = "0.2.0"
"""The version, in the one place that the build, the package and the files it writes read it from."""
