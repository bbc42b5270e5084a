"""Parts of a graph that can be left out whole: residual blocks, and layers whose input and output have one shape."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fxcompress.graph import edit, ops
from fxcompress.graph.inplace import drop_dead, is_impure
from fxcompress.graph.shapes import dtype_of, module_of, shape_of

__all__ = ["Block", "Skip", "cut", "find_blocks", "find_layers"]

WEIGHTED = ("contraction", "attention", "recurrent")
"""Families of operators that make a part worth leaving out."""

Skip = Callable[[fx.Node | str, str], None]


@dataclass(frozen=True, eq=False)
class Block:
    """A part that can go: afterwards whoever read ``node`` reads ``source``.

    ``nodes`` are those that then compute nothing for anybody, in graph order; ``name`` is the module they have in common.
    """

    name: str
    node: fx.Node
    source: fx.Node
    nodes: tuple[fx.Node, ...]

    def weights(self) -> dict[str, Tensor]:
        """The weights of the part by name: of its contractions, two dimensions or more."""
        found: dict[str, Tensor] = {}
        for node in self.nodes:
            call = ops.read(node)
            if call is None or call.op.family not in WEIGHTED:
                continue
            owner: Any = node.graph.owning_module
            named = {v.name: edit.get_tensor(owner, v.name) for v in call.arguments.values() if isinstance(v, ops.Attr)}
            if not named and node.op == "call_module":
                named = {f"{node.target}.{name}": p for name, p in module_of(node).named_parameters()}
            found |= {name: tensor for name, tensor in named.items() if tensor.dim() > 1}
        return found

    def norm_scale(self) -> tuple[str, Tensor] | None:
        """Name and scale of the batch normalisation nearest to the end of the part, or None."""
        for node in reversed(self.nodes):
            call = ops.read(node)
            if call is not None and call.kind == "batch_norm" and isinstance(call["weight"], ops.Attr):
                owner: Any = node.graph.owning_module
                return call["weight"].name, edit.get_tensor(owner, call["weight"].name)
        return None


def find_blocks(module: fx.GraphModule, skip: Skip) -> list[Block]:
    """Residual blocks: additions of a value and a branch computed from it. ``skip`` hears which additions are none, and why.

    Of blocks inside one another the innermost count.
    """
    found = []
    for node in module.graph.nodes:
        call = ops.read(node)
        if call is not None and call.kind == "add" and len(call.inputs) == 2:
            block = _residual(call, skip)
            if block is not None:
                found.append(block)
    inner = {other.node for other in found}
    kept = []
    for block in found:
        if inner & set(block.nodes) - {block.node}:
            skip(block.node, "its branch holds blocks that can go on their own")
        else:
            kept.append(block)
    return _named(kept)


def _residual(call: ops.Call, skip: Skip) -> Block | None:
    first, second = (_behind_identities(side) for side in call.inputs)
    before = {node: edit.ancestors(node) for node in (first, second)}
    if second in before[first]:
        source = second
    elif first in before[second]:
        source = first
    else:
        if _has_weights(before[first] ^ before[second]):
            skip(call.node, "neither side of the addition is the other's input: its shortcut is computed too")
        return None
    if call["activation"]:
        skip(call.node, "its addition is fused with an activation; prune before fusing")
        return None
    if shape_of(source) is None or (shape_of(source), dtype_of(source)) != (shape_of(call.node), dtype_of(call.node)):
        skip(call.node, f"its shortcut has shape {shape_of(source)} and its output {shape_of(call.node)}")
        return None
    nodes = _dead_without(call.node, source)
    if not _has_weights(set(nodes)):
        if _has_weights(before[first] ^ before[second]):
            skip(call.node, "what its branch computes is used elsewhere too")
        return None
    return Block("", call.node, source, nodes)


def _behind_identities(node: fx.Node) -> fx.Node:
    while ops.kind(node) == "identity":
        node = node.all_input_nodes[0]
    return node


def find_layers(module: fx.GraphModule, skip: Skip) -> list[Block]:
    """Layers (a convolution or linear one, with the normalisation and activation after it) that keep their input's shape."""
    calls = Counter(str(node.target) for node in module.graph.nodes if node.op == "call_module")
    found = []
    for node in module.graph.nodes:
        call = ops.read(node)
        if call is None or not call.kind.startswith(("conv", "linear")) or len(call.inputs) != 1:
            continue
        source = call.inputs[0]
        last = _tail(node)
        if shape_of(source) is None or (shape_of(source), dtype_of(source)) != (shape_of(last), dtype_of(last)):
            skip(node, f"its input has shape {shape_of(source)} and its output {shape_of(last)}")
        elif any(user.op == "output" for user in last.users):
            skip(node, "it makes the model's output")
        elif node.op == "call_module" and calls[str(node.target)] > 1:
            skip(node, "it is called several times")
        else:
            found.append(Block("", last, source, _dead_without(last, source)))
    return _named(found)


def _tail(node: fx.Node) -> fx.Node:
    """The end of the layer that ``node`` begins: normalisation, then activation, where nobody else reads between them."""
    for family in ("normalisation", "activation"):
        users = list(node.users)
        follower = ops.lookup(users[0]) if len(users) == 1 else None
        if follower is not None and follower.family == family and users[0].all_input_nodes[0] is node:
            node = users[0]
    return node


def _dead_without(node: fx.Node, source: fx.Node) -> tuple[fx.Node, ...]:
    """What nobody needs once the readers of ``node`` read ``source`` instead, in graph order."""
    dead, between = {node}, edit.ancestors(node) - edit.ancestors(source)
    order = [n for n in node.graph.nodes if n in between]
    for candidate in reversed(order):
        if candidate is not node and not is_impure(candidate) and all(user in dead for user in candidate.users):
            dead.add(candidate)
    return tuple(n for n in order if n in dead)


def _has_weights(nodes: set[fx.Node]) -> bool:
    rows = (ops.lookup(node) for node in nodes if node.op.startswith("call"))
    return any(row is not None and row.family in WEIGHTED for row in rows)


def _named(blocks: list[Block]) -> list[Block]:
    """Every block under the module that its weighted nodes have in common; a graph name where that is not its alone."""
    names = [_common(block) for block in blocks]
    counts = Counter(names)
    return [
        Block(name if name and counts[name] == 1 else block.node.name, block.node, block.source, block.nodes)
        for name, block in zip(names, blocks, strict=True)
    ]


def _common(block: Block) -> str:
    owners = [ops.owner_name(node).split(".") for node in block.nodes if _has_weights({node})]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*owners, strict=False))
    return ".".join(parts[0] for parts in shared)


def cut(module: fx.GraphModule, blocks: list[Block]) -> None:
    """Leave the blocks out of the graph."""
    passed: dict[fx.Node, fx.Node] = {}
    for block in blocks:
        source = block.source
        while source in passed:
            source = passed[source]
        passed[block.node] = source
        block.node.replace_all_uses_with(source)
    drop_dead(module)
