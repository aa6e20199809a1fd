"""Which criterion finds the channels whose clean values repair most? ``python -m studies.repair``; docs/beyond.md.

:mod:`studies.repair.study` ranks, picks and judges; it stands on the criteria, the true effects and the transplants.
"""
