"""Convolutions with as many groups as the batch has samples, as products: ONNX has no groups that follow the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from fxcompress.errors import BackendError
from fxcompress.graph import ops
from fxcompress.graph.shapes import shape_of

__all__ = ["counts_samples", "open_groups"]


def counts_samples(node: fx.Node) -> bool:
    """Whether a node is a convolution whose groups the graph computes."""
    call = ops.read(node) if node.op == "call_function" else None
    return call is not None and call.op.family == "contraction" and isinstance(call["groups"], fx.Node)


def open_groups(graph: fx.Graph, node: fx.Node, values: dict[fx.Node, Any]) -> fx.Node:
    """Write ``node`` into ``graph``: each group's patches times its weight. Raises BackendError for any other form.

    The groups lie side by side in a batch of one, as samples with a weight each do; the image has the example's size.
    """
    call = ops.read(node)
    assert call is not None
    value, weight, bias = call["input"], call["weight"], call["bias"]
    given, kernel, result = (shape_of(n) if isinstance(n, fx.Node) else None for n in (value, weight, node))
    odd = call.kind != "conv2d" or call["activation"] or isinstance(call["padding"], str)
    if odd or isinstance(bias, ops.Attr) or given is None or kernel is None or result is None or given[0] != 1:
        raise BackendError(f"{node.name!r} is a convolution whose groups follow the batch, in a form that ONNX lacks.")

    def add(function: Any, *args: Any) -> fx.Node:
        return graph.call_function(function, args)

    rows, window = kernel[0] * kernel[1] // given[1], (tuple(kernel[2:]), call["dilation"], call["padding"], call["stride"])
    samples = add(torch.flatten, add(torch.unflatten, values[value], 1, (-1, kernel[1])), 0, 1)
    weights = add(torch.reshape, values[weight], (-1, rows, kernel[1:].numel()))
    product = add(torch.matmul, weights, add(F.unfold, samples, *window))
    made = add(torch.reshape, product, (1, -1, *result[2:]))
    return made if bias is None else add(torch.add, made, add(torch.reshape, values[bias], (1, -1, 1, 1)))
