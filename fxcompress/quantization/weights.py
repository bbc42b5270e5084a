"""Weights as int8: symmetric, one scale per output channel or one in all, optionally safe from 16-bit saturation."""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.backends.saturation import largest_pair

__all__ = ["quantize_weight"]

_SMALLEST = float(torch.finfo(torch.float32).tiny)


def quantize_weight(
    weight: Tensor, axis: int = 0, *, per_channel: bool = True, bound_pairs: bool = False, adjacent: bool = True
) -> tuple[Tensor, Tensor]:
    """``weight`` on the grid [-127, 127], and its scale (float32, ``[channels]`` or ``[1]``).

    The scale is max|w| / 127. With ``bound_pairs`` it is (largest same-sign pair) / 127 instead, so that no pair of integers
    sums beyond 128 and 8-bit activations cannot saturate a 16-bit partial sum (see :mod:`fxcompress.backends.saturation`);
    ``adjacent`` says whether pairs are known or any two elements of a channel may meet. A channel of zeros gets scale 1.
    """
    exact = weight.detach().to(torch.float64)
    largest = exact.movedim(axis, 0).flatten(1).abs().amax(1)
    reach = largest_pair(exact, axis, adjacent=adjacent) if bound_pairs else largest
    if not per_channel:
        reach = reach.amax().reshape(1)
    scale = (reach / 127).clamp(min=_SMALLEST)
    scale = torch.where(reach > 0, scale, torch.ones_like(scale)).to(torch.float32)
    shape = [1] * weight.dim()
    shape[axis] = -1
    levels = torch.round(exact / scale.to(torch.float64).reshape(shape)).clamp_(-127, 127)
    return levels.to(torch.int8), scale
