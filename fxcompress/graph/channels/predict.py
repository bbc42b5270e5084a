"""What a model will cost once channels are gone, from the labels alone."""

from __future__ import annotations

from typing import Any

import torch

from fxcompress.graph import ops
from fxcompress.graph.channels.analysis import Channels
from fxcompress.graph.channels.kept import Kept
from fxcompress.graph.channels.labels import Value
from fxcompress.graph.cost import macs as node_macs
from fxcompress.graph.cost import tensor_shape

__all__ = ["macs", "parameters"]


def parameters(channels: Channels, kept: Kept) -> int:
    """The number of parameters that stay; a tensor with several names counts once."""
    walk = channels.walk
    total = 0
    for name, parameter in walk.module.named_parameters():
        value = walk.tensors.get(walk.canonical[name])
        total += _size(kept.shape(value)) if value is not None else parameter.numel()
    return total


def macs(channels: Channels, kept: Kept) -> int:
    """The multiply-accumulates of one forward pass with the example inputs."""
    walk = channels.walk

    def shape(call: ops.Call, argument: Any) -> torch.Size:
        value = walk.value(argument)
        return torch.Size(kept.shape(value)) if isinstance(value, Value) else tensor_shape(call, argument)

    return sum(node_macs(node, shape) for node in walk.module.graph.nodes if node.op.startswith("call"))


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
