"""Which channels depend on which: one analysis of a graph, and the channel groups it finds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import fx
from torch.utils import _pytree as pytree

from fxcompress.graph.channels import contractions, elementwise, moving  # noqa: F401 - each fills the table of rules
from fxcompress.graph.channels.atoms import Classes, Ints
from fxcompress.graph.channels.blocks import EqualCounts, resolve
from fxcompress.graph.channels.labels import Value
from fxcompress.graph.channels.movement import Sites
from fxcompress.graph.channels.walk import Walk

__all__ = ["ChannelGroup", "Channels", "Frozen", "analyse"]

ATTEMPTS = 5
"""A dimension that is taken apart has at most this many parts to try."""

SMALL = 16
"""Kinds of fewer units than this count together with others of their layer."""


@dataclass(frozen=True)
class ChannelGroup:
    """What a user calls the channels of a layer: units of the same kind, each with all its slices.

    ``name``     the layer that makes them
    ``blocks``   units as classes, [blocks, n]: every block (head, group) keeps the same number; one block as a rule
    ``slices``   (tensor, dimension) → the unit of every entry of the tensor's label, in the label's shape
    ``inexact``  why removing a unit changes what remains; empty where it does not
    ``heads``    whether its units are attention heads or dimensions of heads
    """

    name: str
    blocks: Ints
    slices: dict[tuple[str, int], Ints] = field(repr=False)
    inexact: str = ""
    heads: bool = False

    @property
    def size(self) -> int:
        """The number of units."""
        return int(self.blocks.size)


@dataclass(frozen=True)
class Frozen:
    """A layer whose channels stay, and why."""

    layer: str
    reason: str


@dataclass
class Channels:
    """The result of :func:`analyse`.

    ``groups``  what can be pruned, in graph order
    ``frozen``  layers that make channels of which none can be removed, with the reason
    ``walk``    labels of every value; ``classes`` of their atoms
    ``signature``  by class: equal for units that appear in the same dimensions of the same values
    """

    walk: Walk
    classes: Classes
    groups: list[ChannelGroup]
    frozen: list[Frozen]
    signature: np.ndarray

    @property
    def root(self) -> Ints:
        return self.classes.root

    def dimensions(self) -> Iterator[Ints]:
        """The label arrays of every dimension of every tensor and value."""
        values = [v for value in self.walk.env.values() for v in pytree.tree_leaves(value) if isinstance(v, Value)]
        for value in [*self.walk.tensors.values(), *values]:
            yield from (label.array for label in value.labels.values())

    def group(self, name: str) -> ChannelGroup:
        """The group of this name."""
        return next(group for group in self.groups if group.name == name)


def analyse(
    module: fx.GraphModule,
    *,
    frozen: Mapping[str, str] | None = None,
    exact: bool = False,
    heads: bool = False,
    head_dims: bool = True,
    dimension: str = "out",
    refused: Mapping[str, str] | None = None,
) -> Channels:
    """Find the channel groups of a graph with shapes.

    ``frozen``     tensors whose channels stay, with the reason
    ``exact``      leave alone what cannot go without changing remaining values
    ``heads``      attention loses whole heads; otherwise dimensions of heads, if ``head_dims``
    ``refused``    nodes that nothing may be cut through, with the reason
    ``dimension``  ``out``: a group is named after the layer that makes its channels; ``in``: after the first that reads them
    """
    offsets: dict[str, int] = {}
    for _ in range(ATTEMPTS):
        walk = Walk(module, Sites(offsets), refused=refused or {}).run()
        for atoms, reason in walk.atoms.inexact if exact else ():
            walk.atoms.freeze(atoms, f"removing it would not be exact: {reason}")
        if not _advance(walk, offsets, heads):
            break
    _freeze(walk, frozen or {}, None if heads or head_dims else "attention keeps its heads")
    return _Grouping(walk, resolve(walk.atoms, walk.sites.blocks), dimension).run()


def _advance(walk: Walk, offsets: dict[str, int], heads: bool) -> bool:
    """Choose a coarser part where nothing of the finer one can go; returns whether a choice changed."""
    if not walk.sites.parts:
        return False
    classes = walk.atoms.solve()
    frozen, root, changed = classes.is_frozen(), classes.root, False
    for site, parts in walk.sites.parts.items():
        now = offsets.get(site, 0)
        if now + 1 >= parts:
            continue
        prefers = heads and site in walk.attention and now == 0
        if prefers or bool(frozen[root[walk.sites.inputs[site]]].all()):
            offsets[site] = now + 1
            changed = True
    return changed


def _freeze(walk: Walk, frozen: Mapping[str, str], attention: str | None) -> None:
    for name, reason in frozen.items():
        if walk.canonical.get(name) in walk.tensors:
            walk.freeze(walk.tensors[walk.canonical[name]], reason)
    for site in walk.attention if attention else ():
        walk.atoms.freeze(walk.sites.inputs[site], str(attention))


class _Grouping:
    """Classes to groups."""

    def __init__(self, walk: Walk, counts: EqualCounts, dimension: str) -> None:
        self.walk, self.counts, self.dimension = walk, counts, dimension
        self.root = counts.classes.root
        self.is_frozen = counts.classes.is_frozen()
        self.signature = self._signatures()

    def run(self) -> Channels:
        key, count = self._keys()
        members: list[list[Ints]] = [[] for _ in range(count)]
        slices: list[dict[tuple[str, int], Ints]] = [{} for _ in range(count)]
        for (name, dim), roots in self._bound().items():
            owners = np.where(self.is_frozen[roots], -1, key[roots])
            for owner in np.unique(owners[owners >= 0]).tolist():
                slices[owner][name, dim] = roots
                members[owner].append(np.unique(roots[owners == owner]))
        groups = []
        taken: dict[str, int] = {}
        for owner in range(count):
            if members[owner]:
                groups.append(self._group(np.unique(np.concatenate(members[owner])), slices[owner], owner, taken))
        return Channels(self.walk, self.counts.classes, groups, self._stuck(), self.signature)

    def _bound(self) -> dict[tuple[str, int], Ints]:
        tensors = self.walk.tensors.items()
        return {(name, dim): self.root[label.array] for name, value in tensors for dim, label in value.labels.items()}

    def _keys(self) -> tuple[Ints, int]:
        """By class: a number for its group. Units of one block array are one group; others group by what they touch.

        Small kinds of units that one layer makes count together, as the channels of that layer.
        """
        kinds, numbered = np.unique(self.signature, return_inverse=True)
        made = np.full(len(self.root), -1, dtype=np.int64)
        live = ~self.is_frozen
        for number, roots in enumerate(self._made()):
            fresh = roots[(made[roots] < 0) & live[roots]]
            made[fresh] = number
        units = np.bincount(numbered[np.unique(self.root)][live[np.unique(self.root)]], minlength=len(kinds))
        small = (units[numbered] < SMALL) & (made >= 0)
        key = np.where(small, made, numbered + made.max() + 1) + len(self.counts.rows)
        for number, rows in enumerate(self.counts.rows):
            key[rows] = number
        _, key = np.unique(key, return_inverse=True)
        count = int(key.max()) + 1
        order = self._order(key, count)
        return order[key], count

    def _made(self) -> list[Ints]:
        """The classes of every dimension that a layer makes, in graph order."""
        labels = [(self.walk.tensors[name].labels.get(dim), role) for (name, dim), role in self.walk.roles.items()]
        return [np.unique(self.root[label.array]) for label, role in labels if label is not None and role == self.dimension]

    def _order(self, key: Ints, count: int) -> Ints:
        """Renumber groups in the order the graph makes them."""
        seen: dict[int, None] = {}
        for value in self.walk.tensors.values():
            for label in value.labels.values():
                seen.update(dict.fromkeys(np.unique(key[self.root[label.array]]).tolist()))
        order = np.full(count, 0, dtype=np.int64)
        rest = [k for k in range(count) if k not in seen]
        order[[*seen, *rest]] = np.arange(count)
        return order

    def _signatures(self) -> np.ndarray:
        """By class: a sum of random numbers, one for every dimension of every value it appears in."""
        generator = np.random.default_rng(0)
        total = np.zeros(len(self.root), dtype=np.uint64)
        values = list(self.walk.tensors.values())
        values += [v for value in self.walk.env.values() for v in pytree.tree_leaves(value) if isinstance(v, Value)]
        for value in values:
            for label in value.labels.values():
                mark = generator.integers(1, 1 << 63, dtype=np.uint64)
                counted = np.bincount(self.root[label.array].ravel(), minlength=0).astype(np.uint64)
                total[: len(counted)] += counted * mark
        return total

    def _group(self, units: Ints, slices: dict[tuple[str, int], Ints], owner: int, taken: dict[str, int]) -> ChannelGroup:
        rows = next((rows for rows in self.counts.rows if rows[0, 0] in units), units[None, :])
        name = self._name(slices)
        taken[name] = taken.get(name, 0) + 1
        if taken[name] > 1:
            name = f"{name}#{taken[name]}"
        inexact = next((r for u in units.tolist() if (r := self.counts.classes.inexact.get(u))), "")
        return ChannelGroup(name, rows, slices, inexact, self._is_attention(units))

    def _is_attention(self, units: Ints) -> bool:
        inside = [self.walk.sites.inputs[site] for site in self.walk.attention]
        return any(bool(np.isin(self.root[atoms], units).any()) for atoms in inside)

    def _name(self, slices: dict[tuple[str, int], Ints]) -> str:
        roles = self.walk.roles
        for role in (self.dimension, "out", "in", "norm", None):
            for tensor, dim in slices:
                if role is None or roles.get((tensor, dim)) == role:
                    return layer_of(tensor)
        return "?"

    def _stuck(self) -> list[Frozen]:
        found = []
        reasons = self.counts.classes.frozen
        for (name, dim), role in self.walk.roles.items():
            label = self.walk.tensors[name].labels.get(dim)
            if role != "out" or label is None or not name.endswith("weight"):
                continue
            roots = self.root[label.array].ravel()
            if self.is_frozen[roots].all():
                found.append(Frozen(layer_of(name), reasons.get(int(roots[0]), "it stays whole")))
        return found


def layer_of(tensor: str) -> str:
    """The layer a parameter belongs to: its module, below any parametrization; a parameter of no layer by its own name."""
    held, found, _ = tensor.partition("parametrizations.")
    if found:
        return held.rstrip(".")
    owner, _, leaf = tensor.rpartition(".")
    return owner if owner and leaf.startswith(("weight", "bias", "running_")) else tensor
