"""Operators without an int8 weight as calls of ``torch.ops.quantized``: what writes the kernel of each kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxcompress.backends.kernels import QuantizedBatchNorm, mean_of_levels, pooled_levels
from fxcompress.graph import edit, ops, qdq
from fxcompress.graph.shapes import shape_of

__all__ = ["KERNELS", "Kernel", "Writer"]

_q = torch.ops.quantized


class Writer:
    """A new graph being written from an old one.

    ``integers``  old node → the new one that holds its value as quint8
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.graph = fx.Graph()
        self.integers: dict[fx.Node, fx.Node] = {}

    def operand(self, node: fx.Node) -> fx.Node:
        """The quint8 value behind a dequantize."""
        return self.integers[node if node in self.integers else qdq.source(node)]

    def call(self, function: Any, *args: Any) -> fx.Node:
        """A call in the new graph."""
        return self.graph.call_function(function, args)


Kernel = Callable[[Writer, ops.Call, Any, Any], fx.Node]
"""Writes the kernel of a call whose result has this scale and zero point; returns its node."""


def _add(to: Writer, call: ops.Call, scale: Any, zero_point: Any) -> fx.Node:
    function = _q.add_relu.default if call["activation"] == "relu" else _q.add.default
    return to.call(function, to.operand(call["input"]), to.operand(call["other"]), scale, zero_point)


def _mul(to: Writer, call: ops.Call, scale: Any, zero_point: Any) -> fx.Node:
    return to.call(_q.mul.default, to.operand(call["input"]), to.operand(call["other"]), scale, zero_point)


def _cat(to: Writer, call: ops.Call, scale: Any, zero_point: Any) -> fx.Node:
    return to.call(_q.cat.default, [to.operand(t) for t in call["tensors"]], call["dim"], scale, zero_point)


def _mean(to: Writer, call: ops.Call, scale: Any, zero_point: Any) -> fx.Node:
    return to.call(mean_of_levels, to.operand(call["input"]), call["dim"], bool(call["keepdim"]), scale, zero_point)


def _pooled(to: Writer, call: ops.Call, scale: Any, zero_point: Any) -> fx.Node:
    return to.call(pooled_levels, to.operand(call["input"]), call["output_size"], scale, zero_point)


def _unary(function: Any, *options: str) -> Kernel:
    def emit(to: Writer, call: ops.Call, scale: Any, zero_point: Any) -> fx.Node:
        return to.call(function, to.operand(call["input"]), *(call[o] for o in options), scale, zero_point)

    return emit


def _elu(to: Writer, call: ops.Call, scale: Any, zero_point: Any) -> fx.Node:
    return to.call(_q.elu.default, to.operand(call["input"]), scale, zero_point, call["alpha"])


def _leaky_relu(to: Writer, call: ops.Call, scale: Any, zero_point: Any) -> fx.Node:
    return to.call(_q.leaky_relu.default, to.operand(call["input"]), call["negative_slope"], False, scale, zero_point)


def _fixed(function: Any) -> Kernel:
    def emit(to: Writer, call: ops.Call, scale: Any, zero_point: Any) -> fx.Node:
        return to.call(function, to.operand(call["input"]))

    return emit


def _clamp(low: str | float | None, high: str | float | None) -> Kernel:
    def emit(to: Writer, call: ops.Call, scale: Any, zero_point: Any) -> fx.Node:
        bounds = [call[b] if isinstance(b, str) else b for b in (low, high)]
        return to.call(torch.clamp, to.operand(call["input"]), *bounds)

    return emit


def _dropped(to: Writer, call: ops.Call, scale: Any, zero_point: Any) -> fx.Node:
    return to.call(torch.clone, to.operand(call["input"]))


def _batch_norm(to: Writer, call: ops.Call, scale: Any, zero_point: Any) -> fx.Node:
    mean, variance = (edit.get_tensor(to.module, call[n].name) for n in ("running_mean", "running_var"))
    weight, bias = (edit.get_tensor(to.module, call[n].name) if call[n] is not None else None for n in ("weight", "bias"))
    weight = torch.ones_like(mean) if weight is None else weight
    bias = torch.zeros_like(mean) if bias is None else bias
    dims = len(shape_of(call.inputs[0]) or ()) - 2
    layer = QuantizedBatchNorm((weight, bias, mean, variance), call["eps"], dims, scale, zero_point)
    return to.graph.call_module(edit.add_module(to.module, call.node.name, layer), (to.operand(call["input"]),))


KERNELS: dict[str, Kernel] = {
    "add": _add,
    "mul": _mul,
    "cat": _cat,
    "mean": _mean,
    "adaptive_avg_pool2d": _pooled,
    "batch_norm": _batch_norm,
    "hardswish": _unary(_q.hardswish.default),
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "hardsigmoid": _fixed(torch.nn.functional.hardsigmoid),
    "sigmoid": _fixed(torch.sigmoid),
    "tanh": _fixed(torch.tanh),
    "relu": _fixed(torch.relu),
    "relu6": _clamp(0.0, 6.0),
    "hardtanh": _clamp("min_val", "max_val"),
    "clamp": _clamp("min", "max"),
    "dropout": _dropped,
}
"""Kind → what writes its kernel; what is not here runs on quint8 tensors as it stands."""
