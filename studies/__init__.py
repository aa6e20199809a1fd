"""One-off research with the package, run from a clone: see docs/beyond.md and docs/hardening.md.

``python -m studies.hardening --help`` and ``python -m studies.repair --help``; what follows them is said there.
"""
