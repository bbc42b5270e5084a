"""The ONNX form of the operators of ours; needs onnxscript."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset20 as op

from fxcompress.graph import qdq

__all__ = ["EXTREMES", "TRANSLATIONS"]


def _number(value: Any, dtype: Any) -> Any:
    return op.Constant(value=ir.tensor(np.array(value, dtype=dtype)))  # type: ignore[arg-type]


def _quantize(input: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: Any) -> Any:
    stored = np.dtype(ir.DataType(dtype).numpy())
    real = input.dtype.numpy()
    whole = np.iinfo(stored)
    if (quant_min, quant_max) != (whole.min, whole.max):
        low, high = ((level - zero_point) * scale for level in (quant_min, quant_max))
        input = op.Clip(input, _number(low, real), _number(high, real))
    return op.QuantizeLinear(input, _number(scale, real), _number(zero_point, stored))


def _quantize_per_channel(input: Any, scale: Any, axis: int, quant_min: int, quant_max: int, dtype: Any) -> Any:
    stored = np.dtype(ir.DataType(dtype).numpy())
    shape = [1] * len(input.shape)
    shape[axis] = -1
    along = op.Reshape(scale, _number(shape, np.int64))
    low, high = (op.Mul(along, _number(level, np.float32)) for level in (quant_min, quant_max))
    bounded = op.Min(op.Max(input, low), high)
    return op.QuantizeLinear(bounded, scale, _number([0] * int(scale.shape[0]), stored), axis=axis)


def _dequantize(input: Any, scale: float, zero_point: int, dtype: Any = ir.DataType.FLOAT) -> Any:
    real = ir.DataType(dtype).numpy()
    return op.DequantizeLinear(input, _number(scale, real), _number(zero_point, input.dtype.numpy()))


def _dequantize_per_channel(
    input: Any, scale: Any, axis: int, zero_point: Any = None, dtype: Any = ir.DataType.FLOAT
) -> Any:
    if zero_point is None:
        zero_point = _number([0] * int(scale.shape[0]), input.dtype.numpy())
    if scale.shape[0] == 1 and input.shape[axis] != 1:
        first = _number([0], np.int64)
        return op.DequantizeLinear(input, op.Squeeze(scale, first), op.Squeeze(zero_point, first))
    return op.DequantizeLinear(input, scale, zero_point, axis=axis)


TRANSLATIONS: dict[Any, Any] = {
    qdq.quantize: _quantize,
    qdq.quantize_per_channel: _quantize_per_channel,
    qdq.dequantize: _dequantize,
    qdq.dequantize_per_channel: _dequantize_per_channel,
}
"""Operators of ours → functions that build their ONNX form."""


def _first_in_order(largest: int, both: bool) -> Any:
    """The largest or smallest value, taken from the order of values; ``both``: with its index, over one dimension."""

    def translate(self: Any, dim: Any = (), keepdim: bool = False) -> Any:
        rank = len(self.shape)
        dims = [dim] if isinstance(dim, int) else list(dim) or list(range(rank))
        values: Any = self
        indices: Any = None
        for d in dims:
            values, indices = op.TopK(values, _number([1], np.int64), axis=d % rank, largest=largest)
        axes = _number([d % rank for d in dims], np.int64)
        results = [made if keepdim else op.Squeeze(made, axes) for made in (values, indices)[: 1 + both]]
        return tuple(results) if both else results[0]

    return translate


_aten = torch.ops.aten
EXTREMES: dict[Any, Any] = {
    _aten.amax.default: _first_in_order(1, False),
    _aten.amin.default: _first_in_order(0, False),
    _aten.max.dim: _first_in_order(1, True),
    _aten.min.dim: _first_in_order(0, True),
}
"""Largest and smallest values without ReduceMax and ReduceMin, which OpenVINO computes wrongly between integers."""
