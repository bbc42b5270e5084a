"""Weighted layers as products of matrices: their inputs position by position, and their weights as rows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxcompress.graph.ops import Call

__all__ = ["Patches"]


class Patches:
    """A layer as ``result[position, output] = Σ rows[output, input]·patch[position, input]``, group by group.

    A transposed convolution is a convolution of its input, with zeros between the values, by the weight turned around.
    """

    def __init__(self, call: Call, weight: Tensor) -> None:
        self.shape, self.kernel = weight.shape, weight.shape[2:]
        self.groups: int = call["groups"] or 1
        self.transposed = call.kind.startswith("conv_transpose")
        count = len(self.kernel)
        each = {name: call.each(name, count) for name in ("stride", "padding", "dilation", "output_padding")}
        self.stride, self.dilation = each["stride"], each["dilation"]
        self.padding = [_padding(each["padding"][d], self.dilation[d] * (self.kernel[d] - 1)) for d in range(count)]
        if self.transposed:
            self.between, self.stride = self.stride, [1] * count
            self.padding = [
                (reach - low, reach - low + more)
                for (low, _), more, reach in zip(self.padding, each["output_padding"], self._reach, strict=True)
            ]

    @property
    def inputs(self) -> int:
        """How many inputs every output of a group sums over."""
        channels = self.shape[0] // self.groups if self.transposed else self.shape[1]
        return channels * math.prod(self.kernel)

    @property
    def _reach(self) -> list[int]:
        return [dilation * (size - 1) for dilation, size in zip(self.dilation, self.kernel, strict=True)]

    def rows(self, weight: Tensor) -> Tensor:
        """A weight, or what broadcasts with it, as ``[groups, outputs, inputs]``."""
        grouped = weight.expand(self.shape).unflatten(0, (self.groups, -1))
        if self.transposed:
            grouped = grouped.transpose(1, 2).flip(self._spatial)
        return grouped.flatten(2)

    def weight(self, rows: Tensor) -> Tensor:
        """Rows as a weight again."""
        if not self.transposed:
            return rows.reshape(self.shape)
        grouped = rows.unflatten(2, (self.shape[0] // self.groups, *self.kernel))
        return grouped.flip(self._spatial).transpose(1, 2).reshape(self.shape)

    @property
    def _spatial(self) -> list[int]:
        return [3 + axis for axis in range(len(self.kernel))]

    def view(self, input: Tensor) -> Tensor:
        """Every patch of an input, in place where that is possible: ``[samples, *positions, groups, inputs, *kernel]``."""
        count = len(self.kernel)
        if not count:
            return input.reshape(-1, 1, input.shape[-1])
        batched = input if input.dim() == count + 2 else input.unsqueeze(0)
        if self.transposed:
            batched = _spaced(batched, self.between)
        padded = F.pad(batched, [side for pair in reversed(self.padding) for side in pair])
        for d in range(count):
            padded = padded.unfold(2 + d, self._reach[d] + 1, self.stride[d])[..., :: self.dilation[d]]
        return padded.movedim(1, 1 + count).unflatten(1 + count, (self.groups, -1))

    def picked(self, view: Tensor, positions: Tensor) -> Tensor:
        """The patches at these positions, counted over all samples: ``[groups, positions, inputs]``."""
        shape = view.shape[: view.dim() - 2 - len(self.kernel)]
        return view[torch.unravel_index(positions, shape)].flatten(2).transpose(0, 1)

    def count(self, view: Tensor) -> int:
        """How many positions there are."""
        return math.prod(view.shape[: view.dim() - 2 - len(self.kernel)])


def _padding(value: int | str, reach: int) -> tuple[int, int]:
    """Before and after, in one direction."""
    if value == "same":
        return reach // 2, reach - reach // 2
    return (0, 0) if isinstance(value, str) else (value, value)


def _spaced(input: Tensor, stride: list[int]) -> Tensor:
    """``input`` with ``stride − 1`` zeros between its values."""
    sizes = [(size - 1) * step + 1 for size, step in zip(input.shape[2:], stride, strict=True)]
    made = input.new_zeros(*input.shape[:2], *sizes)
    places: list[Any] = [..., *(slice(None, None, step) for step in stride)]
    made[tuple(places)] = input
    return made
