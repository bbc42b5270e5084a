"""Equal counts: which channels may go one by one, and which only in equal numbers from every head or group."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fxcompress.graph.channels.atoms import Atoms, Classes, Ints

__all__ = ["EqualCounts", "resolve"]


@dataclass
class EqualCounts:
    """``rows`` are arrays [blocks, n] of classes: every block of one array keeps the same number."""

    classes: Classes
    rows: list[Ints]


class _IrregularError(Exception):
    """These blocks cannot keep indices of their own."""

    def __init__(self, array: Ints) -> None:
        super().__init__()
        self.array = array


def resolve(atoms: Atoms, wanted: list[tuple[Ints, str]]) -> EqualCounts:
    """Solve, and settle what wants equal counts: as blocks where they are disjoint and nest, as shared indices otherwise."""
    while True:
        classes = atoms.solve()
        try:
            return EqualCounts(classes, _settled(classes, wanted))
        except _IrregularError as found:
            array = found.array
            tied = np.ascontiguousarray(np.broadcast_to(array[:1], array.shape))
            atoms.merge(tied, array, "heads or groups that share indices")


def _settled(classes: Classes, wanted: list[tuple[Ints, str]]) -> list[Ints]:
    frozen = classes.is_frozen()
    found = []
    for array, _ in wanted:
        rows = _regular(classes.root[array], frozen, array)
        if rows is not None:
            found.append((rows, array))
    found.sort(key=lambda pair: -len(pair[0]))
    owner = np.full(len(classes.root), -1, dtype=np.int64)
    block = np.full(len(classes.root), -1, dtype=np.int64)
    settled: list[Ints] = []
    for rows, array in found:
        owners = np.unique(owner[rows])
        if len(owners) > 1:
            raise _IrregularError(array)
        if owners[0] == -1:
            owner[rows], block[rows] = len(settled), np.arange(len(rows))[:, None]
            settled.append(rows)
        elif not _nests(rows, settled[owners[0]], block):
            raise _IrregularError(array)
    return settled


def _regular(rows: Ints, frozen: np.ndarray, array: Ints) -> Ints | None:
    """Disjoint blocks of the same number of units, frozen ones left out; None where every choice keeps equal counts."""
    live = ~frozen[rows]
    if not live.any():
        return None
    counts = live.sum(axis=1)
    ordered = np.sort(np.where(live, rows, -1), axis=1)
    _, first = np.unique(ordered, axis=0, return_index=True)  # rows of the same units are one block
    if len(first) == 1:
        return None
    rows, live, counts = rows[np.sort(first)], live[np.sort(first)], counts[np.sort(first)]
    if (counts != counts[0]).any():
        raise _IrregularError(array)
    units = [np.unique(row[mask], return_counts=True) for row, mask in zip(rows, live, strict=True)]
    sizes = {len(values) for values, _ in units}
    times = {int(t) for _, repeated in units for t in np.unique(repeated)}
    together = np.concatenate([values for values, _ in units])
    if len(sizes) > 1 or len(times) > 1 or len(np.unique(together)) < len(together):
        raise _IrregularError(array)
    return together.reshape(len(rows), -1)


def _nests(rows: Ints, finer: Ints, block: Ints) -> bool:
    """Whether every row is made of whole blocks of ``finer``, as many as every other row."""
    whole = [np.unique(block[row], return_counts=True) for row in rows]
    numbers = {len(blocks) for blocks, _ in whole}
    return len(numbers) == 1 and all(bool((counts == finer.shape[1]).all()) for _, counts in whole)
