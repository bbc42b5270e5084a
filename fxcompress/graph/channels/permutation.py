"""The oracle of permutation: channels of one kind are interchangeable.

Permuting them in every tensor they own must not change what the dense model computes. A forgotten reader, a wrong offset or
a wrong pairing does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from fxcompress.graph.channels.analysis import Channels
from fxcompress.graph.channels.atoms import Ints
from fxcompress.graph.channels.labels import Value

__all__ = ["permuted", "permuter"]


@contextmanager
def permuted(channels: Channels, seed: int = 0) -> Iterator[None]:
    """Inside, the units of every kind are permuted, within their block, in every tensor of the graph."""
    walk, permute = channels.walk, permuter(channels, seed)
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for name, value in walk.tensors.items():
            for same in (name, *walk.alike.get(name, ())) if name in walk.state else ():
                held, data = walk.state[same], walk.state[same].data
                changed = permute(data, value)
                if changed is not data:
                    saved.append((held, data))
                    held.data = changed
        yield
    finally:
        for held, data in saved:
            held.data = data


def permuter(channels: Channels, seed: int = 0) -> Callable[[torch.Tensor, Value], torch.Tensor]:
    """What permutes the units of every kind, within their block, in a tensor of the graph whose labels are given."""
    root, exchanged = channels.root, _exchange(channels, np.random.default_rng(seed))
    rank = channels.walk.atoms.ranks()

    def permute(tensor: torch.Tensor, value: Value) -> torch.Tensor:
        dims = [dim for dim, label in value.labels.items() if _moves(root[label.array], exchanged)]
        for dim in sorted(dims, key=lambda d: -int(value.labels[d].array.size)):
            tensor = _permute(tensor, dim, value.labels[dim].array, root, exchanged, rank)
        return tensor

    return permute


def _moves(roots: Ints, exchanged: Ints) -> bool:
    return bool((exchanged[roots] != roots).any())


def _exchange(channels: Channels, generator: np.random.Generator) -> Ints:
    """By class: which class takes its place."""
    exchanged = np.arange(len(channels.root), dtype=np.int64)
    for group in channels.groups:
        for row in group.blocks:
            kinds = channels.signature[row]
            for kind in np.unique(kinds):
                units = row[kinds == kind]
                exchanged[units] = generator.permutation(units)
    return exchanged


def _permute(tensor: torch.Tensor, dim: int, atoms: Ints, root: Ints, exchanged: Ints, rank: Ints) -> torch.Tensor:
    """The k-th slice of each unit takes the values of the k-th slice of the unit that replaces it.

    Slices of one unit are counted by the rank of their atoms, by the atoms, which follows where they come from, and then by
    position.
    """
    if atoms.size == atoms.shape[dim]:
        found = _positions(atoms.ravel(), root, exchanged, rank)
        return tensor.index_select(dim, torch.from_numpy(found).to(tensor.device))
    lines = np.moveaxis(atoms, dim, -1)
    flat = lines.reshape(-1, lines.shape[-1])
    rows, which = np.unique(flat, axis=0, return_inverse=True)
    index = np.stack([_positions(row, root, exchanged, rank) for row in rows])[which.reshape(-1)]
    order = np.moveaxis(index.reshape(lines.shape), -1, dim)
    return tensor.gather(dim, torch.from_numpy(np.ascontiguousarray(order)).to(tensor.device).expand(tensor.shape))


def _positions(atoms: Ints, root: Ints, exchanged: Ints, rank: Ints) -> Ints:
    line = root[atoms]
    order = np.lexsort((np.arange(len(line)), atoms, rank[atoms], line))
    ordered = line[order]
    place = np.empty_like(line)
    place[order] = np.arange(len(line))
    place -= np.searchsorted(ordered, line)
    found: Ints = order[np.searchsorted(ordered, exchanged[line]) + place]
    return found
