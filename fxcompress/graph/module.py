"""The graph module that tracing makes: an ``fx.GraphModule`` that pickles with its metadata and stage."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx

__all__ = ["TracedModule", "shared_copy"]


class TracedModule(fx.GraphModule):
    """What :func:`fxcompress.trace` and every pass return.

    ``meta["stage"]``  float, observed, qdq or lowered
    ``meta["rungs"]``  parts that symbolic tracing could not take, and why
    """

    def __reduce__(self) -> Any:
        """Pickle as a saved model: graph as data, tensors, no generated code; islands pickle as fx does it."""
        from fxcompress import artifact

        return artifact.reduced(self) or super().__reduce__()


def shared_copy(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph whose tensors are the originals: replacing one does not touch the other."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
