"""The version, in the one place that the build, the package and the files it writes read it from."""

from __future__ import annotations

__version__ = "0.1.0"
