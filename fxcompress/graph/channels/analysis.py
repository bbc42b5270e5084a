"""Which channels depend on which: one analysis of a graph, and the channel groups it finds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from torch import fx

from fxcompress.graph.channels import (  # noqa: F401 - each fills the table of rules
    contractions,
    convolutions,
    elementwise,
    making,
    moving,
    sequences,
    writing,
)
from fxcompress.graph.channels.atoms import Classes, Ints
from fxcompress.graph.channels.blocks import EqualCounts, resolve
from fxcompress.graph.channels.labels import values_in
from fxcompress.graph.channels.movement import Sites
from fxcompress.graph.channels.walk import Walk
from fxcompress.graph.collector import collector_paused

__all__ = ["ChannelGroup", "Channels", "Frozen", "analyse", "group_name", "layer_of"]

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
    ``whole``   grouped convolutions that were asked to lose whole groups
    ``signature``  by class: equal for units that appear in the same dimensions of the same values
    """

    walk: Walk
    classes: Classes
    groups: list[ChannelGroup]
    frozen: list[Frozen]
    signature: np.ndarray
    whole: tuple[str, ...] = ()

    @property
    def root(self) -> Ints:
        return self.classes.root

    @functools.cached_property
    def dimensions(self) -> tuple[Ints, Ints]:
        """The classes along every labelled dimension of every tensor and value, end to end, and where each one starts."""
        values = [v for value in self.walk.env.values() for v in values_in(value)]
        labels = [label for value in [*self.walk.tensors.values(), *values] for label in value.labels.values()]
        arrays = list({id(label.array): label.array.ravel() for label in labels}.values())
        starts = np.cumsum([0, *(len(array) for array in arrays)])[:-1]
        return self.root[np.concatenate(arrays)] if arrays else np.empty(0, dtype=np.int64), starts

    def without(self, names: Container[str]) -> Channels:
        """The same analysis with some groups left out, whose channels all stay."""
        return replace(self, groups=[group for group in self.groups if group.name not in names])

    def group(self, name: str) -> ChannelGroup:
        """The group of this name."""
        return next(group for group in self.groups if group.name == name)


@collector_paused()
def analyse(
    module: fx.GraphModule,
    *,
    frozen: Mapping[str, str] | None = None,
    exact: bool = False,
    heads: bool = False,
    head_dims: bool = True,
    dimension: str = "out",
    whole: Callable[[str], bool] = lambda name: False,
    refused: Mapping[str, str] | None = None,
) -> Channels:
    """Find the channel groups of a graph with shapes.

    ``frozen``     tensors of layers whose channels stay, with the reason: what they make, or with ``dimension`` ``in`` what
                   they read; their other side follows what goes around them
    ``exact``      leave alone what cannot go without changing remaining values
    ``heads``      attention loses whole heads; otherwise dimensions of heads, if ``head_dims``
    ``whole``      whether a grouped convolution loses whole groups; the others lose equal numbers of channels from every one
    ``refused``    nodes that nothing may be cut through, with the reason
    ``dimension``  ``out``: a group is named after the layer that makes its channels; ``in``: after the first that reads them
    """
    offsets: dict[str, int] = {}
    for _ in range(ATTEMPTS):
        walk = Walk(module, Sites(offsets), refused=refused or {}).run()
        for atoms, reason in walk.atoms.inexact if exact else ():
            walk.atoms.freeze(atoms, f"removing it would not be exact: {reason}")
        coarse = {site for site in walk.grouped if whole(group_name(site))} | (walk.attention if heads else set())
        if not _advance(walk, offsets, coarse):
            break
    _freeze(walk, frozen or {}, dimension, None if heads or head_dims else "attention keeps its heads")
    return _Grouping(walk, resolve(walk.atoms, walk.sites.blocks), dimension).run()


def group_name(site: str) -> str:
    """The convolution whose channels split into groups at this site."""
    return site.removesuffix(":groups")


def _advance(walk: Walk, offsets: dict[str, int], coarse: set[str]) -> bool:
    """Choose a coarser part at the sites ``coarse``, and where nothing of the finer one can go; returns whether a choice
    changed.

    The first are chosen by themselves: what looked stuck beside head dimensions may go with heads.
    """
    left = {site for site, parts in walk.sites.parts.items() if offsets.get(site, 0) + 1 < parts}
    chosen = {site for site in left & coarse if not offsets.get(site)}
    if left and not chosen:
        classes = walk.atoms.solve()
        chosen = {site for site in left if _is_stuck(classes, walk.sites.inputs[site])}
    offsets.update({site: offsets.get(site, 0) + 1 for site in chosen})
    return bool(chosen)


def _is_stuck(classes: Classes, atoms: Ints) -> bool:
    """Whether none of these atoms can go: all are frozen, or they are one unit, and one has to stay."""
    units = classes.root[atoms]
    return bool(classes.is_frozen()[units].all() or (units == units[0]).all())


def _freeze(walk: Walk, frozen: Mapping[str, str], dimension: str, attention: str | None) -> None:
    follows = {"out": "in", "in": "out"}[dimension]
    for name, reason in frozen.items():
        held = walk.canonical.get(name, name)
        for dim, label in walk.tensors[held].labels.items() if held in walk.tensors else ():
            if walk.roles.get((held, dim)) != follows:
                walk.freeze(label, reason)
    for site in walk.attention if attention else ():
        walk.atoms.freeze(walk.sites.inputs[site], str(attention))


class _Grouping:
    """Classes to groups."""

    def __init__(self, walk: Walk, counts: EqualCounts, dimension: str) -> None:
        self.walk, self.counts, self.dimension = walk, counts, dimension
        self.root = counts.classes.root
        self.is_frozen = counts.classes.is_frozen()
        self.doubted = np.zeros(len(self.root), dtype=bool)
        self.doubted[list(counts.classes.inexact)] = True
        self.heads = np.zeros(len(self.root), dtype=bool)
        for site in walk.attention:
            self.heads[self.root[walk.sites.inputs[site]]] = True
        self.signature = self._signatures()

    def run(self) -> Channels:
        arrays = {(n, dim): label.array for n, value in self.walk.tensors.items() for dim, label in value.labels.items()}
        roots = {key: self.root[array] for key, array in {id(array): array for array in arrays.values()}.items()}
        bound = {place: roots[id(array)] for place, array in arrays.items()}
        units, key = self._keys(bound)
        by_unit = np.full(len(self.root), -1, dtype=np.int64)
        by_unit[units] = key
        slices: list[dict[tuple[str, int], Ints]] = [{} for _ in range(int(key.max(initial=-1)) + 1)]
        places = list(bound)
        owners = by_unit[np.concatenate([bound[place].ravel() for place in places])] if places else key
        number = np.repeat(np.arange(len(places)), [bound[place].size for place in places])
        pairs = owners[owners >= 0] * len(places) + number[owners >= 0]
        for pair in np.unique(pairs[np.diff(pairs, prepend=-1) != 0]).tolist():  # most stand in runs of the same
            owner, place = divmod(pair, len(places))
            slices[owner][places[place]] = bound[places[place]]
        order = np.argsort(key, kind="stable")
        members = np.split(units[order], np.cumsum(np.bincount(key))[:-1]) if len(units) else []
        taken: dict[str, int] = {}
        groups = [self._group(found, slices[owner], taken) for owner, found in enumerate(members)]
        return Channels(self.walk, self.counts.classes, groups, self._stuck(), self.signature)

    def _keys(self, bound: dict[tuple[str, int], Ints]) -> tuple[Ints, Ints]:
        """The units, and the number of each one's group, in the order the graph makes them.

        Units of one block array are one group; others group by what they touch. Small kinds of units that one layer makes
        count together, as the channels of that layer.
        """
        distinct = {id(roots): roots for roots in bound.values()}.values()
        every = np.concatenate([roots.ravel() for roots in distinct]) if distinct else np.empty(0, dtype=np.int64)
        units, first = np.unique(every, return_index=True)
        live = ~self.is_frozen[units]
        units, first = units[live], first[live]
        _, kind, sizes = np.unique(self.signature[units], return_inverse=True, return_counts=True)
        made = self._made(bound)[units]
        key = np.where((sizes[kind] < SMALL) & (made >= 0), made, kind + len(bound)) + len(self.counts.rows)
        by_unit = np.full(len(self.root), -1, dtype=np.int64)
        for number, rows in enumerate(self.counts.rows):
            by_unit[rows] = number
        key = np.where(by_unit[units] >= 0, by_unit[units], key)
        _, start, group = np.unique(key[np.argsort(first)], return_index=True, return_inverse=True)
        rank = np.empty(len(start), dtype=np.int64)
        rank[np.argsort(start)] = np.arange(len(start))
        numbered = np.empty(len(units), dtype=np.int64)
        numbered[np.argsort(first)] = rank[group]
        return units, numbered

    def _made(self, bound: dict[tuple[str, int], Ints]) -> Ints:
        """By class: the number of the first layer dimension that makes it; -1 where none does."""
        made = np.full(len(self.root), -1, dtype=np.int64)
        places = [place for place in self.walk.roles if self.walk.roles[place] == self.dimension and place in bound]
        for number in range(len(places) - 1, -1, -1):
            made[bound[places[number]]] = number
        return made

    def _signatures(self) -> np.ndarray:
        """By class: a sum of random numbers, one for every dimension of every value it appears in."""
        generator = np.random.default_rng(0)
        total = np.zeros(len(self.root), dtype=np.uint64)
        values = list(self.walk.tensors.values())
        values += [v for value in self.walk.env.values() for v in values_in(value)]
        arrays = [label.array.ravel() for value in values for label in value.labels.values()]
        if arrays:
            marks = generator.integers(1, 1 << 63, size=len(arrays), dtype=np.uint64)
            np.add.at(total, self.root[np.concatenate(arrays)], np.repeat(marks, [len(array) for array in arrays]))
        return total

    def _group(self, units: Ints, slices: dict[tuple[str, int], Ints], taken: dict[str, int]) -> ChannelGroup:
        rows = next((rows for rows in self.counts.rows if rows[0, 0] in units), units[None, :])
        name = self._name(slices)
        taken[name] = taken.get(name, 0) + 1
        if taken[name] > 1:
            name = f"{name}#{taken[name]}"
        doubtful = units[self.doubted[units]]
        inexact = self.counts.classes.inexact[int(doubtful[0])] if len(doubtful) else ""
        return ChannelGroup(name, rows, slices, inexact, bool(self.heads[units].any()))

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
