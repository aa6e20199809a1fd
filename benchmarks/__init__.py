"""What traces, attacks and hardening cost, in time and memory, against other ways of doing the same.

``python -m benchmarks --help`` from a clone; :mod:`benchmarks.run` is where to begin reading.
"""
