"""One rule for each ATen operation that acts per channel: how it changes what a tensor owes to the route layers.

A rule runs the operation and says what flow its output has. An operation without a rule, or one used in a way that
its rule does not cover, makes every source that reaches it opaque, so that nothing passes in silence.
"""

from __future__ import annotations

from attackroute.tracing.rules import layout, pointwise, pooling

__all__ = ["layout", "pointwise", "pooling"]
