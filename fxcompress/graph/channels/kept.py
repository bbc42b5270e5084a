"""What stays: kept classes seen as masks over labels, as sizes of values, and as parts of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fxcompress.errors import PassError
from fxcompress.graph.channels.atoms import Ints
from fxcompress.graph.channels.labels import Value

__all__ = ["Kept", "Mask", "mask_data", "mask_from_data", "select"]

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Kept:
    """``flags[atom]``: whether an atom stays."""

    flags: Mask
    _seen: dict[int, tuple[Ints, Mask, bool]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def without(cls, root: Ints, removed: Ints) -> Kept:
        """Everything but the classes ``removed``."""
        by_class = np.ones(len(root), dtype=bool)
        by_class[removed] = False
        return cls(by_class[root])

    def masks(self, value: Value) -> dict[int, Mask]:
        """The dimensions of ``value`` that lose something: which entries of the label stay."""
        found = {dim: self._mask(label.array) for dim, label in value.labels.items()}
        return {dim: mask for dim, (_, mask, whole) in found.items() if not whole}

    def _mask(self, array: Ints) -> tuple[Ints, Mask, bool]:
        """The array itself, which of its entries stay, and whether all do; worked out once for all values that share it."""
        seen = self._seen.get(id(array))
        if seen is None:
            mask = self.flags[array]
            seen = self._seen[id(array)] = (array, mask, bool(mask.all()))
        return seen

    def count(self, atoms: Ints) -> int:
        """How many of these atoms stay."""
        return int(self.flags[atoms].sum())

    def shape(self, value: Value) -> tuple[int, ...]:
        """The shape ``value`` will have."""
        masks = self.masks(value)
        return tuple(_left(masks, dim) if dim in masks else size for dim, size in enumerate(value.shape))

    def touches(self, value: Value) -> bool:
        """Whether ``value`` loses anything."""
        return any(not self._mask(label.array)[2] for label in value.labels.values())


def _left(masks: dict[int, Mask], dim: int) -> int:
    """How many entries stay along ``dim``, counted where the other dimensions keep theirs."""
    mask = masks[dim]
    if mask.size == mask.shape[dim]:
        return int(np.count_nonzero(mask))
    for other in masks:
        if other != dim and mask.shape[other] > 1 and masks[other].size == masks[other].shape[other]:
            mask = mask.take(np.flatnonzero(masks[other]), axis=other)
    counts = np.unique(mask.sum(axis=dim))
    if len(counts) != 1:
        raise PassError(f"blocks that must keep equal numbers of channels keep {counts.tolist()}.")
    return int(counts[0])


def mask_data(mask: Mask) -> dict[str, Any]:
    """A mask as plain data: its shape, and the positions that stay, counted through it."""
    return {"shape": list(mask.shape), "kept": np.flatnonzero(mask).tolist()}


def mask_from_data(data: Mapping[str, Any]) -> Mask:
    """The inverse of :func:`mask_data`."""
    mask = np.zeros(int(np.prod(data["shape"])), dtype=bool)
    mask[data["kept"]] = True
    return mask.reshape(data["shape"])


def select(tensor: torch.Tensor, masks: Mapping[int, Mask]) -> torch.Tensor:
    """The part of ``tensor`` that stays: along each dimension the entries its mask keeps, in order."""
    masks = dict(masks)
    for dim in [d for d, mask in masks.items() if mask.size == mask.shape[d]]:
        kept = np.flatnonzero(masks.pop(dim).reshape(-1))
        tensor = tensor.index_select(dim, torch.from_numpy(kept).to(tensor.device))
        masks = {d: m.take(kept, axis=dim) if m.shape[dim] > 1 else m for d, m in masks.items()}
    for dim, mask in masks.items():
        counts = np.unique(mask.sum(axis=dim))
        if len(counts) != 1:
            raise PassError(f"blocks that must keep equal numbers of channels keep {counts.tolist()}.")
        order = np.argsort(~mask, axis=dim, kind="stable").take(np.arange(int(counts[0])), axis=dim)
        shape = list(tensor.shape)
        shape[dim] = order.shape[dim]
        index = torch.from_numpy(np.ascontiguousarray(order)).to(tensor.device).expand(shape)
        tensor = tensor.gather(dim, index)
    return tensor
