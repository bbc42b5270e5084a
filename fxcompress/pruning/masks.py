"""Masks: which weights stay. Pure functions on tensors, exact in their counts and deterministic under ties."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxcompress.errors import ConfigError, did_you_mean

__all__ = ["CRITERIA", "check_sparsity", "n_of_m", "score", "smallest"]

CRITERIA: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "l1": lambda weight, generator: weight.abs(),
    "l2": lambda weight, generator: weight.square(),
    "random": lambda weight, generator: torch.rand(weight.shape, generator=generator).to(weight.device),
}
"""Criterion → the score of every weight; the smallest go first."""


def score(weight: Tensor, criterion: str, generator: torch.Generator) -> Tensor:
    """Non-negative float32 scores in the weight's shape. Raises ConfigError for an unknown criterion or NaN."""
    if criterion not in CRITERIA:
        hint = did_you_mean(criterion, CRITERIA)
        raise ConfigError(f"there is no criterion {criterion!r}.{hint} Known: {', '.join(CRITERIA)}.")
    if not bool(torch.isfinite(weight).all()):
        raise ConfigError("a weight holds NaN or infinite values; no criterion ranks them.")
    return CRITERIA[criterion](weight.detach().to(torch.float32), generator)


def check_sparsity(sparsity: float) -> float:
    """``sparsity`` as a float in [0, 1); ConfigError otherwise."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0.0 <= sparsity < 1.0:
        raise ConfigError(f"sparsity is {sparsity!r}; it is a number in [0, 1).")
    return float(sparsity)


def smallest(scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """Boolean masks (True stays) that drop exactly ``round(sparsity · n)`` of all ``n`` scores together, the smallest.

    Among equal scores at the threshold, those that come first are dropped. The threshold is found by counting the leading
    bits of the float32 patterns (order-preserving for non-negative numbers) and ranking only the bucket it falls in.
    """
    total = sum(s.numel() for s in scores)
    dropped = round(check_sparsity(sparsity) * total)
    if not dropped:
        return [torch.ones_like(s, dtype=torch.bool) for s in scores]
    patterns = [s.to(torch.float32).contiguous().view(torch.int32) for s in scores]
    threshold, spare = _threshold(patterns, dropped)
    masks = []
    for pattern in patterns:
        mask = pattern >= threshold
        if spare:
            ties = (pattern == threshold).flatten().nonzero().flatten()[:spare]
            mask.view(-1)[ties] = False
            spare -= ties.numel()
        masks.append(mask)
    return masks


def _threshold(patterns: Sequence[Tensor], dropped: int) -> tuple[int, int]:
    """The pattern of the largest dropped score, and how many scores equal to it are dropped."""
    counts = sum(torch.bincount((p >> 16).flatten(), minlength=1 << 15) for p in patterns)
    assert isinstance(counts, Tensor)
    bucket = int(torch.searchsorted(counts.cumsum(0), dropped))
    below = int(counts[:bucket].sum())
    inside = torch.cat([p.flatten()[(p >> 16).flatten() == bucket] for p in patterns])
    threshold = int(inside.kthvalue(dropped - below).values)
    return threshold, dropped - below - int((inside < threshold).sum())


def n_of_m(scores: Tensor, n: int, m: int, dim: int = 1) -> Tensor:
    """A mask that keeps exactly the ``n`` largest of every ``m`` neighbours along ``dim``; ties keep the first.

    ``m`` must divide the size of ``dim``.
    """
    grouped = scores.movedim(dim, -1)
    parts = grouped.reshape(*grouped.shape[:-1], -1, m).unbind(-1)
    kept = []
    for i, own in enumerate(parts):
        rank = torch.zeros(own.shape, dtype=torch.int8, device=own.device)
        for j, other in enumerate(parts):
            if j != i:
                rank += (other >= own) if j < i else (other > own)
        kept.append(rank < n)
    return torch.stack(kept, -1).reshape(grouped.shape).movedim(-1, dim)
