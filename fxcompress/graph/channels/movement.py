"""One rule for every operator that only moves values: run it on integer coordinates and read off where each index went."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from fxcompress.graph.channels.atoms import Atoms, Ints
from fxcompress.graph.channels.calls import Known
from fxcompress.graph.channels.labels import Label, Value

__all__ = ["Sites", "codes", "move", "read_codes"]

Run = Callable[[torch.Tensor], Any]


class Sites:
    """Where a dimension is taken apart, and which part stands for its channels.

    ``offset``  site → how many places left of the finest part (0: the head dimension; 1: the heads; …)
    ``parts``   site → how many parts there are to choose from
    ``inputs``  site → the atoms of the dimension taken apart
    ``blocks``  arrays [blocks, n] of atoms: every block must keep the same number, with the place that wants it
    """

    def __init__(self, offset: dict[str, int]) -> None:
        self.offset = offset
        self.parts: dict[str, int] = {}
        self.inputs: dict[str, Ints] = {}
        self.blocks: list[tuple[Ints, str]] = []

    def choose(self, site: str, parts: int, atoms: Ints) -> int:
        """The part chosen at ``site``, counted from the finest."""
        self.parts[site], self.inputs[site] = parts, atoms.ravel()
        return min(self.offset.get(site, 0), parts - 1)

    def equal(self, array: Ints, axis: int, where: str) -> None:
        """Along ``axis`` every index of the other dimensions must keep the same number."""
        rows = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])
        if len(rows) > 1:
            self.blocks.append((rows, where))


def codes(label: Ints, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of this shape whose entries number the label's entries from 1."""
    numbers = torch.arange(1, label.size + 1, dtype=torch.float64 if label.size > 1 << 24 else torch.float32, device="cpu")
    return numbers.reshape(label.shape).expand(shape).contiguous()


@dataclass(frozen=True)
class Reading:
    """Where an operator put numbered entries: of every result its shape and the numbers in it, and how results nest."""

    shapes: list[tuple[int, ...]]
    found: list[Ints]
    spec: Any


def reading(run: Run, value: Value, label: Label | None, known: Known) -> Reading:
    """What ``run`` does to the numbers of a label, or to the shape alone where there is none."""
    asked = (value.shape, label.array.shape if label is not None else None)
    if asked not in known:
        given = (
            torch.empty(value.shape, dtype=torch.float32, device="meta")
            if label is None
            else codes(label.array, value.shape)
        )
        leaves, spec = pytree.tree_flatten(run(given))
        found = [read_codes(leaf) for leaf in leaves] if label is not None else []
        known[asked] = Reading([tuple(leaf.shape) for leaf in leaves], found, spec)
    answer: Reading = known[asked]
    return answer


def move(atoms: Atoms, sites: Sites, value: Value, run: Run, where: str, known: Known | None = None) -> Any:
    """The result of a movement operator as values: ``run`` does it on a tensor in the place of the labelled operand.

    ``known`` are readings of calls that do the same; what is read now joins them.
    """
    known = {} if known is None else known
    cache = {dim: reading(run, value, label, known) for dim, label in value.labels.items()}
    first = next(iter(cache.values())) if cache else reading(run, value, None, known)
    results = [Value(shape) for shape in first.shapes]
    for index, result in enumerate(results):
        place = _Place(atoms, sites, where if len(results) == 1 else f"{where}[{index}]")
        carried: dict[int, list[Label]] = {}
        for dim in sorted(value.labels):
            found = place.label(value.labels[dim], dim, cache[dim].found[index])
            if found is not None:
                carried.setdefault(found[0], []).append(found[1])
        result.labels = {dim: place.one_of(labels) for dim, labels in carried.items()}
    return pytree.tree_unflatten(results, first.spec)


def read_codes(moved: torch.Tensor) -> Ints:
    """The codes of a result with every dimension they do not vary along reduced to size one; 0 is a hole, anything goes."""
    found = moved
    for dim in sorted(range(found.dim()), key=lambda d: -found.shape[d]):
        if found.shape[dim] < 2:
            continue
        top = found.amax(dim, keepdim=True)
        if bool(((found == top) | (found == 0)).all()):
            found = top
    return found.to(torch.int64).numpy()


@dataclass(frozen=True)
class _Place:
    """One result of one movement operator."""

    atoms: Atoms
    sites: Sites
    where: str

    def label(self, label: Label, dim: int, found: Ints) -> tuple[int, Label] | None:
        """The dimension of the result that carries ``label``, whose numbers are ``found`` in it, and the label there."""
        array = label.array
        table = np.concatenate([np.zeros(1, dtype=np.int64), array.ravel()])
        own = _coordinate(found, array, dim)
        varying = [d for d in range(found.ndim) if _varies(own, d)]
        if not varying:
            self.atoms.freeze(table[np.unique(found)], f"one index is picked at {self.where}")
            return None
        varying.sort(key=lambda d: -_stride(own, d))
        arranged, sites, parts = table[found], label.sites, len(varying)
        if parts > 1:
            arranged, varying = self._without_copies(arranged, varying)
        chosen = varying[-1]
        if len(varying) > 1:
            site = f"{self.where}:{dim}"
            offset = self.sites.choose(site, len(varying), array)
            chosen, sites = varying[-1 - offset], sites | {site}
            for finer in varying[len(varying) - offset :]:
                arranged = self.atoms.tie(arranged, finer)
            self.sites.equal(arranged, chosen, self.where)
        elif parts == 1 and array.size != max(array.shape):
            arranged = self._keep_order(array, dim, found, arranged, chosen)
        arranged = self._fill_holes(found, arranged, chosen)
        return chosen, Label(self._tell_apart(arranged, chosen), label.zero, sites)

    def _without_copies(self, arranged: Ints, varying: list[int]) -> tuple[Ints, list[int]]:
        """Where a split sets copies of indices apart: those parts tied, and the parts that tell indices."""
        origins = self.atoms.origins(arranged)
        telling = [d for d in varying if _varies(origins, d)] or varying
        for other in set(varying) - set(telling):
            arranged = self.atoms.tie(arranged, other)
        return arranged, telling

    def one_of(self, labels: list[Label]) -> Label:
        """Of dimensions that end in one, only one can lose indices: the outermost."""
        for label in labels[1:]:
            self.atoms.freeze(label.array, f"two dimensions are merged at {self.where}")
        return labels[0]

    def _tell_apart(self, arranged: Ints, chosen: int) -> Ints:
        """Atoms of its own for each copy of an index that stands in several places, so that what comes of each is known."""
        if arranged.size != arranged.shape[chosen]:
            return arranged
        return self.atoms.told_apart(arranged.reshape(-1), self.where).reshape(arranged.shape)

    def _keep_order(self, array: Ints, dim: int, found: Ints, arranged: Ints, chosen: int) -> Ints:
        """Blocks merged into one dimension must stay in one piece each; otherwise they must keep the same indices."""
        tied = array
        for other in range(array.ndim):
            if other == dim or array.shape[other] == 1:
                continue
            block = _coordinate(found, array, other)
            if _varies(block, chosen) and not _contiguous(block, chosen):
                first = self.atoms.tie(tied, other)
                tied = np.ascontiguousarray(np.broadcast_to(first, tied.shape))
        if tied is array:
            return arranged
        return np.concatenate([np.zeros(1, dtype=np.int64), tied.ravel()])[found]

    def _fill_holes(self, found: Ints, arranged: Ints, chosen: int) -> Ints:
        """Padding along the dimension that carries the label has indices of its own, which may go too."""
        if found.all():
            return arranged
        others = tuple(d for d in range(found.ndim) if d != chosen)
        holes = np.flatnonzero((found == 0).all(axis=others))
        if len(holes) and arranged.size == arranged.shape[chosen]:
            arranged = arranged.copy()
            arranged.reshape(-1)[holes] = self.atoms.new(len(holes))
        return arranged


def _coordinate(found: Ints, array: Ints, dim: int) -> Ints:
    """Along ``dim`` of the label, the coordinate of every code; -1 for holes."""
    inner = int(np.prod(array.shape[dim + 1 :], dtype=np.int64))
    return np.where(found == 0, -1, (found - 1) // inner % array.shape[dim])


def _varies(coordinate: Ints, dim: int) -> bool:
    if coordinate.shape[dim] < 2:
        return False
    top = coordinate.max(axis=dim, keepdims=True)
    return not bool(((coordinate == top) | (coordinate < 0)).all())


def _stride(coordinate: Ints, dim: int) -> int:
    """By how much the coordinate moves with one step along ``dim``: the larger, the coarser the part."""
    steps = np.abs(np.diff(coordinate, axis=dim))
    moving = steps[steps > 0]
    return int(moving.min()) if moving.size else 0


def _contiguous(block: Ints, dim: int) -> bool:
    """Whether each block's indices stand side by side along ``dim``."""
    line = np.moveaxis(block, dim, -1).reshape(-1, block.shape[dim])[0]
    return int((np.diff(line) != 0).sum()) + 1 == len(np.unique(line))
