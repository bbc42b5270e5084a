"""Two results of a model beside each other: whether they are built alike, and how far apart they are."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils import _pytree as pytree

__all__ = ["UNSTEADY", "largest_difference", "output_snr", "same_structure"]

UNSTEADY = (
    "The network multiplies errors of rounding, so that nothing can be told from its results: look at its weights, the "
    "statistics of its normalisation and the size of the example inputs, or give the model and its inputs in double."
)
"""What to say of a model whose results move further by a rounding of its inputs than a rewrite may move them."""


def same_structure(before: Any, after: Any) -> bool:
    """Whether two results have the same nesting, keys and number of tensors."""
    return pytree.tree_structure(before) == pytree.tree_structure(after)


def largest_difference(before: Any, after: Any) -> float:
    """The largest absolute difference between two results' tensors, in float64."""
    pairs = zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True)
    gaps = [_gaps(a, b).abs().max().item() for a, b in pairs if isinstance(a, torch.Tensor) and a.numel()]
    return max(gaps, default=0.0)


def _gaps(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Differences in float64; 0 where both hold the same infinity, or both no number."""
    exact, found = before.detach().to(torch.float64), after.detach().to(torch.float64)
    gaps = exact - found
    if not bool(gaps.isfinite().all()):
        gaps = torch.where((exact == found) | (exact.isnan() & found.isnan()), 0.0, gaps)
    return gaps


def output_snr(reference: Any, result: Any) -> float:
    """SNR in dB over all tensors of two results together: inf for equal bits, -inf where shapes or finiteness differ.

    Values that are not finite in the reference (a mask's -inf) count where the result differs, and add no signal.
    """
    signal = noise = 0.0
    for a, b in zip(pytree.tree_leaves(reference), pytree.tree_leaves(result), strict=False):
        if not isinstance(a, torch.Tensor) or not a.numel():
            continue
        if not isinstance(b, torch.Tensor) or a.shape != b.shape:
            return -math.inf
        signal += a.detach().to(torch.float64).nan_to_num(0.0, 0.0, 0.0).square().sum().item()
        noise += _gaps(a, b).square().sum().item()
    if noise == 0.0:
        return math.inf
    if not math.isfinite(noise):
        return -math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
