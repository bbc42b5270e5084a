"""Average pooling in the forms that ONNX or a runtime lacks: the means of what windows hold, times the share that it counts.

ONNX has no divisor of its own, and counts padding in another way than torch where a last window hangs over the edge.
OpenVINO pads integers whose zero point is not 0 with the level 0.
"""

from __future__ import annotations

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
    padding = call["padding"] or 0
    counted = call["count_include_pad"] is not False and any(padding if isinstance(padding, (tuple, list)) else [padding])
    return bool(call["divisor_override"]) or (counted and (bool(call["ceil_mode"]) or _is_shifted(call["input"])))


def _is_shifted(value: fx.Node) -> bool:
    return value.target is qdq.dequantize and bool(value.args[2])


def open_pool(graph: fx.Graph, node: fx.Node, values: dict[fx.Node, Any]) -> fx.Node:
    """Write ``node`` into ``graph``, for images of the example's size. Raises BackendError where that is not known."""
    call = ops.read(node)
    shape = shape_of(call.inputs[0]) if call is not None else None
    if call is None or shape is None:
        raise BackendError(f"{node.name!r} pools averages in a form that ONNX lacks, and its sizes are not known.")
    pool, dims = _POOLS[call.kind], int(call.kind[-2])
    window = [call["kernel_size"], call["stride"] or call["kernel_size"], call["padding"] or 0, bool(call["ceil_mode"])]
    divisor = [call["divisor_override"]] if call["divisor_override"] else []
    counted = pool(torch.ones(1, 1, *shape[-dims:]), *window, call["count_include_pad"] is not False, *divisor)
    means = graph.call_function(pool, (values[call["input"]], *window, False))
    for dim in range(-dims, 0) if call["ceil_mode"] else ():  # ONNX infers a window more, which torch does not start
        means = graph.call_function(torch.narrow, (means, dim, 0, counted.shape[dim]))
    alike = bool((counted == counted.flatten()[0]).all())
    share = float(counted.flatten()[0]) if alike else graph.call_function(torch.tensor, (counted.tolist(),))
    return graph.call_function(torch.mul, (means, share))
