"""Masks: which weights stay. Pure functions on tensors, exact in their counts and deterministic under ties."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxcompress.errors import ConfigError, did_you_mean, shown
from fxcompress.pruning import criteria

__all__ = ["CRITERIA", "check_criterion", "check_sparsity", "n_of_m", "score", "smallest"]

CRITERIA: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "l1": lambda magnitude, generator: magnitude,
    "l2": lambda magnitude, generator: magnitude,  # ranks as w² does, and does not underflow
    "random": lambda magnitude, generator: torch.rand(
        magnitude.shape, generator=generator, dtype=torch.float32, device="cpu"
    ).to(magnitude.device),
}
"""Criterion → the score of every weight from |w|; the smallest go first."""

_OF_CHANNELS = frozenset(criteria.CRITERIA)


def check_criterion(criterion: str) -> str:
    """``criterion``; ConfigError unless it ranks single weights: one of those here, or one that a user registered."""
    known = [*CRITERIA, *(name for name in criteria.CRITERIA if name not in _OF_CHANNELS)]
    if isinstance(criterion, str) and criterion in known:
        return criterion
    whole = " That one ranks whole channels." if isinstance(criterion, str) and criterion in _OF_CHANNELS else ""
    hint = did_you_mean(criterion, known)
    raise ConfigError(
        f"there is no criterion {shown(criterion)} for single weights.{whole}{hint} Known: {', '.join(known)}."
    )


def score(weight: Tensor, criterion: str, generator: torch.Generator, name: str = "") -> Tensor:
    """Non-negative scores in the weight's shape, float64 for float64 and float32 for all else.

    To a criterion that a user registered every weight is a slice of one number; its scores are float64. Raises ConfigError
    for an unknown criterion, for scores below 0, and for NaN or infinite values with the layer's name.
    """
    check_criterion(criterion)
    magnitude = weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32).abs()
    if weight.numel() and not bool(torch.isfinite(magnitude.amax())):
        owner = f"the weight of {name!r}" if name else "a weight"
        raise ConfigError(f"{owner} holds NaN or infinite values; no criterion ranks them.")
    if criterion in CRITERIA:
        return CRITERIA[criterion](magnitude, generator)
    found = criteria.scored(criterion, weight.detach().reshape(-1, 1), name or "the weight").reshape(weight.shape)
    if bool((found < 0).any()):
        raise ConfigError(
            f"the criterion {criterion!r} gave scores below 0 for {name or 'a weight'}; those of weights begin at 0."
        )
    return found


def check_sparsity(sparsity: float) -> float:
    """``sparsity`` as a float in [0, 1); ConfigError otherwise."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0.0 <= sparsity < 1.0:
        raise ConfigError(f"sparsity is {sparsity!r}; it is a number in [0, 1).")
    return float(sparsity)


def smallest(scores: Sequence[Tensor], sparsity: float, present: Sequence[Tensor | None] = ()) -> list[Tensor]:
    """Boolean masks (True stays) that drop exactly ``round(sparsity · n)`` of all ``n`` scores together, the smallest.

    What the masks in ``present`` drop goes first, unless they drop more than is asked: then they count for nothing. Among
    equal scores at the threshold, those that come first are dropped. The threshold is found by counting the leading bits of
    the floating-point patterns (order-preserving for non-negative numbers) and ranking only the bucket it falls in.
    """
    total = sum(s.numel() for s in scores)
    dropped = round(check_sparsity(sparsity) * total)
    if not dropped:
        return [torch.ones_like(s, dtype=torch.bool) for s in scores]
    double = any(s.dtype == torch.float64 for s in scores)
    float_type, bits = (torch.float64, torch.int64) if double else (torch.float32, torch.int32)
    patterns = [s.to(float_type).contiguous().view(bits) for s in scores]
    gone = sum(mask.numel() - int(mask.count_nonzero()) for mask in present if mask is not None)
    if 0 < gone <= dropped:
        patterns = [p + 1 if mask is None else (p + 1) * mask for p, mask in zip(patterns, present, strict=True)]
    threshold, spare = _threshold(patterns, dropped, 48 if double else 16)
    masks = []
    for pattern in patterns:
        mask = pattern >= threshold
        if spare:
            ties = (pattern == threshold).flatten().nonzero().flatten()[:spare]
            mask.view(-1)[ties] = False
            spare -= ties.numel()
        masks.append(mask)
    return masks


def _threshold(patterns: Sequence[Tensor], dropped: int, shift: int) -> tuple[int, int]:
    """The pattern of the largest dropped score, and how many scores equal to it are dropped."""
    counts = torch.zeros((1 << 15) + 1, dtype=torch.int64, device="cpu")
    for p in patterns:
        counts += torch.bincount((p >> shift).flatten(), minlength=counts.numel()).cpu()
    bucket = int(torch.searchsorted(counts.cumsum(0), dropped))
    below = int(counts[:bucket].sum())
    inside = torch.cat([p.flatten()[(p >> shift).flatten() == bucket].cpu() for p in patterns])
    threshold = int(inside.kthvalue(dropped - below).values)
    return threshold, dropped - below - int((inside < threshold).sum())


def n_of_m(scores: Tensor, n: int, m: int, dim: int = 1) -> Tensor:
    """A mask that keeps exactly the ``n`` largest of every ``m`` neighbours along ``dim``; ties keep the first.

    ``m`` must divide the size of ``dim``.
    """
    dim %= scores.dim()
    parts = scores.unflatten(dim, (-1, m)).unbind(dim + 1)
    ahead = [torch.zeros(parts[0].shape, dtype=torch.int8, device=scores.device) for _ in parts]
    for i in range(m):
        for j in range(i + 1, m):
            first = (parts[i] >= parts[j]).view(torch.int8)  # a tie goes to the one that comes first
            ahead[j] += first
            ahead[i] -= first
    kept = [count < n - (m - 1 - i) for i, count in enumerate(ahead)]  # of the m − 1 − i after it, wins counted −1
    return torch.stack(kept, dim + 1).flatten(dim, dim + 1)
