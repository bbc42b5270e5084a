"""Compensation: what removed channels gave their readers on average becomes part of the readers' biases."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxcompress.data import split_batch
from fxcompress.graph import edit, ops
from fxcompress.graph.channels import Channels
from fxcompress.graph.channels.kept import Kept, select
from fxcompress.graph.channels.labels import Value
from fxcompress.graph.recorder import Recorder
from fxcompress.pass_base import Context

__all__ = ["compensation", "fold"]

BATCHES = 16
"""At most this many batches of data are averaged."""


def compensation(channels: Channels, removed: np.ndarray, context: Context) -> dict[fx.Node, Tensor]:
    """Reader → what the removed channels add to each of its outputs, mean over data (the example inputs without data).

    Readers are linear layers and ungrouped convolutions. Exact where the removed channels are constant, except at the border
    of a padded convolution.
    """
    kept = Kept.without(channels.root, removed)
    readers = {node: mask for node in channels.walk.module.graph.nodes if (mask := _lost(channels, kept, node)) is not None}
    means = _means(channels, readers, context)
    folded = {}
    for node, mask in readers.items():
        call = _read(node)
        weight = channels.walk.parameter(call["weight"].name).detach()
        columns = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
        lost = torch.from_numpy(~mask)
        folded[node] = (columns[:, lost].to(torch.float64) @ means[node][lost]).to(weight.dtype)
    return folded


def _read(node: fx.Node) -> ops.Call:
    call = ops.read(node)
    assert call is not None
    return call


def _lost(channels: Channels, kept: Kept, node: fx.Node) -> Any:
    """Which inputs a reader keeps, or None where it loses none or is no plain reader."""
    call = ops.read(node) if node.op.startswith("call") else None
    if call is None or call.kind not in ("linear", "conv1d", "conv2d", "conv3d") or not isinstance(call["weight"], ops.Attr):
        return None
    if not isinstance(call["input"], fx.Node):
        return None
    if call.kind != "linear" and call["groups"] != 1:
        return None
    value = channels.walk.value(call["weight"])
    mask = kept.masks(value).get(1) if isinstance(value, Value) else None
    return mask.reshape(-1) if mask is not None and mask.size == mask.shape[1] else None


def _means(channels: Channels, readers: dict[fx.Node, Any], context: Context) -> dict[fx.Node, Tensor]:
    module, example = channels.walk.module, context.example()
    calls = [example] if example is not None else []
    if context.data is not None and not context.region:
        calls = [split_batch(batch, module)[0] for batch, _ in zip(context.data, range(BATCHES), strict=False)]
    totals: dict[fx.Node, Tensor] = {}
    for call in calls:
        run = _Means(module, set(readers))
        run.record(call)
        for node, mean in run.means.items():
            totals[node] = totals.get(node, torch.zeros_like(mean)) + mean / len(calls)
    return totals


class _Means(Recorder):
    """The mean of every channel that a reader reads."""

    def __init__(self, module: fx.GraphModule, readers: set[fx.Node]) -> None:
        super().__init__(module)
        self.readers, self.means = readers, dict[fx.Node, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        if n in self.readers:
            call = _read(n)
            x = self.env[call["input"]]
            channel = x.dim() - 1 if call.kind == "linear" else 1
            self.means[n] = x.movedim(channel, 0).reshape(x.shape[channel], -1).to(torch.float64).mean(1)
        return super().run_node(n)


def fold(channels: Channels, removed: np.ndarray, folded: dict[fx.Node, Tensor]) -> None:
    """Add the compensation to the biases of a graph that has been cut."""
    kept = Kept.without(channels.root, removed)
    for node, addition in folded.items():
        call = _read(node)
        value = channels.walk.tensors[channels.walk.canonical.get(call["weight"].name, call["weight"].name)]
        mask = kept.masks(value).get(0)
        own = select(addition, {0: mask.reshape(-1)}) if mask is not None else addition
        bias = edit.get_tensor(channels.walk.module, call["bias"].name).detach() if call["bias"] is not None else 0.0
        edit.set_bias(channels.walk.module, call, own + bias)
