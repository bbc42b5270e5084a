"""A streaming histogram of floats that is the same for every split and order of the data.

Bins are those of a short floating-point format: every octave ``[2^e, 2^(e+1))`` has ``per_octave`` equal bins, on either
side of zero. A value's bin is the leading bits of its float32 pattern, so it does not depend on what else was seen; only
values more than :data:`OCTAVES` octaves below the largest are gathered in one bin around zero. The top octave is as fine as
``2·per_octave`` equal bins over ``[0, max]``, everything below it finer, so a single outlier costs no resolution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["OCTAVES", "Histogram"]

OCTAVES = 26
_MANTISSA = 23


class Histogram:
    """Counts (int64) per bin; memory is fixed by ``num_bins`` (a power of two, the fineness at the top of the range)."""

    def __init__(self, num_bins: int) -> None:
        self.per_octave = max(2, num_bins // 2)
        self.shift = _MANTISSA - (self.per_octave.bit_length() - 1)
        self.width = OCTAVES * self.per_octave
        self.top = -1
        self.positive = torch.zeros(self.width, dtype=torch.int64)
        self.negative = torch.zeros(0, dtype=torch.int64)

    def add(self, values: Tensor, minimum: float, maximum: float) -> None:
        """Count float32 ``values``, whose extremes are known."""
        self._reach(max(abs(minimum), abs(maximum)))
        keys = values.view(torch.int32)
        if minimum >= 0.0:
            self._count(keys, self.positive)
            return
        if not self.negative.numel():
            self.negative = torch.zeros_like(self.positive)
        below = values < 0
        self._count(keys[~below], self.positive)
        self._count(keys[below] & 0x7FFFFFFF, self.negative)

    def _count(self, patterns: Tensor, counts: Tensor) -> None:
        keys = (patterns >> self.shift).sub_(self._base).clamp_(min=0)
        found = torch.bincount(keys)
        counts[: found.numel()] += found

    @property
    def _base(self) -> int:
        return (self.top + 1) * self.per_octave - self.width

    def _reach(self, magnitude: float) -> None:
        """Let the window of octaves end at the one that holds ``magnitude``; what falls below it joins the zero bin."""
        pattern = int(torch.tensor(magnitude, dtype=torch.float32).view(torch.int32))
        octave = pattern >> _MANTISSA
        if octave <= self.top:
            return
        step = min((octave - self.top) * self.per_octave, self.width) if self.top >= 0 else 0
        self.top = octave
        if step:
            self.positive, self.negative = (_lowered(counts, step) for counts in (self.positive, self.negative))

    def merge(self, other: Histogram) -> None:
        """Add what ``other`` counted."""
        if other.top > self.top:
            step = min((other.top - self.top) * self.per_octave, self.width) if self.top >= 0 else 0
            self.top = other.top
            if step:
                self.positive, self.negative = (_lowered(counts, step) for counts in (self.positive, self.negative))
        step = min((self.top - other.top) * self.per_octave, self.width)
        self.positive += _lowered(other.positive, step)
        if other.negative.numel():
            if not self.negative.numel():
                self.negative = torch.zeros_like(self.positive)
            self.negative += _lowered(other.negative, step)

    def edges(self) -> Tensor:
        """The right edges of the bins by magnitude (float64); the first bin begins at 0."""
        keys = torch.arange(1, self.width + 1, dtype=torch.int64) + self._base
        keys = keys.clamp(min=0).to(torch.int64) << self.shift
        limit = int(torch.tensor(torch.inf).view(torch.int32))
        return keys.clamp(max=limit).to(torch.int32).view(torch.float32).to(torch.float64)

    def sides(self) -> tuple[Tensor, Tensor]:
        """Counts by magnitude of the negative and of the non-negative values."""
        negative = self.negative if self.negative.numel() else torch.zeros_like(self.positive)
        return negative, self.positive

    def state_dict(self) -> dict[str, Any]:
        return {"top": self.top, "positive": self.positive.clone(), "negative": self.negative.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.top = int(state["top"])
        self.positive, self.negative = state["positive"].clone(), state["negative"].clone()


def _lowered(counts: Tensor, step: int) -> Tensor:
    """Counts as seen from a window that ends ``step`` bins higher."""
    if not step or not counts.numel():
        return counts
    moved = torch.zeros_like(counts)
    moved[: counts.numel() - step] = counts[step:]
    moved[0] += counts[:step].sum()
    return moved
