"""Rules of operators that read or write where an index says so."""

from __future__ import annotations

from typing import Any

from fxcompress.graph import ops
from fxcompress.graph.channels.calls import operator_name, place
from fxcompress.graph.channels.labels import Label, Value, alone, broadcast, join, moved
from fxcompress.graph.channels.walk import Walk, rule


@rule("copy")
def copy(walk: Walk, call: ops.Call) -> Any:
    """Writing over a view: what is written goes with what it replaces."""
    name = operator_name(call.node).removeprefix("aten.").split(".")[0]
    target, written = walk.value(call["input"]), walk.value(call["other"])
    if name.startswith("index_put") and target is not None:
        return _written_where(walk, call, target)
    if target is None or written is None or name != "copy_":
        return walk.give_up(call.node, f"{name} has no rule")
    return Value(target.shape, broadcast(walk.atoms, [target, written], target.shape, place(call.node)))


def _written_where(walk: Walk, call: ops.Call, target: Value) -> Any:
    """One number, written where a mask of the tensor's own shape says so."""
    masks, written = call["other"], walk.value(call.arguments.get("value"))
    mask = walk.value(masks[0]) if isinstance(masks, (tuple, list)) and len(masks) == 1 else None
    if mask is None or mask.shape != target.shape or written is None or written.shape not in ((), (1,)):
        return walk.give_up(call.node, "it writes into a part of a tensor")
    _overwritten(walk, call, target)
    return Value(target.shape, broadcast(walk.atoms, [target, mask], target.shape, place(call.node)))


@rule("fill")
def fill(walk: Walk, call: ops.Call) -> Any:
    """A number written over a view: a channel has it too, whatever made the channel."""
    target, written = walk.operand(call["input"]), walk.value(call["value"])
    if written is not None and written.labels:
        return walk.give_up(call.node, "it writes into a part of a tensor")
    if operator_name(call.node).strip("_") != "zero" and call["value"] != 0:
        _overwritten(walk, call, target)
    return target


def _overwritten(walk: Walk, call: ops.Call, target: Value) -> None:
    for label in target.labels.values():
        walk.atoms.doubt(label.array, f"a number is written over it at {place(call.node)}")


@rule("setitem")
def setitem(walk: Walk, call: ops.Call) -> Any:
    """A number written over whole channels is one that they all have; anything else keeps what it writes into."""
    target, index, written = walk.value(call["input"]), call["index"], call["value"]
    parts = index if isinstance(index, tuple) else (index,)
    plain = all(isinstance(part, (int, slice)) for part in parts) and isinstance(written, (int, float))
    if target is None or not plain or any(part != slice(None) for d, part in enumerate(parts) if d in target.labels):
        return walk.give_up(call.node, "it writes into a part of a tensor")
    if written != 0:
        _overwritten(walk, call, target)
    return None


@rule("gather")
def gather(walk: Walk, call: ops.Call) -> Value:
    """Which indices are read along one dimension is for the index to say; the others go with those of the index."""
    value, index, where = walk.operand(call["input"]), walk.operand(call["index"]), place(call.node)
    _keep_indexed(walk, call, [value, index], where)
    return Value(index.shape, _shared(walk, [value, index], value.dim(call["dim"]), where, False))


@rule("scatter")
def scatter(walk: Walk, call: ops.Call) -> Value:
    """What is written where along one dimension is for the index to say; along the others all operands go together."""
    value, index, where = walk.operand(call["input"]), walk.operand(call["index"]), place(call.node)
    written = walk.value(call["other"] if call["other"] is not None else call.arguments.get("src"))
    operands = [
        value,
        *([written] if written is not None else []),
        *([index] if len(index.shape) == len(value.shape) else []),
    ]
    _keep_indexed(walk, call, operands, where)
    zero = all(label.zero for operand in operands[:2] for label in operand.labels.values())
    return Value(value.shape, _shared(walk, operands, value.dim(call["dim"]), where, zero and written is not None))


def _keep_indexed(walk: Walk, call: ops.Call, operands: list[Value], where: str) -> None:
    for operand in operands:
        walk.freeze(operand.labels.get(operand.dim(call["dim"])), f"it is indexed by data at {where}")


def _shared(walk: Walk, operands: list[Value], dim: int, where: str, zero: bool) -> dict[int, Label]:
    """Labels of all dimensions but ``dim``: corresponding indices go together, where the operands have as many."""
    found = {}
    for other in range(len(operands[0].shape)):
        labels = [operand.labels[other] for operand in operands if other in operand.labels]
        if other == dim or not labels:
            continue
        arrays = [label.with_array(walk.atoms.tie(label.array, dim)) for label in labels]
        if len(labels) == len(operands) and len({operand.shape[other] for operand in operands}) == 1:
            joined = join(walk.atoms, arrays, where)
            found[other] = Label(joined.array, zero, joined.sites)
        else:
            for label in arrays:
                walk.freeze(label, f"meets a value of fixed size at {where}")
    return found


@rule("max_unpool")
def max_unpool(walk: Walk, call: ops.Call) -> Value:
    """Channels go with those of the pooling that says where each value belongs."""
    value, indices, where = walk.operand(call["input"]), walk.operand(call["indices"]), place(call.node)
    for operand in (value, indices):
        for dim in [d for d in operand.labels if d > 1]:
            walk.freeze(operand.labels.pop(dim), f"values are put back over it at {where}")
    labels = broadcast(walk.atoms, [value, indices], value.shape, where, "any")
    return Value(walk.shape(call.node), labels)


@rule("fold")
def fold(walk: Walk, call: ops.Call) -> Value:
    """Overlapping blocks are summed: a channel owns one row of every position of the kernel."""
    value, result = walk.operand(call["input"]), Value(walk.shape(call.node))
    where, channel = place(call.node), len(value.shape) - 2
    walk.freeze(value.labels.get(channel + 1), f"blocks are put side by side at {where}")
    line = alone(walk.atoms, value, channel)
    if line is not None:
        blocks = walk.atoms.tie(line.reshape(result.shape[channel], -1), 1)
        label = value.labels[channel]
        made = Label(moved(blocks.reshape(-1), {0: channel}, len(result.shape)), label.zero, label.sites)
        result.labels[channel] = made
    return result
