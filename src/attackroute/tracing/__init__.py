"""From a model and images to routes: exact in one forward pass, by products, by sketches, or along an attack's noise.

In come a network, batches and a `TraceConfig`; out go `InstanceRoutes`. Read `trace.py` first, then `recorder.py`.
"""
