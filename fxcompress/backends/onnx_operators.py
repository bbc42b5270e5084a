"""The ONNX form of the operators of ours; needs onnxscript."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import opset20 as op

from fxcompress.graph import qdq

__all__ = ["TRANSLATIONS"]


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
