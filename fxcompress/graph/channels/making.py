"""Rules of operators that make tensors of a size that the call states, or has asked of channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxcompress.graph import ops
from fxcompress.graph.channels.calls import place
from fxcompress.graph.channels.labels import Label, Value, broadcast
from fxcompress.graph.channels.walk import Walk, rule


@rule("expand", "repeat")
def expand(walk: Walk, call: ops.Call) -> Value:
    """An index of an expanded dimension has nothing of its own, so it may go where its size is written as a number, and goes
    where its size is asked of channels."""
    result: Value = walk.move(call)
    source = walk.value(call["input"])
    rank = len(result.shape)
    known = sizes(walk, call["sizes"] if call.kind == "expand" else call["repeats"], rank)
    for dim, label in known.items():
        own = dim - (rank - len(source.shape)) if source is not None else 0
        if source is not None and result.shape[dim] > 1 and (own < 0 or source.shape[own] == 1):
            result.labels[dim] = Label(label, False)
    return result


def sizes(walk: Walk, given: Any, rank: int) -> dict[int, Any]:
    """Atoms of dimensions whose sizes a call states: new ones for a number, those of the channels whose number was asked."""
    given = given[0] if isinstance(given, (tuple, list)) and len(given) == 1 and rank > 1 else given
    whole = asked(walk, given)
    if isinstance(whole, Value) and len(whole.shape) == rank:
        return {d: label.array for d, label in whole.labels.items()}
    found: dict[int, Any] = {}
    for dim, size in enumerate(given) if isinstance(given, (tuple, list)) and len(given) == rank else ():
        if isinstance(size, int) and size > 1:
            found[dim] = walk.atoms.new(*(size if d == dim else 1 for d in range(rank)))
        elif isinstance(held := asked(walk, size), tuple):
            found[dim] = walk.row_of(held[0], held[1], dim, rank)
    return found


def asked(walk: Walk, node: Any) -> Value | tuple[Label, int] | None:
    """The tensor whose shape a node is, or the (label, dimension) whose size it is, where that has a label."""
    call = ops.read(node) if isinstance(node, fx.Node) and node.op.startswith("call") else None
    if call is None:
        return None
    if call.kind == "getitem" and isinstance(call["index"], int):
        value, dim = asked(walk, call["input"]), call["index"]
    elif call.kind in ("shape", "getattr") and call["name"] in (None, "shape"):
        value, dim = walk.value(call["input"]), call["dim"]
    else:
        return None
    if not isinstance(value, Value) or dim is None:
        return value if isinstance(value, Value) else None
    label = value.labels.get(value.dim(dim))
    return (label, value.dim(dim)) if label is not None else None


def counts_channels(walk: Walk, node: Any) -> bool:
    """Whether a number is computed from how many channels something has; yes where that cannot be told."""
    if not isinstance(node, fx.Node):
        return False
    call = ops.read(node) if node.op.startswith("call") else None
    if call is None or isinstance(walk.env.get(node), Value):
        return True
    if (call.kind == "getitem" and isinstance(call["index"], int)) or call["dim"] is not None:
        return isinstance(asked(walk, node), tuple)
    return any(counts_channels(walk, source) for source in node.all_input_nodes)


@rule("expand_as")
def expand_as(walk: Walk, call: ops.Call) -> Value:
    """Expanded dimensions have the size of the other tensor's, and go with them."""
    value, other = walk.value(call["input"]), walk.value(call["other"])
    shape = asked(walk, call["other"])
    if other is None and isinstance(shape, Value):
        other = shape
    if value is None or other is None:
        return walk.give_up(call.node, "expands to a shape that is not known")
    return Value(other.shape, broadcast(walk.atoms, [value, other], other.shape, place(call.node)))


@rule("factory", "new")
def factory(walk: Walk, call: ops.Call) -> Any:
    """Zeros, ones and fills are the same at every index, so an index whose count is written as a number may go."""
    shapes = walk.unlabelled(call.node)
    name = getattr(call.node.target, "__name__", str(call.node.target)).split(".")[0]
    if not isinstance(shapes, Value):
        return walk.evaluate_or_none(call.node)
    if name.removeprefix("new_") not in ("zeros", "ones", "full"):
        constant = walk.evaluate_or_none(call.node, "cpu")
        return constant if isinstance(constant, torch.Tensor) and not constant.is_floating_point() else shapes
    given = call["size"]
    given = given[0] if isinstance(given, (tuple, list)) and given and isinstance(given[0], (tuple, list)) else given
    given = given[0] if isinstance(given, (tuple, list)) and len(given) == 1 and len(shapes.shape) > 1 else given
    known = sizes(walk, tuple(given)[: len(shapes.shape)] if isinstance(given, (tuple, list)) else given, len(shapes.shape))
    shapes.labels = {dim: Label(atoms, "zeros" in name) for dim, atoms in known.items() if shapes.shape[dim] > 1}
    return shapes


@rule("like")
def like(walk: Walk, call: ops.Call) -> Any:
    """A new tensor of another's shape goes with it."""
    value = walk.value(call["input"])
    if value is None:
        return walk.unlabelled(call.node)
    zero = "zeros" in str(getattr(call.node.target, "__name__", call.node.target))
    return Value(value.shape, {d: Label(label.array, zero, label.sites) for d, label in value.labels.items()})
