"""The measured latency of a model without some channels."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import replace

import numpy as np
import torch

from fxcompress.graph.channels import Channels
from fxcompress.graph.channels.cut import cut
from fxcompress.graph.inputs import Arguments

__all__ = ["latency"]

REPEATS = 7


def latency(channels: Channels, removed: np.ndarray, call: Arguments) -> float:
    """Median seconds of a forward pass of a copy that has lost the classes ``removed``."""
    module = copy.deepcopy(channels.walk.module)
    cut(replace(channels, walk=channels.walk.on(module)), removed)
    module.recompile()
    module.eval()
    seconds = []
    with torch.no_grad():
        call(module)
        for _ in range(REPEATS):
            started = time.perf_counter()
            call(module)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
