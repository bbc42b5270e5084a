"""Scores of channel groups: a criterion on the slices that each unit owns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxcompress.data import batches
from fxcompress.errors import ConfigError, DataError
from fxcompress.graph import ops
from fxcompress.graph.channels import ChannelGroup, Channels
from fxcompress.graph.recorder import Recorder
from fxcompress.pruning import criteria
from fxcompress.pruning.gradients import Loss, gradients

__all__ = ["Loss", "check_criterion", "scores"]

Skip = Callable[[str, str], None]

_NARROW = {"bn_scale": "no BatchNorm scales its channels", "hrank": "no layer makes feature maps of its channels"}
"""Criteria that not every group has something for, and what it lacks."""


def check_criterion(criterion: str) -> str:
    """``criterion``, or ConfigError with the closest names."""
    criteria.CRITERIA[criterion]
    return criterion


def scores(
    channels: Channels,
    criterion: str = "l1_norm",
    *,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    dimension: str = "out",
    reduction: str | None = None,
    seed: int = 0,
    skip: Skip = lambda name, reason: None,
) -> dict[str, Tensor]:
    """Group → the score of every unit, float64 in the shape of the group's blocks; the smallest go first.

    The slices looked at are those of the layers that make a unit's channels (``dimension="out"``) or that read them
    (``"in"``); several of them add up (``reduction``). taylor takes gradients that are there, or computes them over ``data``
    with ``loss(output, target)`` (cross entropy unless said otherwise); hrank needs data. A group without BatchNorm falls
    back from bn_scale to l1_norm, one that no weighted layer makes from hrank, and ``skip`` is told.
    """
    check_criterion(criterion)
    module = channels.walk.module
    if criterion == "taylor":
        _need_gradients(module, data, loss)
    ranks = _ranks(channels, data) if criterion == "hrank" else {}
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for group in channels.groups:
        if criterion == "random":
            found[group.name] = criteria.random(group.size, generator).reshape(group.blocks.shape)
            continue
        found[group.name] = _Scoring(channels, group, criterion, dimension, ranks, skip).run(reduction)
    return found


class _Scoring:
    """The scores of one group."""

    def __init__(
        self, channels: Channels, group: ChannelGroup, criterion: str, dimension: str, ranks: dict[str, Tensor], skip: Skip
    ) -> None:
        self.channels, self.group, self.criterion = channels, group, criterion
        self.dimension, self.ranks, self.skip = dimension, ranks, skip
        self.position = np.full(len(channels.root), -1, dtype=np.int64)
        self.position[group.blocks.ravel()] = np.arange(group.size)

    def run(self, reduction: str | None) -> Tensor:
        criterion = self.criterion
        parts = self._parts(criterion)
        if not parts and criterion in _NARROW:
            self.skip(self.group.name, f"{_NARROW[criterion]}: l1_norm is used")
            criterion = "l1_norm"
            parts = self._parts(criterion)
        if not parts:
            raise ConfigError(f"{criterion} finds nothing to look at in the channels of {self.group.name!r}.")
        how = reduction or ("norm" if criterion == "l2_norm" else "sum")
        return criteria.combine(parts, how, self.group.size).reshape(self.group.blocks.shape)

    def _parts(self, criterion: str) -> list[tuple[Tensor, Tensor]]:
        parts = []
        for tensor, dim in self._slices(criterion):
            roots = self.group.slices[tensor, dim]
            units = self.position[roots].ravel()
            values = self._values(criterion, tensor, dim, roots.shape)
            mine = units >= 0
            if not mine.all():
                values, units = values[torch.from_numpy(mine)], units[mine]
            parts.append((values, torch.from_numpy(units)))
        return parts

    def _slices(self, criterion: str) -> list[tuple[str, int]]:
        roles, slices = self.channels.walk.roles, list(self.group.slices)
        if criterion == "bn_scale":
            return [key for key in slices if roles.get(key) == "scale"]
        if criterion == "hrank":
            return [key for key in slices if roles.get(key) == "out" and key[0] in self.ranks]
        for role in (self.dimension, "out", "in"):
            found = [key for key in slices if roles.get(key) == role and len(self._tensor(key[0]).shape) > 1]
            if found:
                return found
        return slices

    def _tensor(self, name: str) -> Tensor:
        return self.channels.walk.parameter(name)

    def _values(self, criterion: str, name: str, dim: int, shape: tuple[int, ...]) -> Tensor:
        """A score for every entry of the label."""
        if criterion == "hrank":
            return self.ranks[name]
        tensor = self._tensor(name)
        if criterion == "bn_scale":
            return criteria.bn_scale(tensor, name)
        if criterion == "taylor":
            gradient = tensor.grad
            rows = _rows(gradient, shape) if gradient is not None else None
            return criteria.taylor(_rows(tensor, shape), rows, name)
        return criteria.scored(criterion, _rows(tensor, shape), name)


def _rows(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The slices of a tensor, one row per entry of its label (of this shape)."""
    full = [d for d, size in enumerate(shape) if size > 1]
    rest = [d for d in range(tensor.dim()) if d not in full]
    return tensor.detach().permute(*full, *rest).reshape(math.prod(shape), -1)


def _need_gradients(module: fx.GraphModule, data: Iterable[Any] | None, loss: Loss | None) -> None:
    """Gradients of the mean loss over the data, left in ``.grad``."""
    if data is None:
        if any(p.grad is None for p in module.parameters() if p.requires_grad):
            raise ConfigError("taylor needs gradients: give data with targets, or call backward() on the model first.")
        return
    for name, gradient in gradients(module, data, loss).items():
        module.get_parameter(name).grad = gradient


def _ranks(channels: Channels, data: Iterable[Any] | None) -> dict[str, Tensor]:
    """Weight → the mean rank of the feature maps that its layer makes."""
    if data is None:
        raise DataError("hrank needs data: it ranks feature maps.")
    walk = channels.walk
    makers: dict[fx.Node, str] = {}
    for node in walk.module.graph.nodes:
        call = ops.read(node) if node.op.startswith("call") else None
        weight = call["weight"] if call is not None and call.op.family == "contraction" else None
        if isinstance(weight, ops.Attr):
            makers[node] = walk.canonical.get(weight.name, weight.name)
    totals: dict[str, list[Tensor]] = {}
    for batch in batches(data, walk.module):
        run = _Features(walk.module, makers)
        run.record(batch)
        for name, found in run.ranks.items():
            totals.setdefault(name, []).append(found)
    if not totals:
        raise DataError("the dataloader is empty: hrank needs at least one batch.")
    return {name: torch.stack(found).mean(0) for name, found in totals.items()}


class _Features(Recorder):
    """Ranks of what layers make, one layer at a time."""

    def __init__(self, module: fx.GraphModule, makers: dict[fx.Node, str]) -> None:
        super().__init__(module)
        self.makers, self.ranks = makers, dict[str, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        name = self.makers.get(n)
        if name is not None:
            found = ops.lookup(n)
            channel = value.dim() - 1 - (int(found.kind[-2]) if found is not None and "conv" in found.kind else 0)
            self.ranks[name] = criteria.hrank(value.movedim(channel, 1), name)
        return value
