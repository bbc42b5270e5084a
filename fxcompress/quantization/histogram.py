"""A streaming histogram of floats that is the same for every split and order of the data.

Bins are those of a short floating-point format: every octave ``[2^e, 2^(e+1))`` has ``per_octave`` equal bins, on either
side of zero. A value's bin is the leading bits of its float32 pattern, so it does not depend on what else was seen; only
values more than :data:`OCTAVES` octaves below the largest are gathered in one bin around zero. The top octave is as fine as
``num_bins`` equal bins over ``[-max, max]``, everything below it finer, so a single outlier costs no resolution.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxcompress.errors import ConfigError

__all__ = ["OCTAVES", "Histogram", "octave"]

OCTAVES = 24
_MANTISSA = 23
_CHUNK = 1 << 18
_WAITING = 1 << 17
_LANES = 8


class Histogram:
    """Counts (int64) per bin; memory is fixed by ``num_bins`` (a power of two, the fineness at the top of the range).

    ``signed``: keep the two sides of zero apart; otherwise magnitudes are counted, which is cheaper. Small tensors wait,
    up to 131,072 values, and are counted together: what counting costs at least is paid once for all of them. What is
    counted in is written to inside of inference mode and outside of it.
    """

    @torch.inference_mode(False)
    def __init__(self, num_bins: int, *, signed: bool = True) -> None:
        self.signed = signed
        self.per_octave = max(2, num_bins // 4)
        self.shift = _MANTISSA - (self.per_octave.bit_length() - 1)
        self.width = OCTAVES * self.per_octave
        self.top = -1
        self._counts = torch.zeros(1 + signed, self.width, dtype=torch.int64, device="cpu")
        self._waiting = torch.empty(0, dtype=torch.float32, device="cpu")
        self._waiting_count, self._waiting_negatives = 0, False

    @property
    def counts(self) -> Tensor:
        """Counts by side (positive, and negative where ``signed``) and magnitude."""
        self._settle()
        return self._counts

    def add(self, values: Tensor, minimum: float, maximum: float) -> None:
        """Count the one-dimensional float32 ``values``, whose extremes are known."""
        top = octave(max(-minimum, maximum))
        if top > self.top:
            self._rise(top)
        size = values.numel()
        if size > _WAITING // 2:
            self._count(values, minimum < 0.0)
            return
        if self._waiting_count + size > _WAITING:
            self._count_waiting()
        if not self._waiting.numel():
            self._make_room()
        self._waiting[self._waiting_count : self._waiting_count + size] = values
        self._waiting_count += size
        self._waiting_negatives |= minimum < 0.0

    @torch.inference_mode(False)
    def _make_room(self) -> None:
        self._waiting = torch.empty(_WAITING, dtype=torch.float32, device="cpu")

    def _count_waiting(self) -> None:
        if self._waiting_count:
            self._count(self._waiting[: self._waiting_count], self._waiting_negatives)
            self._waiting_count, self._waiting_negatives = 0, False

    def _count(self, values: Tensor, negatives: bool) -> None:
        base = (self.top + 1) * self.per_octave - self.width
        flat, lanes = self._counts.view(-1), _lanes()
        for patterns in values.view(torch.int32).split(_CHUNK):  # a chunk and its keys stay in the cache
            keys = (patterns & 0x7FFFFFFF).bitwise_right_shift_(self.shift) if negatives else patterns >> self.shift
            torch.maximum(keys.sub_(base), lanes[: keys.numel()], out=keys)
            if negatives and self.signed:
                keys.sub_(patterns >> 31, alpha=self.width)  # shifted so, a negative number is -1, any other 0
            found = torch.bincount(keys)
            flat[: found.numel()].add_(found)

    def _settle(self) -> None:
        """Count what waits, and gather the bin around zero from its lanes, and from both sides: -0.0 is 0."""
        self._count_waiting()
        around = self._counts[:, :_LANES].sum()
        self._counts[:, :_LANES] = 0
        self._counts[0, 0] = around

    @torch.inference_mode(False)
    def _rise(self, top: int) -> None:
        """Let the window of octaves end at ``top`` at least; what falls below it joins the bin around zero."""
        if top > self.top:
            if self.top >= 0:
                self._settle()
                self._counts = _lowered(self._counts, (top - self.top) * self.per_octave)
            self.top = top

    def merge(self, other: Histogram) -> None:
        """Add what ``other`` counted."""
        self._rise(other.top)
        self._counts += _lowered(other.counts, (self.top - other.top) * self.per_octave)

    def edges(self) -> Tensor:
        """The right edges of the bins by magnitude (float64); the first bin begins at 0."""
        base = (self.top + 1) * self.per_octave - self.width
        keys = (torch.arange(1, self.width + 1, device="cpu") + base).clamp(min=0) << self.shift
        infinite = int(torch.tensor(torch.inf, dtype=torch.float32, device="cpu").view(torch.int32))
        return keys.clamp(max=infinite).to(torch.int32).view(torch.float32).to(torch.float64)

    def magnitudes(self) -> Tensor:
        """Counts by magnitude, whatever the sign."""
        return self.counts.sum(0)

    def bins(self, minimum: float, maximum: float) -> tuple[Tensor, Tensor, Tensor]:
        """The occupied bins in ascending order: left ends, right ends, counts (all float64).

        Ends are held to the observed extremes, and the bin around zero is the point 0. Negative values have bins of their
        own where ``signed``; otherwise all are magnitudes.
        """
        right = self.edges()
        left = torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), right[:-1]])
        right[0] = 0.0
        sides = [(left, right, self.counts[0])]
        if self.signed:
            sides.insert(0, (-right.flip(0), -left.flip(0), self.counts[1].flip(0)))
            reach = (minimum, maximum)
        else:
            reach = (0.0, max(-minimum, maximum))
        lefts, rights, counts = (torch.cat(parts) for parts in zip(*sides, strict=True))
        kept = counts > 0
        return lefts[kept].clamp(*reach), rights[kept].clamp(*reach), counts[kept].to(torch.float64)

    def state_dict(self) -> dict[str, Any]:
        return {"top": self.top, "counts": self.counts.clone()}

    @torch.inference_mode(False)
    def load_state_dict(self, state: dict[str, Any]) -> None:
        top, counts = (state.get(key) if isinstance(state, Mapping) else None for key in ("top", "counts"))
        if not isinstance(top, int) or not isinstance(counts, Tensor) or counts.dtype != self._counts.dtype:
            raise ConfigError("the state of a histogram holds top and counts, integers; this one is damaged.")
        if counts.shape != self._counts.shape:
            raise ConfigError(
                f"the state has {tuple(counts.shape)} bins and this histogram {tuple(self._counts.shape)}: "
                "build the calibrator with the num_bins it was saved with."
            )
        self._waiting_count, self._waiting_negatives = 0, False
        self.top, self._counts = top, counts.clone()


def octave(magnitude: float) -> int:
    """The biased float32 exponent of a magnitude; 0 for zero and subnormals."""
    return max(math.frexp(magnitude)[1] + 126, 0) if magnitude else 0


@functools.cache
def _lanes() -> Tensor:
    """0 to 7 over and over: the least keys that values may have.

    Zeros, half of all values behind a ReLU, go to the lowest bins in turn and are gathered from there afterwards: counting
    into one bin again and again waits for its own last store each time.
    """
    return (torch.arange(_CHUNK, device="cpu") % _LANES).to(torch.int32)


def _lowered(counts: Tensor, step: int) -> Tensor:
    """Counts as seen from a window that ends ``step`` bins higher."""
    if not step:
        return counts
    step = min(step, counts.shape[1])
    moved = torch.zeros_like(counts)
    moved[:, : counts.shape[1] - step] = counts[:, step:]
    moved[:, 0] += counts[:, :step].sum(1)
    return moved
