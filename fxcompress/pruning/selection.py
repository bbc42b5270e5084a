"""Which units go: budgets by group, overall, by parameters, by multiply-accumulates, by latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fxcompress.errors import ConfigError, did_you_mean
from fxcompress.graph.channels import ChannelGroup, Channels
from fxcompress.graph.channels.analysis import group_name
from fxcompress.graph.select import Selection
from fxcompress.pruning import criteria
from fxcompress.pruning.dense import Dense
from fxcompress.pruning.masks import check_sparsity
from fxcompress.pruning.rounding import Rounding, layers_of, rounding, slices_of

__all__ = ["Budget", "choose", "missed", "removed_classes", "sparsities", "whole_groups"]

Choice = dict[str, list[int]]
"""Group → positions of the units that go, counted through the group's blocks."""


@dataclass(frozen=True)
class Budget:
    """How much goes.

    ``sparsity``       share of the units that go, in every group, or over all groups where ``global_pruning``
    ``layers``         group → a share of its own (patterns that choose layers)
    ``round_to``       what remains of a layer is a multiple of this, where it has more
    ``min_kept``       units that every group (every block of it) keeps
    ``max_ratio``      the share that may go from one group
    ``normalisation``  how scores of groups are made comparable
    ``uniform``        groups of one shape keep the same number
    ``dense``          the model that shares are counted of, where earlier steps took some of it
    ``floors``         group → units that every block of it keeps, for later steps to take
    """

    sparsity: float = 0.5
    layers: Mapping[str, float] = field(default_factory=dict)
    global_pruning: bool = False
    round_to: int = 8
    min_kept: int = 1
    max_ratio: float = 1.0
    normalisation: str = "mean"
    uniform: bool = False
    dense: Dense = field(default_factory=Dense)
    floors: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        for name, share in self.layers.items():
            try:
                check_sparsity(share)
            except ConfigError as error:
                raise ConfigError(f"layers[{name!r}]: {error}") from error
        for name, value in (("round_to", self.round_to), ("min_kept", self.min_kept)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it is a positive integer.")
        if not 0.0 < self.max_ratio <= 1.0:
            raise ConfigError(f"max_ratio is {self.max_ratio!r}; it is a number in (0, 1].")

    def rounding(self, channels: Channels, group: ChannelGroup) -> Rounding:
        """The numbers of units that a group may keep."""
        blocks, now = group.blocks.shape
        size, slices = self.dense.size(group), slices_of(channels, group)
        least = max(self.min_kept, self.floors.get(group.name, 1))
        return rounding(size, blocks, slices, self.round_to, least, self.max_ratio, now)


def sparsities(channels: Channels, budget: Budget) -> dict[str, float]:
    """Group → the share asked of it. Raises ConfigError for a name in ``layers`` that no group has."""
    asked = {}
    for pattern in budget.layers:
        selection = Selection((pattern,))
        if not any(_layer(group) in selection or group.name == pattern for group in channels.groups):
            names = [group.name for group in channels.groups]
            raise ConfigError(f"no channel group is called {pattern!r}.{did_you_mean(pattern, names)}")
    for group in channels.groups:
        asked[group.name] = budget.sparsity
        for pattern, share in budget.layers.items():
            if group.name == pattern or _layer(group) in Selection((pattern,)):
                asked[group.name] = share
    return asked


def _layer(group: ChannelGroup) -> str:
    return group.name.partition("#")[0]


def whole_groups(channels: Channels, budget: Budget) -> list[str]:
    """Grouped convolutions of which whole groups should go: that comes nearer to the share asked than rounding every group.

    Every group of 24 channels can only keep 16 of them where multiples of 8 are asked, but 17 such groups can lose 8.
    """
    asked, found = sparsities(channels, budget), []
    for group in channels.groups:
        sites = {site: number for site, number in channels.walk.grouped.items() if _is_of(channels, group, site)}
        if len(group.blocks) == 1 or len(set(sites.values())) != 1:
            continue
        number, share, now = next(iter(sites.values())), asked[group.name], budget.rounding(channels, group)
        whole = rounding(number, 1, now.layer_size // number, budget.round_to, budget.min_kept, budget.max_ratio)
        miss = abs(now.gone(share) - share)
        if miss * now.size >= 1 and abs(whole.gone(share) - share) < miss:
            found += [group_name(site) for site in sites]
    return found


def missed(channels: Channels, budget: Budget) -> tuple[float, float]:
    """How many channels rounding leaves off the shares asked, over all groups, and how many were asked."""
    asked = sparsities(channels, budget)
    sizes = [sum(layers_of(channels, group)) for group in channels.groups]
    gone = [budget.rounding(channels, group).gone(asked[group.name]) for group in channels.groups]
    wanted = [asked[group.name] for group in channels.groups]
    misses = sum(abs(g - w) * size for g, w, size in zip(gone, wanted, sizes, strict=True))
    return misses, sum(w * size for w, size in zip(wanted, sizes, strict=True))


def _is_of(channels: Channels, group: ChannelGroup, site: str) -> bool:
    return bool(np.isin(channels.root[channels.walk.sites.inputs[site]], group.blocks).any())


def choose(
    channels: Channels,
    scores: Mapping[str, Tensor],
    budget: Budget,
    measure: Callable[[Choice], float] | None = None,
    target: float | None = None,
) -> Choice:
    """The units that go. With ``measure`` (a cost of what is left) and ``target``, as many as bring the cost down to it.

    Units of several blocks go together: one of each, the smallest of its block. Ties go by position. What remains of every
    tensor is never empty.
    """
    ladders = [_Ladder(channels, group, scores[group.name], budget) for group in channels.groups]
    if measure is not None and target is not None:
        counts = _bisect(channels, ladders, budget, measure, target)
    elif budget.global_pruning:
        units, kept = budget.dense.total(channels.groups)
        counts = _globally(ladders, round(budget.sparsity * units) - (units - kept))
    else:
        asked = sparsities(channels, budget)
        counts = [ladder.nearest(ladder.size - asked[ladder.group.name] * ladder.size) for ladder in ladders]
    if budget.uniform:
        counts = _alike(channels, ladders, counts)
    return _take(channels, ladders, counts)


class _Ladder:
    """A group's units in the order they go: rung i takes the i-th smallest of every block."""

    def __init__(self, channels: Channels, group: ChannelGroup, scores: Tensor, budget: Budget) -> None:
        self.group, self.rounding = group, budget.rounding(channels, group)
        self.size, self.now = self.rounding.size, self.rounding.now
        self.nearest, self.steps = self.rounding.nearest, self.rounding.steps
        self.scores = criteria.normalise(scores.reshape(-1), budget.normalisation).reshape(scores.shape)
        self.order = torch.argsort(self.scores, dim=1, stable=True)

    @property
    def cost(self) -> list[float]:
        """The mean score of what each rung takes."""
        return self.scores.gather(1, self.order).mean(0).tolist()

    def first(self, number: int, stays: np.ndarray) -> list[int]:
        """The positions of the first ``number`` units of every block, of those that do not have to stay."""
        free = [order[~kept[order]] for order, kept in zip(self.order.numpy(), stays, strict=True)]
        number = min(number, *map(len, free))
        chosen = np.concatenate([units[:number] + block * self.now for block, units in enumerate(free)])
        return np.sort(chosen).tolist()


def _globally(ladders: list[_Ladder], more: int) -> list[int]:
    """The lowest rungs of all ladders until ``more`` units go, the nearest allowed numbers, the total mended by steps."""
    wanted = sum(ladder.group.size for ladder in ladders) - more
    kept = [ladder.now for ladder in ladders]
    gone = 0
    for _, index in _rungs(ladders):
        if gone >= more:
            break
        if kept[index] > ladders[index].rounding.least:
            kept[index] -= 1
            gone += len(ladders[index].group.blocks)
    counts = [ladder.nearest(k) for ladder, k in zip(ladders, kept, strict=True)]
    return _mend(ladders, counts, kept, wanted)


def _rungs(ladders: list[_Ladder]) -> list[tuple[float, int]]:
    """(cost, ladder) of every rung, cheapest first; rungs of one ladder stay in order."""
    rungs = [(cost, index) for index, ladder in enumerate(ladders) for cost in ladder.cost]
    return sorted(rungs)


def _mend(ladders: list[_Ladder], counts: list[int], wished: list[int], wanted: int) -> list[int]:
    """Move single ladders by one step while that brings the total nearer to what is wanted."""
    counts = list(counts)
    while True:
        gap = sum(c * len(ladder.group.blocks) for c, ladder in zip(counts, ladders, strict=True)) - wanted
        best: tuple[int, float, int, int] | None = None
        for index, ladder in enumerate(ladders):
            allowed = ladder.steps()
            place = allowed.index(counts[index]) if counts[index] in allowed else 0
            other = place + (1 if gap > 0 else -1)
            if not 0 <= other < len(allowed):
                continue
            moved = abs(gap + (allowed[other] - counts[index]) * len(ladder.group.blocks))
            key = (moved, abs(allowed[other] - wished[index]), index, allowed[other])
            if moved < abs(gap) and (best is None or key < best):
                best = key
        if best is None:
            return counts
        counts[best[2]] = best[3]


def _bisect(
    channels: Channels, ladders: list[_Ladder], budget: Budget, measure: Callable[[Choice], float], target: float
) -> list[int]:
    """The fewest rungs that bring the cost down to ``target``, or the neighbour that is nearer to it."""

    def counts(rungs: int) -> list[int]:
        kept = [ladder.now for ladder in ladders]
        for index in order[:rungs]:
            kept[index] = max(kept[index] - 1, ladders[index].rounding.least)
        return [ladder.nearest(k) for ladder, k in zip(ladders, kept, strict=True)]

    def cost(rungs: int) -> float:
        return measure(_take(channels, ladders, counts(rungs)))

    if budget.global_pruning:
        order = [index for _, index in _rungs(ladders)]
    else:
        places = [(1 - i / ladder.size, index) for index, ladder in enumerate(ladders) for i in range(ladder.now)]
        order = [index for _, index in sorted(places)]
    low, high = 0, len(order)
    if cost(high) > target:
        return counts(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle) <= target else (middle, high)
    nearer = abs(cost(low) - target) < abs(cost(high) - target)
    return counts(low if nearer else high)


def _alike(channels: Channels, ladders: list[_Ladder], counts: list[int]) -> list[int]:
    """Groups whose layers have one shape keep their mean number."""
    kinds: dict[object, list[int]] = {}
    for index, ladder in enumerate(ladders):
        shapes = tuple(channels.walk.tensors[name].shape for name, _ in ladder.group.slices)
        kinds.setdefault((ladder.group.blocks.shape, shapes), []).append(index)
    counts = list(counts)
    for members in kinds.values():
        mean = sum(counts[i] for i in members) / len(members)
        for index in members:
            counts[index] = ladders[index].nearest(mean)
    return counts


def _take(channels: Channels, ladders: list[_Ladder], counts: list[int]) -> Choice:
    """The first units of every ladder; where that would leave a tensor without any index, its best unit stays and the next
    one goes in its place."""
    stays = [np.zeros(ladder.group.blocks.shape, dtype=bool) for ladder in ladders]
    while True:
        gone = [ladder.first(ladder.now - n, kept) for ladder, n, kept in zip(ladders, counts, stays, strict=True)]
        chosen = {ladder.group.name: units for ladder, units in zip(ladders, gone, strict=True)}
        empty = _emptied(channels, removed_classes(channels, chosen))
        if not len(empty):
            return chosen
        hits = [np.isin(ladder.group.blocks, empty) if units else None for ladder, units in zip(ladders, gone, strict=True)]
        index = next(i for i, hit in enumerate(hits) if hit is not None and hit.any())
        for block, order in enumerate(ladders[index].order.tolist()):
            best = next((u for u in reversed(order) if hits[index][block, u]), None)  # type: ignore[index]
            if best is not None:
                stays[index][block, best] = True


def _emptied(channels: Channels, removed: np.ndarray) -> np.ndarray:
    """The classes of the first labelled dimension that would lose every index; empty where there is none."""
    classes, starts = channels.dimensions
    stays = np.ones(len(channels.root), dtype=bool)
    stays[removed] = False
    empty = np.flatnonzero(~np.logical_or.reduceat(stays[classes], starts)) if len(starts) else starts
    if not len(empty):
        return np.empty(0, dtype=np.int64)
    end = starts[empty[0] + 1] if empty[0] + 1 < len(starts) else len(classes)
    return np.unique(classes[starts[empty[0]] : end])


def removed_classes(channels: Channels, chosen: Choice) -> np.ndarray:
    """The classes of the chosen units."""
    parts = [group.blocks.ravel()[chosen[group.name]] for group in channels.groups if chosen.get(group.name)]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
