"""Decisions that code takes by sizes while it is traced: guarded at every call, or said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxcompress.graph import edit
from fxcompress.graph.guards import guard, guard_size
from fxcompress.graph.known import MANY, Known, Shapes, leading_size, resized

__all__ = ["DECIDED_SIZES", "Decisions"]

DECIDED_SIZES = "its code decides by sizes, and what it does for others is not kept: {}"

Decision = tuple[fx.Node, Callable[[Any], Any]]
"""A value, and what was made of it."""

Look = Callable[[Sequence[Shapes]], Known]
"""From arguments of several calls to what values are in them."""


class Decisions:
    """What code was told of values, and went one way for; ``singular`` are those that are others for one sample."""

    def __init__(self) -> None:
        self.taken: dict[Decision, Any] = {}
        self.singular: set[Decision] = set()
        self.ranks: set[fx.Node] = set()

    def forget(self, erased: set[fx.Node]) -> None:
        """Leave out what was asked of nodes that are not in the graph any more."""
        self.taken = {decision: outcome for decision, outcome in self.taken.items() if decision[0] not in erased}
        self.singular = {decision for decision in self.singular if decision[0] not in erased}
        self.ranks -= erased

    def settle(self, known: Known, examples: Mapping[str, Any], look: Look) -> list[str]:
        """Guard decisions in the graph; the sizes in ``examples`` that they depend on, each in words.

        What arguments do not say, and no size of theirs changes, follows from their dimensions and kinds, which are guarded.
        """
        said = [decision for decision in self.taken if known.is_said_by_arguments(decision[0])]
        others = [decision for decision in self.taken if decision not in said]
        sizes: dict[str, None] = {}
        for key, places in _together(examples).items():
            depending = self._depending(look, [resized(examples, {key: size}) for size in (key[1] + 1, MANY * key[1])])
            sizes |= dict.fromkeys(places if depending else ())
            said += [(node, form) for node, form in depending if form is not len and (node, form) not in said]
        _guard_inputs(known, self.ranks | {node for node, _ in others})
        for node, form in (decision for decision in said if decision not in self.singular):
            guard_size(_formed(node, form), self.taken[node, form])
        return list(sizes)

    def _depending(self, look: Look, calls: list[Shapes]) -> list[Decision]:
        """The decisions that would be others in one of these calls."""
        known = look(calls)
        return [
            (node, form)
            for (node, form), outcome in self.taken.items()
            if any(known.differs(node, form, outcome, call, alone=True) for call in range(len(calls)))
        ]


def _together(examples: Mapping[str, Any]) -> dict[tuple[int, int], list[str]]:
    """Dimensions that have one size together, in words; the batch is left out."""
    together: dict[tuple[int, int], list[str]] = {}
    for name, tensor in _tensors(examples):
        for dim, size in enumerate(tensor.shape):
            together.setdefault((dim, size), []).append(f"dimension {dim} of {name}")
    together.pop((0, leading_size(examples)), None)
    return together


def _tensors(examples: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in examples.items():
        yield from ((name, leaf) for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))


def _guard_inputs(known: Known, asked: set[fx.Node]) -> None:
    """Guard dimensions and kinds of the arguments that these values follow from."""
    inputs = {source for node in asked for source in edit.ancestors(node) if source.op == "placeholder"}
    for node in sorted(inputs):
        value = known.value(node)
        if isinstance(value, torch.Tensor):
            guard(node, str(node.target), value)


def _formed(node: fx.Node, form: Callable[[Any], Any]) -> fx.Node:
    """A node that makes of ``node`` what code asked for."""
    if form not in (bool, len):
        return node
    place = next(reversed(node.graph.find_nodes(op="placeholder"))) if node.op == "placeholder" else node
    with node.graph.inserting_after(place):
        made = node.graph.call_function(form, (node,))
    made.meta |= {key: node.meta[key] for key in ("nn_module_stack",) if key in node.meta}  # it is asked there
    return made
