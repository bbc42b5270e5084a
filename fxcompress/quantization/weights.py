"""Weights as int8: a scale per output channel or one in all, symmetric or affine, on request safe from 16-bit saturation."""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.backends.saturation import largest_pair
from fxcompress.graph.qdq import along
from fxcompress.quantization.grid import Grid, compute_scale_zp, grid

__all__ = ["quantize_weight", "weight_grid"]

_SMALLEST = float(torch.finfo(torch.float32).tiny)


def weight_grid(
    weight: Tensor,
    axis: int = 0,
    *,
    per_channel: bool = True,
    symmetric: bool = True,
    bits: int = 8,
    bound_pairs: bool = False,
    adjacent: bool = True,
) -> tuple[Tensor, Tensor | None, Grid]:
    """Scale (float32) and zero point (int32, None for 0), each ``[channels]`` or ``[1]``, that put ``weight`` on its grid.

    Symmetric: the scale is max|w| over the largest level. Affine: as
    :func:`~fxcompress.quantization.grid.compute_scale_zp` has it. A channel of zeros gets the step of weights up to 1.

    ``bound_pairs``: no same-sign pair of 8-bit levels may sum beyond 128, so that 8-bit activations cannot saturate a 16-bit
    partial sum (see :mod:`fxcompress.backends.saturation`). Symmetric scales are then (largest same-sign pair) / 127, where
    ``adjacent`` says whether pairs are known or any two elements of a channel may meet; affine grids give up a bit.
    """
    values = weight.detach()
    rows = values.movedim(axis, 0).flatten(1)
    if not symmetric:
        rows = rows if per_channel else values.reshape(1, -1)
        target = grid("int8", symmetric=False, bits=min(bits, 7) if bound_pairs else bits)
        return *compute_scale_zp(rows.amin(1), rows.amax(1), target), target
    target = grid("int8", bits=bits)
    if bound_pairs and bits == 8:
        reach = largest_pair(values, axis, adjacent=adjacent)
    else:
        reach = torch.maximum(rows.amax(1), -rows.amin(1))
    if not per_channel:
        reach = reach.amax().reshape(1)
    scale = (reach.to(torch.float64) / target.quant_max).clamp(min=_SMALLEST)
    return torch.where(reach > 0, scale, 1.0 / target.quant_max).to(torch.float32), None, target


def quantize_weight(weight: Tensor, axis: int = 0, **options: bool | int) -> tuple[Tensor, Tensor, Tensor | None]:
    """``weight`` as int8 levels, their scale (float32) and zero point (int8 or None), each ``[channels]`` or ``[1]``.

    ``options`` are those of :func:`weight_grid`.
    """
    exact = weight.detach().to(torch.float64)
    scale, zero_point, target = weight_grid(exact, axis, **options)  # type: ignore[arg-type]
    levels = torch.round(exact / along(scale.to(torch.float64), weight.dim(), axis))
    if zero_point is not None:
        levels, zero_point = levels + along(zero_point, weight.dim(), axis), zero_point.to(torch.int8)
    return levels.clamp_(target.quant_min, target.quant_max).to(torch.int8), scale, zero_point
