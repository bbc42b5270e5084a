"""The fake-quantize operator: rounding onto a quantization grid in float, differentiable by the straight-through estimator.

``fake_quantize(x) = (clamp(round(x/s) + z, quant_min, quant_max) - z)·s``, the same bits as ``dequantize(quantize(x))``. Its
gradient towards ``x`` is 1 inside the range and 0 outside; towards ``s`` it is that of learned step sizes (Esser et al.
2020): ``round(x/s) - x/s`` inside, the bound minus ``z`` outside. Inside is where the rounded value lies on the grid; with
``clip`` it is where ``x/s`` itself lies between the grid's ends, as in that paper.

``averages`` says that the input are means of values on the same grid, as pooling makes them. Integer kernels see exact ties
there and round them to even; floating-point noise must not decide, so what is within 2^-13 of a tie counts as one.

``scale`` and ``zero_point`` are tensors, so that training changes them without touching the graph: one number in all
(``axis`` None), or one per channel along ``axis``. A scale of 0 says that no range is known yet: values pass unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxcompress.graph.qdq import along

__all__ = ["fake_quantize"]

_library = torch.library.Library("fxcompress", "FRAGMENT")
_GRID = "Tensor scale, Tensor zero_point, int? axis, int quant_min, int quant_max, bool clip"
_library.define(f"fake_quantize(Tensor input, {_GRID}=False, bool averages=False) -> Tensor")
_library.define(f"fake_quantize_backward(Tensor grad, Tensor input, {_GRID}, bool averages, bool learn) -> (Tensor, Tensor)")


def _working(input: Tensor) -> Tensor:
    """At least single precision: half-precision activations are rounded in float32."""
    return input if input.dtype in (torch.float32, torch.float64) else input.to(torch.float32)


def _spread(value: Tensor, input: Tensor, axis: int | None) -> Tensor:
    return value.reshape(()) if axis is None else along(value, input.dim(), axis)


def _ratio(input: Tensor, step: Tensor) -> Tensor:
    working = _working(input)
    return working / step.to(working.dtype)


def _rounded(ratio: Tensor, averages: bool) -> Tensor:
    return ratio.mul(4096).round_().div_(4096).round_() if averages else ratio.round()


def _bounds(zero_point: Tensor, quant_min: int, quant_max: int) -> tuple[Any, Any]:
    """The grid's ends counted from the zero point: numbers where that needs no wait for a device."""
    if zero_point.numel() == 1 and zero_point.device.type == "cpu":
        zero = int(zero_point)
        return quant_min - zero, quant_max - zero
    return quant_min - zero_point, quant_max - zero_point


def _is_unset(scale: Tensor) -> bool:
    return scale.numel() == 1 and scale.device.type == "cpu" and float(scale) == 0.0


def _fake_quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    quant_min: int,
    quant_max: int,
    clip: bool = False,
    averages: bool = False,
) -> Tensor:
    if _is_unset(scale):
        return input.clone()
    step, zero = _spread(scale, input, axis), _spread(zero_point, input, axis)
    levels = _rounded(_ratio(input, step), averages).clamp_(*_bounds(zero, quant_min, quant_max))
    values = levels.mul_(step).to(input.dtype)
    return values if scale.device.type == "cpu" else torch.where(step == 0, input, values)


def _backward(
    grad: Tensor,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    quant_min: int,
    quant_max: int,
    clip: bool,
    averages: bool,
    learn: bool,
) -> tuple[Tensor, Tensor]:
    towards_scale = torch.zeros_like(scale)
    if _is_unset(scale):
        return grad.clone(), towards_scale
    step, zero = _spread(scale, input, axis), _spread(zero_point, input, axis)
    low, high = _bounds(zero, quant_min, quant_max)
    ratio = _ratio(input, step)
    levels = _rounded(ratio, averages)
    judged, reach = (ratio, 0.0) if clip else (levels, 0.5)
    if isinstance(low, int):
        through = torch.ops.aten.hardtanh_backward(grad.to(levels.dtype), judged, low - reach, high + reach)
    else:
        through = grad * ((judged > low - reach) & (judged < high + reach) | (step == 0))
    if learn:
        offsets = torch.sub(levels, ratio, out=ratio).mul_(through)  # inside: round(x/s) - x/s; outside: the bound
        slope = offsets.addcmul_(grad - through, levels.clamp_(low, high))
        towards_scale = _gathered(slope, axis).reshape(scale.shape).to(scale.dtype)
    return through.to(grad.dtype), towards_scale


def _gathered(slope: Tensor, axis: int | None) -> Tensor:
    return slope.sum() if axis is None else slope.sum([d for d in range(slope.dim()) if d != axis % slope.dim()])


_library.impl("fake_quantize", _fake_quantize, "CompositeExplicitAutograd")
_library.impl("fake_quantize_backward", _backward, "CompositeExplicitAutograd")
_library.impl("fake_quantize", lambda input, *grid: torch.empty_like(input), "Meta")
_library.impl(
    "fake_quantize_backward",
    lambda grad, input, scale, *grid: (torch.empty_like(grad), torch.empty_like(scale)),
    "Meta",
)

fake_quantize = torch.ops.fxcompress.fake_quantize.default


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, scale, zero_point, *ctx.grid = inputs
    ctx.save_for_backward(input, scale, zero_point)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    learn = ctx.needs_input_grad[1]
    towards_input, towards_scale = torch.ops.fxcompress.fake_quantize_backward(grad, *ctx.saved_tensors, *ctx.grid, learn)
    return towards_input, towards_scale if learn else None, *[None] * 6


torch.library.register_autograd("fxcompress::fake_quantize", _differentiate, setup_context=_remember, lib=_library)
