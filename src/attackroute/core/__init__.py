"""What every room stands on: layers of a running model, batches, checks, files, random numbers, tables.

In come users' models and data; out go batches on the model's device, checked values and files that are never half
written. Read `layers.py` first, then `batches.py`.
"""
