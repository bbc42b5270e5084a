"""The quantization operators a graph carries explicitly: ``torch.ops.fxcompress.quantize`` and its relatives.

They work on plain uint8 and int8 tensors, have Meta kernels, run anywhere torch runs, and are the reference semantics that
lowered kernels are held against. ``quantize`` divides by the scale, rounds half to even, adds the zero point and clamps to
``[quant_min, quant_max]``, as ONNX QuantizeLinear does; ``dequantize`` is ``(q - zero_point) * scale``. Per channel, no zero
point means 0. ``fake_quantize_dynamic`` puts a tensor on the grid ``[0, quant_max]`` of its own range, which holds 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, fx

__all__ = [
    "Quantize",
    "along",
    "dequantize",
    "dequantize_per_channel",
    "fake_quantize_dynamic",
    "quantize",
    "quantize_per_channel",
    "read",
    "source",
]

_library = torch.library.Library("fxcompress", "DEF")
_library.define(
    "quantize(Tensor input, float scale, int zero_point, int quant_min, int quant_max, ScalarType dtype) -> Tensor"
)
_library.define(
    "quantize_per_channel(Tensor input, Tensor scale, int axis, int quant_min, int quant_max, ScalarType dtype) -> Tensor"
)
_library.define("dequantize(Tensor input, float scale, int zero_point, ScalarType dtype=float) -> Tensor")
_library.define(
    "dequantize_per_channel(Tensor input, Tensor scale, int axis, Tensor? zero_point=None, ScalarType dtype=float) -> Tensor"
)
_library.define("fake_quantize_dynamic(Tensor input, int quant_max=255) -> Tensor")


def along(values: Tensor, dims: int, axis: int) -> Tensor:
    """One number per index of ``axis``, in the shape that broadcasts with a tensor of ``dims`` dimensions."""
    shape = [1] * dims
    shape[axis] = -1
    return values.reshape(shape)


def _quantize(input: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: torch.dtype) -> Tensor:
    levels = (input.to(torch.float32) / scale).round_()
    return levels.add_(zero_point).clamp_(quant_min, quant_max).to(dtype)


def _quantize_per_channel(
    input: Tensor, scale: Tensor, axis: int, quant_min: int, quant_max: int, dtype: torch.dtype
) -> Tensor:
    levels = input.to(torch.float32) / along(scale, input.dim(), axis)
    return levels.round_().clamp_(quant_min, quant_max).to(dtype)


def _dequantize(input: Tensor, scale: float, zero_point: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (input.to(torch.float32) - zero_point).mul_(scale).to(dtype)


def _dequantize_per_channel(
    input: Tensor, scale: Tensor, axis: int, zero_point: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    levels = input.to(torch.float32, copy=True)
    if zero_point is not None:
        levels.sub_(along(zero_point.to(torch.float32), input.dim(), axis))
    return levels.mul_(along(scale, input.dim(), axis)).to(dtype)


def _fake_quantize_dynamic(input: Tensor, quant_max: int = 255) -> Tensor:
    if not input.numel():
        return input.clone()
    low, high = (bound.to(torch.float32) for bound in torch.aminmax(input))
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = (high - low) / quant_max
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero_point = torch.round(-low / scale)
    levels = torch.round(input.to(torch.float32) / scale) + zero_point
    return ((levels.clamp_(0, quant_max) - zero_point) * scale).to(input.dtype)


def _empty_like(input: Tensor, *args: object, dtype: torch.dtype = torch.float32) -> Tensor:
    kinds = [arg for arg in args if isinstance(arg, torch.dtype)]
    return torch.empty_like(input, dtype=kinds[0] if kinds else dtype)


for _name, _kernel in {
    "quantize": _quantize,
    "quantize_per_channel": _quantize_per_channel,
    "dequantize": _dequantize,
    "dequantize_per_channel": _dequantize_per_channel,
}.items():
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    _library.impl(_name, _empty_like, "Meta")
_library.impl("fake_quantize_dynamic", _fake_quantize_dynamic, "CompositeExplicitAutograd")
_library.impl("fake_quantize_dynamic", lambda input, quant_max=255: torch.empty_like(input), "Meta")


class Quantize(NamedTuple):
    """What a ``quantize`` node reads, and the grid it rounds to."""

    source: fx.Node
    scale: float
    zero_point: int
    low: int
    high: int
    dtype: torch.dtype

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the largest value on the grid."""
        return (self.low - self.zero_point) * self.scale, (self.high - self.zero_point) * self.scale


def read(node: fx.Node) -> Quantize:
    """A ``quantize`` node, by its parts."""
    return Quantize(*node.args)  # type: ignore[arg-type]


def source(node: fx.Node) -> fx.Node:
    """What a node of these operators reads first: the value that is quantized, or the levels."""
    assert isinstance(node.args[0], fx.Node)
    return node.args[0]


quantize = torch.ops.fxcompress.quantize.default
quantize_per_channel = torch.ops.fxcompress.quantize_per_channel.default
dequantize = torch.ops.fxcompress.dequantize.default
dequantize_per_channel = torch.ops.fxcompress.dequantize_per_channel.default
fake_quantize_dynamic = torch.ops.fxcompress.fake_quantize_dynamic.default
