"""The graph module that tracing makes: an ``fx.GraphModule`` that pickles with its metadata and stage."""

from __future__ import annotations

from typing import Any

from torch import fx

__all__ = ["TracedModule"]


class TracedModule(fx.GraphModule):
    """What :func:`fxcompress.trace` and every pass return.

    ``meta["stage"]``  float, observed, qdq or lowered
    ``meta["rungs"]``  parts that symbolic tracing could not take, and why
    """

    def __reduce__(self) -> Any:
        """Pickle as a saved model: graph as data, tensors, no generated code; islands pickle as fx does it."""
        from fxcompress import artifact

        return artifact.reduced(self) or super().__reduce__()
