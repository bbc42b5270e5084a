"""Average pooling in the forms that ONNX or a runtime lacks: the means of what windows hold, times the share that it counts.

ONNX has no divisor of its own, and counts padding in another way than torch where a last window hangs over the edge.
OpenVINO pads integers whose zero point is not 0 with the level 0, where the pooling pads or follows a padding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from fxcompress.errors import BackendError
from fxcompress.graph import ops, qdq
from fxcompress.graph.shapes import shape_of

__all__ = ["is_odd_pool", "open_pool"]

_POOLS: dict[str, Any] = {"avg_pool1d": F.avg_pool1d, "avg_pool2d": F.avg_pool2d, "avg_pool3d": F.avg_pool3d}


def is_odd_pool(node: fx.Node) -> bool:
    """Whether ``node`` is average pooling in one of these forms."""
    call = ops.read(node) if node.op.startswith("call") else None
    if call is None or call.kind not in _POOLS:
        return False
    counted = call["count_include_pad"] is not False and any(call.each("padding", int(call.kind[-2])))
    shifted = counted and (bool(call["ceil_mode"]) or _is_shifted(call["input"]))
    return bool(call["divisor_override"]) or shifted or _is_padded(call["input"])


def _is_shifted(value: fx.Node) -> bool:
    return value.target is qdq.dequantize and bool(value.args[2])


def _is_padded(value: fx.Node) -> bool:
    return value.op.startswith("call") and ops.kind(value) == "pad"


def open_pool(graph: fx.Graph, node: fx.Node, values: dict[fx.Node, Any]) -> fx.Node:
    """Write ``node`` into ``graph``, for images of the example's size. Raises BackendError where that is not known."""
    call = ops.read(node)
    shape = shape_of(call.inputs[0]) if call is not None else None
    if call is None or shape is None:
        raise BackendError(f"{node.name!r} pools averages in a form that ONNX lacks, and its sizes are not known.")
    pool, dims, value = _POOLS[call.kind], int(call.kind[-2]), values[call["input"]]
    size, stride, padding = (call.each(name, dims) for name in ("kernel_size", "stride", "padding"))
    stride = stride if any(stride) else size
    over, divisor = bool(call["ceil_mode"]), call["divisor_override"]
    held = torch.ones(1, 1, *shape[-dims:], dtype=torch.float32, device="cpu")
    made = pool(held, size, stride, padding, over).shape
    edges = [edge for edge in reversed(padding) for _ in range(2)] if divisor else []
    if any(edges):
        value = graph.call_function(F.pad, (value, edges))
        held, padding = F.pad(held, edges, value=1.0), [0] * dims
    apart = math.prod(size) / divisor if divisor else 2.0 if _is_padded(call["input"]) else 1.0
    if apart != 1.0:
        value = graph.call_function(torch.mul, (value, apart))  # between padding and pooling: see above
    whole = [math.prod(size)] if divisor else []
    counted = pool(held, size, stride, padding, over, call["count_include_pad"] is not False, *whole)
    means = graph.call_function(pool, (value, size, stride, padding, over, False))
    for dim in range(-dims, 0) if over else ():  # ONNX infers a window more, which torch does not start
        means, counted = (graph.call_function(torch.narrow, (means, dim, 0, made[dim])), counted.narrow(dim, 0, made[dim]))
    share = counted if divisor else counted / apart
    if bool((share == share.flatten()[0]).all()):
        return means if share.flatten()[0] == 1 else graph.call_function(torch.mul, (means, float(share.flatten()[0])))
    return graph.call_function(torch.mul, (means, graph.call_function(torch.tensor, (share.tolist(),))))
