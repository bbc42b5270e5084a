"""How many units of a channel group may stay: multiples, minima, blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fxcompress.graph.channels import ChannelGroup, Channels
from fxcompress.graph.channels.analysis import layer_of
from fxcompress.graph.channels.atoms import Ints

__all__ = ["Rounding", "layers_of", "rounding", "slices_of"]


@dataclass(frozen=True)
class Rounding:
    """The numbers of units that one block of a channel group may keep.

    ``size``        units in a block of the model that shares count
    ``now``         how many of them are left; fewer than ``size`` where earlier steps took some
    ``step``        what remains is a multiple of this
    ``least``       units that stay at least
    ``layer_size``  channels of the layer; up to ``round_to`` of them are not rounded
    """

    size: int
    now: int
    step: int
    least: int
    layer_size: int
    round_to: int

    def nearest(self, kept: float) -> int:
        """The allowed number nearest to ``kept``, the larger of two."""
        kept = min(max(kept, self.least), self.now)
        if kept >= self.now or self.layer_size <= self.round_to:
            return int(min(self.now, math.floor(kept + 0.5)))
        rounded = math.floor(kept / self.step + 0.5) * self.step
        while rounded < self.least:
            rounded += self.step
        return int(min(rounded, self.now))

    def steps(self) -> list[int]:
        """Every allowed number, from all down to the least."""
        return sorted({self.nearest(kept) for kept in range(min(self.least, self.now), self.now + 1)}, reverse=True)

    def gone(self, share: float) -> float:
        """The share that goes where ``share`` is asked."""
        return 1 - self.nearest(self.size - share * self.size) / self.size


def rounding(
    size: int, blocks: int, slices: int, round_to: int, min_kept: int, max_ratio: float, now: int | None = None
) -> Rounding:
    """For ``blocks`` of ``size`` units, ``now`` of which are left, each ``slices`` channels of its layer."""
    step = round_to // math.gcd(round_to, slices)
    step = step if size > step or blocks == 1 else step // math.gcd(step, blocks)
    least = min(size, max(min_kept, math.ceil(size * (1 - max_ratio) - 1e-9), 1))
    return Rounding(size, size if now is None else now, step, least, size * blocks * slices, round_to)


def slices_of(channels: Channels, group: ChannelGroup) -> int:
    """How many channels of its (first) layer one unit is."""
    return max(1, next(layers_of(channels, group), 1) // group.size)


def layers_of(channels: Channels, group: ChannelGroup) -> Iterator[int]:
    """How many channels of every layer that makes some are the group's."""
    mine, seen = np.zeros(len(channels.root), dtype=bool), set()
    mine[group.blocks] = True
    for (tensor, dim), roots in group.slices.items():
        layer = layer_of(tensor)
        if channels.walk.roles.get((tensor, dim)) == "out" and layer not in seen:
            seen.add(layer)
            yield int(mine[_once(roots, dim)].sum())


def _once(roots: Ints, dim: int) -> Ints:
    """Channels along a dimension of a weight, those that several inputs make (of a transposed, grouped kernel) once."""
    if roots.size == roots.shape[dim]:
        return roots
    return np.unique(np.moveaxis(roots, dim, -1).reshape(-1, roots.shape[dim]), axis=0)
