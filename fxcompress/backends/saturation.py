"""When u8×s8 kernels overflow 16 bits, and the weights for which they cannot.

Without VNNI, x86 kernels multiply with ``vpmaddubsw``: the products of two neighbouring elements of the reduction are added
in a saturating int16. With activations in ``[0, A]`` a pair of weights ``(w0, w1)`` cannot saturate exactly when

    A·(max(w0, 0) + max(w1, 0)) ≤ 32767   and   A·(min(w0, 0) + min(w1, 0)) ≥ −32768.

Full-range activations (A = 255) are safe when no pair of the same sign sums beyond 128.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LIMIT", "largest_activation", "largest_pair", "reduction_rows"]

LIMIT = 128
"""The largest same-sign pair sum that 8-bit activations cannot saturate: 255·128 ≤ 32767 < 255·129."""


def reduction_rows(weight: Tensor, axis: int = 0) -> Tensor:
    """The weight as ``[output channels, reduction]``, the reduction in the order the kernels walk it.

    FBGEMM walks kernel positions first and input channels innermost, as channels-last memory has them.
    """
    rows = weight.movedim(axis, 0)
    if rows.dim() > 2:
        rows = rows.movedim(1, -1)
    return rows.reshape(rows.shape[0], -1)


def largest_pair(weight: Tensor, axis: int = 0, *, adjacent: bool = True) -> Tensor:
    """Per output channel, the largest magnitude that a same-sign pair of the reduction can sum to.

    ``adjacent``: pairs are elements 2i and 2i+1 of the reduction; otherwise any two elements may meet, which bounds kernels
    whose packing is not known (grouped, depthwise).
    """
    return torch.maximum(*_pairs(weight, axis, adjacent))


def _pairs(weight: Tensor, axis: int, adjacent: bool) -> tuple[Tensor, Tensor]:
    """Per output channel, the largest positive and the largest negative pair, as magnitudes."""
    rows = reduction_rows(weight, axis)
    if rows.shape[1] % 2:
        rows = torch.nn.functional.pad(rows, (0, 1))
    return _pair(rows.clamp(min=0), adjacent), _pair(rows.clamp(max=0).neg(), adjacent)


def _pair(rows: Tensor, adjacent: bool) -> Tensor:
    if adjacent:
        return (rows[:, 0::2] + rows[:, 1::2]).amax(1)
    return rows.topk(2, dim=1).values.sum(1)


def largest_activation(weight: Tensor, axis: int = 0, *, adjacent: bool = True) -> int:
    """The largest ``A`` for which int8 ``weight`` cannot saturate with activations in ``[0, A]``, at most 255."""
    positive, negative = (int(pair.max()) for pair in _pairs(weight.to(torch.int32), axis, adjacent))
    return min(255, 32767 // max(positive, 1), 32768 // max(negative, 1))
