"""Labels: which atom removes which index of a tensor dimension.

The label of a dimension is an integer array of the tensor's rank: full along that dimension, of size one along those it
does not depend on. It depends on another where every index of the other (every attention head, every group of a
convolution) has channels of its own, of which each may keep different ones as long as the number is equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils import _pytree as pytree

from fxcompress.graph.channels.atoms import Atoms, Ints

__all__ = ["Label", "Value", "aligned", "alone", "broadcast", "join", "map_values", "moved", "row", "values_in"]


@dataclass(frozen=True)
class Label:
    """``array`` as above; ``zero``: entries are zero once what produces them is; ``sites``: splits it came through."""

    array: Ints
    zero: bool = True
    sites: frozenset[str] = frozenset()

    def with_array(self, array: Ints) -> Label:
        return Label(array, self.zero, self.sites)


@dataclass
class Value:
    """A tensor of the graph: its shape, and labels for those dimensions whose indices may go; the others stay whole."""

    shape: tuple[int, ...]
    labels: dict[int, Label] = field(default_factory=dict)

    def dim(self, dim: int) -> int:
        """``dim`` counted from the front."""
        return dim % len(self.shape) if self.shape else 0

    def without(self, *dims: int) -> Value:
        """The same tensor with some dimensions no longer labelled."""
        return Value(self.shape, {d: label for d, label in self.labels.items() if d not in dims})


def values_in(structure: Any) -> list[Value]:
    """Every tensor in what a node gives, in order."""
    if isinstance(structure, Value):
        return [structure]
    return [leaf for leaf in pytree.tree_leaves(structure) if isinstance(leaf, Value)]


def map_values(function: Callable[[Value], Any], structure: Any) -> Any:
    """What a node gives with ``function`` of every tensor in its place."""
    if isinstance(structure, Value):
        return function(structure)
    return pytree.tree_map_only(Value, function, structure)


def aligned(array: Ints, rank: int) -> Ints:
    """``array`` with leading dimensions of size one up to ``rank``, as broadcasting adds them."""
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


def moved(array: Ints, dims: dict[int, int], rank: int) -> Ints:
    """``array`` in a tensor of another rank: old dimension → new dimension; dimensions that are not named have size one."""
    shape = [1] * rank
    order = sorted(dims, key=dims.__getitem__)
    for old in order:
        shape[dims[old]] = array.shape[old]
    rest = [d for d in range(array.ndim) if d not in dims]
    return array.transpose(order + rest).reshape(shape)


def alone(atoms: Atoms, value: Value, dim: int) -> Ints | None:
    """The atoms along one dimension by themselves, other dimensions tied; None where it is not labelled."""
    label = value.labels.get(dim)
    if label is None:
        return None
    others = [other for other, size in enumerate(label.array.shape) if other != dim and size > 1]
    if others:
        value.labels[dim] = label = label.with_array(atoms.tie(label.array, *others))
    return label.array.reshape(-1)


def row(array: Ints, dim: int) -> Ints:
    """The atoms along ``dim`` in the first of the blocks that keep as many each."""
    first: Ints = np.moveaxis(array, dim, -1).reshape(-1, array.shape[dim])[0]
    return first


def join(atoms: Atoms, labels: list[Label], where: str) -> Label:
    """One label for a dimension that several operands share: corresponding indices go together."""
    base = min(labels, key=lambda label: label.array.size)
    for other in labels:
        if other is not base:
            atoms.merge(base.array, other.array, where)
    sites = base.sites.union(*(label.sites for label in labels))
    return Label(base.array, all(label.zero for label in labels), sites)


def broadcast(
    atoms: Atoms, values: list[Value], shape: tuple[int, ...], where: str, zero: str = "never"
) -> dict[int, Label]:
    """Labels of a pointwise result: operands of full size along a dimension share its indices; size one does not count.

    ``zero`` says when the result of zeros is zero: ``all`` operands are, ``any`` is, or ``never``.
    """
    found: dict[int, Label] = {}
    rank = len(shape)
    for dim, size in enumerate(shape):
        if size == 1:
            continue
        labels, fixed = _along(values, dim, rank)
        if not labels:
            continue
        joined = join(atoms, labels, where)
        if fixed:
            atoms.freeze(joined.array, f"meets a value of fixed size at {where}")
            continue
        zeros = [label.zero for label in labels]
        is_zero = any(zeros) if zero == "any" else zero == "all" and all(zeros) and len(labels) == len(values)
        found[dim] = Label(joined.array, is_zero, joined.sites)
    return found


def _along(values: list[Value], dim: int, rank: int) -> tuple[list[Label], bool]:
    """The operands' labels along one dimension of the result, and whether an operand is whole there."""
    labels, fixed = [], False
    for value in values:
        own = dim - (rank - len(value.shape))
        if own < 0 or value.shape[own] == 1:
            continue
        if own in value.labels:
            label = value.labels[own]
            labels.append(label.with_array(aligned(label.array, rank)))
        else:
            fixed = True
    return labels, fixed
