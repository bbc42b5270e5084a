"""Which channel groups an oracle objects to, when it objects to an analysis as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxcompress.errors import DataError
from fxcompress.graph.channels.analysis import ChannelGroup, Channels
from fxcompress.graph.channels.atoms import Ints
from fxcompress.graph.channels.calls import place
from fxcompress.graph.channels.cut import cut
from fxcompress.graph.channels.kept import Kept, select
from fxcompress.graph.channels.labels import Value
from fxcompress.graph.channels.permutation import permuted, permuter
from fxcompress.graph.channels.proof import Proof, relative_error, tolerance
from fxcompress.graph.channels.rewriting import UnprovableError
from fxcompress.graph.channels.silence import Silent
from fxcompress.graph.channels.walk import Walk
from fxcompress.graph.inputs import Arguments
from fxcompress.graph.recorder import Recorder
from fxcompress.graph.tree import evaluating

__all__ = ["Before", "culprits"]


class Before:
    """What a cut changes, as it is now, to be put back."""

    def __init__(self, walk: Walk) -> None:
        self.walk, self.state = walk, dict(walk.state)
        parts = walk.module.modules()
        self.parts = [(part, {k: v.copy() if isinstance(v, dict) else v for k, v in vars(part).items()}) for part in parts]
        self.nodes = {n: (n.op, n.target, n.args, n.kwargs, dict(n.meta)) for n in walk.module.graph.nodes}

    def restore(self) -> None:
        """Everything as it was, the analysis included."""
        graph = self.walk.module.graph
        for node, (op, target, args, kwargs, meta) in self.nodes.items():
            node.op, node.target, node.args, node.kwargs, node.meta = op, target, args, kwargs, meta
        for node in [n for n in graph.nodes if n not in self.nodes][::-1]:
            graph.erase_node(node)
        for part, held in self.parts:
            vars(part).clear()
            vars(part).update({k: v.copy() if isinstance(v, dict) else v for k, v in held.items()})
        self.walk.state.update(self.state)


@dataclass(frozen=True)
class _Judge:
    """Asks both oracles about some of the groups, as if the others stayed; the graph is as it was afterwards."""

    channels: Channels
    removed: Ints
    call: Arguments
    seed: int

    def objects(self, groups: list[ChannelGroup]) -> tuple[str, float] | None:
        """The oracle that finds more than rounding where just these groups are permuted and cut, and the error it finds."""
        part, removed = self._only(groups)
        before = Before(self.channels.walk)
        try:
            proof = Proof(part, removed, self.call, self.seed)
            cut(part, removed)
            errors = proof.errors()
        except UnprovableError:  # a cut that has no proof is not made, and says nothing about the analysis
            return None
        finally:
            before.restore()
        allowed = tolerance(self.channels.walk.module)
        return next(((oracle, error) for oracle, error in errors.items() if not error <= allowed), None)

    def search(self, groups: list[ChannelGroup]) -> list[tuple[ChannelGroup, str, float]]:
        """Every group that an oracle objects to by itself, found by halving."""
        found = self.objects(groups)
        if found is None:
            return []
        if len(groups) == 1:
            return [(groups[0], *found)]
        half = len(groups) // 2
        return self.search(groups[:half]) + self.search(groups[half:])

    def where(self, group: ChannelGroup, oracle: str) -> str:
        """The first place in the graph where the two runs that an oracle compares are not the same."""
        part, removed = self._only([group])
        walk, module, before = part.walk, part.walk.module, Before(part.walk)
        try:
            with evaluating(module):
                if oracle == "permutation":
                    dense, change = _Kept(Recorder(module), self.call), permuter(part, self.seed)
                    with permuted(part, self.seed):
                        other = _Kept(Recorder(module), self.call)
                else:
                    kept = Kept.without(part.root, removed)
                    dense, change = (
                        _Kept(Silent(walk, kept), self.call),
                        lambda tensor, value: select(tensor, kept.masks(value)),
                    )
                    cut(part, removed)
                    other = _Kept(Recorder(module), self.call)
        finally:
            before.restore()
        allowed = tolerance(module)
        for node, value in dense.values.items():
            if not node.op.startswith("call") or node not in other.values:
                continue
            expected = _changed(value, walk.env[node], change)
            if not relative_error(expected, pytree.tree_leaves(other.values[node])) <= allowed:
                return place(node)
        return other.end

    def _only(self, groups: list[ChannelGroup]) -> tuple[Channels, Ints]:
        units = np.concatenate([group.blocks.ravel() for group in groups])
        return replace(self.channels, groups=groups), np.intersect1d(self.removed, units)


class _Kept:
    """A run of which every value is kept; ``end`` is where it broke off."""

    def __init__(self, run: Recorder, call: Arguments) -> None:
        run.garbage_collect_values = False
        self.end = "the result"
        try:
            run.record(call)
        except DataError:
            self.end = place(run.current) if run.current is not None else "the inputs"
        self.values: dict[fx.Node, Any] = run.env


def _changed(found: Any, known: Any, change: Callable[[torch.Tensor, Value], torch.Tensor]) -> list[Any]:
    """The tensors of a value of the dense run, as the other run should have them."""
    leaves, labels = pytree.tree_leaves(found), pytree.tree_leaves(known)
    if len(leaves) != len(labels):
        return leaves
    return [
        change(x, v) if isinstance(v, Value) and isinstance(x, torch.Tensor) else x
        for x, v in zip(leaves, labels, strict=True)
    ]


def culprits(proof: Proof) -> dict[str, str]:
    """Group → what an oracle says against it alone, for every group that one objects to.

    Empty where the oracles object only to several groups together. The graph must be as it was analysed.
    """
    judge = _Judge(proof.channels, proof.removed, proof.call, proof.seed)
    return {
        group.name: f"the {oracle} oracle finds a relative error of {error:.2g}, first at {judge.where(group, oracle)}"
        for group, oracle, error in judge.search(proof.channels.groups)
    }
