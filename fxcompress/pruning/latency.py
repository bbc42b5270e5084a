"""The measured latency of a model without some channels."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np

from fxcompress.graph.channels import Channels
from fxcompress.graph.channels.cut import cut
from fxcompress.graph.inputs import Arguments
from fxcompress.timing import interleaved

__all__ = ["latency"]

REPEATS = 7


def latency(channels: Channels, removed: np.ndarray, call: Arguments) -> float:
    """Median seconds of a forward pass of a copy that has lost the classes ``removed``."""
    module = copy.deepcopy(channels.walk.module)
    cut(replace(channels, walk=channels.walk.on(module)), removed)
    module.recompile()
    module.eval()
    return interleaved({"pruned": lambda: call(module)}, runs=REPEATS, warmup=1)["pruned"].median
