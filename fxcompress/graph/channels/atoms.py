"""Atoms: one integer per index of every tensor dimension, and the classes that must be removed together.

Atom 0 stands for an index that has no class of its own (it stays). Everything is held in integer arrays; classes are found
for all atoms at once by hooking and pointer jumping (Shiloach & Vishkin 1982), in a number of array operations that grows
with the logarithm of the longest chain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Atoms", "Classes", "Ints"]

Ints = NDArray[np.int64]


class Atoms:
    """Collects atoms, which of them belong together, which may not go, and which cannot go without changing values."""

    def __init__(self) -> None:
        self.count = 1
        self._edges: list[tuple[Ints, Ints]] = []
        self._frozen: list[tuple[Ints, str]] = []
        self.inexact: list[tuple[Ints, str]] = []
        self._copies: list[tuple[int, Ints]] = []
        self._ranked: list[Ints] = []

    def new(self, *shape: int) -> Ints:
        """Fresh atoms in an array of this shape."""
        size = math.prod(shape)
        made = np.arange(self.count, self.count + size, dtype=np.int64).reshape(shape)
        self.count += size
        return made

    def merge(self, first: Ints, second: Ints, where: str) -> None:
        """Broadcast two arrays and put each pair in one class; the partner of a 0 is frozen."""
        if first is second:
            return
        if first.shape != second.shape:
            first, second = np.broadcast_arrays(first, second)
        first, second = first.ravel(), second.ravel()
        holes = (first == 0) != (second == 0)
        if holes.any():
            self.freeze(np.maximum(first, second)[holes], f"meets a value of fixed size at {where}")
        self._edges.append((first, second))

    def tie(self, array: Ints, *axes: int) -> Ints:
        """Merge along every one of ``axes``; returns the array with each of them reduced to its first index."""
        for axis in axes:
            first = array.take([0], axis=axis)
            if array.shape[axis] > 1:
                self.merge(np.ascontiguousarray(np.broadcast_to(first, array.shape)), array, "a shared index")
            array = first
        return array

    def line(self, array: Ints, axis: int) -> Ints:
        """The atoms along ``axis`` alone, [n]: what lies across it is merged."""
        return self.tie(array, *(other for other in range(array.ndim) if other != axis)).reshape(-1)

    def told_apart(self, line: Ints, where: str) -> Ints:
        """The line with atoms of its own where one atom stands in it several times, so that what comes of each is known.

        They are numbered in the order of the atoms that they come from, then by position.
        """
        live = line[line > 0]
        if len(np.unique(live)) == len(live):
            return line
        fresh, order = np.empty_like(line), np.argsort(line, kind="stable")
        self._copies.append((self.count, line[order]))
        fresh[order] = self.new(len(line))
        made = np.where(line > 0, fresh, 0)
        self.merge(made, line, where)
        return made

    def origins(self, atoms: Ints) -> Ints:
        """The atoms that these were told apart from; others are their own."""
        found = atoms.copy()
        for start, copied in reversed(self._copies):
            own = (found >= start) & (found < start + len(copied))
            found[own] = copied[found[own] - start]
        return found

    def rank(self, rows: Ints) -> None:
        """The atoms of each row are of one unit, and take part in it in this order."""
        self._ranked.append(rows)

    def ranks(self) -> Ints:
        """By atom: what its place among those of its unit goes by first, before its number."""
        found = np.zeros(self.count, dtype=np.int64)
        for rows in self._ranked:
            found[rows] = np.arange(rows.shape[1])
        return found

    def freeze(self, atoms: Ints, reason: str) -> None:
        """These atoms stay."""
        self._frozen.append((atoms.ravel(), reason))

    def doubt(self, atoms: Ints, reason: str) -> None:
        """Removing these atoms changes values that remain."""
        self.inexact.append((atoms.ravel(), reason))

    def solve(self) -> Classes:
        """The classes as they stand."""
        root = np.arange(self.count, dtype=np.int64)
        if self._edges:
            a = np.concatenate([first for first, _ in self._edges])
            b = np.concatenate([second for _, second in self._edges])
            keep = (a != b) & (a != 0) & (b != 0)
            _hook(root, a[keep], b[keep])
        return Classes(root, _first_reasons(root, self._frozen), _first_reasons(root, self.inexact))


@dataclass(frozen=True)
class Classes:
    """``root[atom]`` names the class; the mappings give a reason for each class that is frozen or inexact."""

    root: Ints
    frozen: dict[int, str]
    inexact: dict[int, str]

    def is_frozen(self) -> NDArray[np.bool_]:
        """By root: whether the class stays. Class 0 does."""
        flags = np.zeros(len(self.root), dtype=bool)
        flags[0] = True
        flags[list(self.frozen)] = True
        return flags


def _hook(parent: Ints, a: Ints, b: Ints) -> None:
    """Make ``parent`` the root of every node, given edges ``a``-``b``; roots are the smallest members."""
    while len(a):
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while True:
            grand = parent[parent]
            if np.array_equal(grand, parent):
                break
            parent[:] = grand
        a, b = parent[a], parent[b]
        keep = a != b
        a, b = a[keep], b[keep]


def _first_reasons(root: Ints, marks: list[tuple[Ints, str]]) -> dict[int, str]:
    """Class → the first reason that was given for one of its atoms."""
    if not marks:
        return {}
    number = np.repeat(np.arange(len(marks)), [len(atoms) for atoms, _ in marks])
    classes, first = np.unique(root[np.concatenate([atoms for atoms, _ in marks])], return_index=True)
    return {c: marks[n][1] for c, n in zip(classes.tolist(), number[first].tolist(), strict=True) if c}
