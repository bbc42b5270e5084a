"""Weights as int8: a scale per output channel or one in all, symmetric or affine, on request safe from 16-bit saturation."""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.backends.saturation import largest_pair
from fxcompress.quantization.grid import compute_scale_zp, grid

__all__ = ["quantize_weight"]

_SMALLEST = float(torch.finfo(torch.float32).tiny)


def quantize_weight(
    weight: Tensor,
    axis: int = 0,
    *,
    per_channel: bool = True,
    symmetric: bool = True,
    bits: int = 8,
    bound_pairs: bool = False,
    adjacent: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``weight`` as int8 levels of ``bits``, their scale (float32) and zero point (int8), each ``[channels]`` or ``[1]``.

    Symmetric: the scale is max|w| over the largest level, there is no zero point (None). Affine: see
    :func:`~fxcompress.quantization.grid.compute_scale_zp`. A channel of zeros gets scale 1.

    ``bound_pairs``: no same-sign pair of 8-bit levels may sum beyond 128, so that 8-bit activations cannot saturate a 16-bit
    partial sum (see :mod:`fxcompress.backends.saturation`). Symmetric scales are then (largest same-sign pair) / 127, where
    ``adjacent`` says whether pairs are known or any two elements of a channel may meet; affine grids give up a bit.
    """
    exact = weight.detach().to(torch.float64)
    shape = [1] * weight.dim()
    shape[axis] = -1
    if not symmetric:
        return _affine(exact, axis, shape, per_channel, min(bits, 7) if bound_pairs else bits)
    top = 2 ** (bits - 1) - 1
    largest = exact.movedim(axis, 0).flatten(1).abs().amax(1)
    reach = largest_pair(exact, axis, adjacent=adjacent) if bound_pairs and bits == 8 else largest
    if not per_channel:
        reach = reach.amax().reshape(1)
    scale = (reach / top).clamp(min=_SMALLEST)
    scale = torch.where(reach > 0, scale, torch.ones_like(scale)).to(torch.float32)
    levels = torch.round(exact / scale.to(torch.float64).reshape(shape)).clamp_(-top, top)
    return levels.to(torch.int8), scale, None


def _affine(
    exact: Tensor, axis: int, shape: list[int], per_channel: bool, bits: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    rows = exact.movedim(axis, 0).flatten(1) if per_channel else exact.reshape(1, -1)
    target = grid("int8", symmetric=False, bits=bits)
    scale, zero_point = compute_scale_zp(rows.amin(1), rows.amax(1), target)
    levels = torch.round(exact / scale.to(torch.float64).reshape(shape)) + zero_point.reshape(shape)
    return levels.clamp_(target.quant_min, target.quant_max).to(torch.int8), scale, zero_point.to(torch.int8)
