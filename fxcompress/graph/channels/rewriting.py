"""The numbers of channels that calls state, written anew: proposed, and proved by running, before anything is changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxcompress.errors import FxCompressError
from fxcompress.graph import edit, ops
from fxcompress.graph.channels.calls import Spelling, evaluate, operand_names
from fxcompress.graph.channels.kept import Kept
from fxcompress.graph.channels.labels import Value, map_values, values_in
from fxcompress.graph.channels.literals import PROPOSALS, Index, Move, commutes, gathered
from fxcompress.graph.channels.moving import varies
from fxcompress.graph.channels.walk import Walk

__all__ = ["Rewriting", "UnprovableError", "respell"]

STAYS = {"identity", "dropout", "cat", "stack", "glu", "copy", "fill", "setitem"}
"""Movement that states no number of channels, or whose numbers are another operator's."""


class UnprovableError(FxCompressError):
    """No spelling of a node was found that gives the kept part of what it gave before."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(f"no spelling of {node.format_node()} keeps what it computes.")
        self.node = node.name


@dataclass(frozen=True)
class Number:
    """A number that is computed anew, from the dense number of channels and from what differs from call to call."""

    spelling: Spelling


class Rewriting:
    """Finds new spellings for the calls that state numbers of channels; changes nothing."""

    def __init__(self, walk: Walk, kept: Kept) -> None:
        self.walk, self.kept = walk, kept
        self.env: dict[fx.Node, Any] = {}
        self.found: dict[fx.Node, Spelling] = {}

    def run(self) -> dict[fx.Node, Spelling]:
        """Node → its new spelling. Raises UnprovableError at the first that none is found for."""
        for node in self.walk.module.graph.nodes:
            self.env[node] = self._new_value(node)
            call = self.walk.call(node) if node.op.startswith("call") and node not in self.walk.opaque else None
            if call is None:
                continue
            if call.kind in ("factory", "new"):
                self._make(call)
            elif call.op.family == "movement" and call.kind not in STAYS:
                self._move(call)
            elif call.op.family in ("pointwise", "activation", "attention"):
                self._keep_numbers(node)
            elif isinstance(call["groups"], fx.Node):
                self._check_groups(node, call["groups"])
        return self.found

    def _check_groups(self, node: fx.Node, groups: fx.Node) -> None:
        """A number of groups that the graph computes must follow the groups that are left."""
        stated = [
            self.kept.count(count.atoms) for count in self.walk.counts if count.node is node and count.name == "groups"
        ]
        if stated and stated != [self.env[groups]]:
            raise UnprovableError(node)

    def _keep_numbers(self, node: fx.Node) -> None:
        """A number of channels that values are computed with (a scale, a divisor) stays the dense one."""
        if not isinstance(self.walk.env[node], Value):
            return
        spelling = Spelling.of(node)
        given: Any = (spelling.args, spelling.kwargs)
        args, kwargs = fx.node.map_arg(given, self._dense)
        if (args, kwargs) != given:
            self.found[node] = Spelling(spelling.op, spelling.target, args, kwargs)

    def _dense(self, node: fx.Node) -> Any:
        before = self.walk.env[node]
        if not isinstance(before, (int, float)) or before == self.env[node]:
            return node
        if not varies(self.walk, node):
            return before
        dense = Spelling.of(node)
        given: Any = (dense.args, dense.kwargs)
        args, kwargs = fx.node.map_arg(given, self._dense)
        if (args, kwargs) == given:
            raise UnprovableError(node)
        return Number(Spelling(dense.op, dense.target, args, kwargs))

    def _new_value(self, node: fx.Node) -> Any:
        """What a node is after the cut: smaller values, and plain values computed from them."""
        value = self.walk.env[node]
        if values_in(value):
            return map_values(lambda v: Value(self.kept.shape(v)), value)
        if not node.op.startswith("call") or not node.all_input_nodes or isinstance(value, torch.Tensor) or value is None:
            return value
        try:
            return self._evaluate(Spelling.of(node), "meta", {})
        except Exception:  # it wanted more than shapes before the cut too
            return value

    def _evaluate(self, spelling: Spelling, device: str, special: dict[str, Any]) -> Any:
        return evaluate(self.walk.module, self.env, _with_tensors(spelling), device, special)

    def _make(self, call: ops.Call) -> None:
        """A new tensor whose size is written as a number."""
        value = self.walk.env[call.node]
        if not isinstance(value, Value) or not self.kept.touches(value):
            return
        wanted = self.kept.shape(value)
        position = 1 if call.kind == "new" else 0
        node = call.node
        given = node.args[position:]
        spread = not (given and isinstance(given[0], (tuple, list)))
        sizes = given if spread else given[0]
        assert isinstance(sizes, (tuple, list))
        new = tuple(n if isinstance(s, int) else s for s, n in zip(sizes, wanted, strict=False))
        rest = () if spread else given[1:]
        spelling = Spelling(
            node.op, node.target, (*node.args[:position], *(new if spread else (new,)), *rest), dict(node.kwargs)
        )
        try:
            made = self._evaluate(spelling, "meta", {})
        except (RuntimeError, TypeError) as error:
            raise UnprovableError(node) from error
        if tuple(made.shape) != wanted:
            raise UnprovableError(node)
        self.found[node] = spelling

    def _move(self, call: ops.Call) -> None:
        source = self.walk.value(call["input"])
        results = values_in(self.walk.env[call.node])
        changed = frozenset(n for n in call.node.all_input_nodes if self._is_another_number(n))
        if source is None or not (changed or self.kept.touches(source) or any(self.kept.touches(v) for v in results)):
            return
        names = operand_names(call.node, call["input"])

        def run_old(tensor: torch.Tensor) -> Any:
            return self.walk.evaluate(call.node, "cpu", **dict.fromkeys(names, tensor))

        def look(value: Any) -> Any:
            return run_old(value) if isinstance(value, torch.Tensor) else self.walk.env.get(value)

        varying = frozenset(n for n in call.node.all_input_nodes if isinstance(self.env[n], int) and varies(self.walk, n))
        move = Move(call, source, results, self.kept, look, changed, varying)
        for spelling in self._spellings(move):

            def run_new(tensor: torch.Tensor, spelling: Spelling = spelling) -> Any:
                return self._evaluate(spelling, "cpu", dict.fromkeys(names, tensor))

            if commutes(run_old, run_new, move):
                if spelling != move.spelling:
                    self.found[call.node] = spelling
                return
        raise UnprovableError(call.node)

    def _is_another_number(self, node: fx.Node) -> bool:
        """Whether a node is a number, or several, that the cut changes."""
        before = self.walk.env[node]
        plain = all(isinstance(leaf, (int, float)) for leaf in pytree.tree_leaves(before))
        return plain and before is not None and before != self.env[node]

    def _spellings(self, move: Move) -> Any:
        yield move.spelling
        yield from PROPOSALS.get(move.call.kind, gathered)(move)


def _with_tensors(spelling: Spelling) -> Spelling:
    def look(leaf: Any) -> Any:
        return leaf.tensor() if isinstance(leaf, Index) else leaf

    given: Any = (spelling.args, spelling.kwargs)
    args, kwargs = fx.node.map_aggregate(given, look)
    return Spelling(spelling.op, spelling.target, args, kwargs)


def respell(module: fx.GraphModule, node: fx.Node, spelling: Spelling) -> None:
    """Write a proven spelling into the graph; index tensors become buffers."""

    def store(leaf: Any) -> Any:
        if isinstance(leaf, Number):
            inner: Any = (leaf.spelling.args, leaf.spelling.kwargs)
            args, kwargs = fx.node.map_aggregate(inner, store)
            with module.graph.inserting_before(node):
                made = module.graph.create_node(leaf.spelling.op, leaf.spelling.target, args, kwargs)
            made.meta["tensor_meta"] = None
            return made
        if not isinstance(leaf, Index):
            return leaf
        name = f"{node.name}_index"
        edit.set_tensor(module, name, leaf.tensor(), buffer=True)
        with module.graph.inserting_before(node):
            made = module.graph.get_attr(name)
        made.meta["tensor_meta"] = None
        return made

    given: Any = (spelling.args, spelling.kwargs)
    args, kwargs = fx.node.map_aggregate(given, store)
    node.op, node.target, node.args, node.kwargs = spelling.op, spelling.target, args, kwargs
