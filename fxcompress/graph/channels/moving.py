"""Rules of operators that move values, and of those that make tensors or answer questions about them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx
from torch.nn import functional as F

from fxcompress.graph import ops
from fxcompress.graph.channels.calls import place
from fxcompress.graph.channels.labels import Label, Value, broadcast, join, moved, values_in
from fxcompress.graph.channels.movement import move
from fxcompress.graph.channels.walk import FAMILIES, Walk, rule

PICKS = {"getitem", "slice", "select", "narrow", "index_select", "index"}
"""Kinds that pick indices along a dimension."""


@rule("movement", table=FAMILIES)
def movement(walk: Walk, call: ops.Call) -> Any:
    others = [node for node in call.node.all_input_nodes if node is not call["input"]] if call.kind in PICKS else []
    if any(isinstance(walk.env[node], Value) and _dtype(node) == torch.bool for node in others):
        return walk.give_up(call.node, "picks where a mask says so")
    if _listed(walk, call) > 1:
        return walk.give_up(call.node, "picks pairs of indices")
    result = walk.move(call)
    if any(varies(walk, node) for node in others):
        _keep_what_is_picked_from(walk, call, result)
    return result


def _listed(walk: Walk, call: ops.Call) -> int:
    """How many dimensions an index lists positions of: those lists go along together."""
    parts = {"index": call["indices"], "getitem": call["index"]}.get(call.kind)
    if not isinstance(parts, tuple if call.kind == "getitem" else (tuple, list)):
        return 0
    return sum(isinstance(part, list) or isinstance(walk.value(part), Value) for part in parts)


def _dtype(node: fx.Node) -> Any:
    return getattr(node.meta.get("tensor_meta"), "dtype", None)


def varies(walk: Walk, node: fx.Node) -> bool:
    """Whether a number or an index may differ from call to call: it comes from data or from a size that no channels have."""
    if node.op in ("placeholder", "get_attr"):
        return node.op == "placeholder"
    call = ops.read(node)
    if call is None:
        return True
    source, dim = call["input"], call["dim"]
    if call.kind == "getitem" and isinstance(source, fx.Node) and isinstance(walk.env.get(source), tuple):
        asked = ops.read(source)
        source, dim = (asked["input"], call["index"]) if asked is not None else (None, None)
    value = walk.value(source)
    if value is not None and isinstance(dim, int) and not isinstance(walk.env.get(node), Value):
        return value.dim(dim) not in value.labels
    return any(isinstance(walk.env[n], Value) or varies(walk, n) for n in node.all_input_nodes)


def _keep_what_is_picked_from(walk: Walk, call: ops.Call, result: Any) -> None:
    """Another call may pick other indices, so no dimension that is not passed on whole may lose any."""
    source = walk.value(call["input"])
    seen = [label.array.ravel() for v in values_in(result) for label in v.labels.values()]
    for label in source.labels.values() if source is not None else ():
        if not np.isin(label.array, np.concatenate([*seen, np.zeros(1, dtype=np.int64)])).all():
            walk.freeze(label, f"what is picked of it differs from call to call at {place(call.node)}")


@rule("identity", "dropout")
def identity(walk: Walk, call: ops.Call) -> Value | None:
    return walk.value(call["input"])


@rule("query", table=FAMILIES)
def query(walk: Walk, call: ops.Call) -> Any:
    if call.kind == "container":
        return walk.evaluate_containers(call.node)
    if call.kind == "getattr" and call["name"] in ("real", "imag") and walk.value(call["input"]) is not None:
        return walk.value(call["input"])
    if call.kind == "getattr" and call["name"] in VIEWED and walk.value(call["input"]) is not None:
        return walk.move(call)
    held = walk.env.get(call["input"]) if call.kind == "getattr" and isinstance(call["input"], fx.Node) else None
    if isinstance(held, tuple) and call["name"] in FIELDS:
        return held[FIELDS[call["name"]]]
    found = walk.constant(call.node)
    if values_in(found) and any(v.labels for v in walk.inputs(call.node)):
        return walk.give_up(call.node, f"{call.kind} {call['name'] or ''} has no rule".replace("  ", " "))
    return found


VIEWED = ("T", "mT", "H", "mH", "data")
"""Attributes of a tensor that are its values, moved."""

FIELDS = {"values": 0, "indices": 1}
"""Names of the results of operators that give two."""


@rule("getitem")
def getitem(walk: Walk, call: ops.Call) -> Any:
    held = walk.env.get(call["input"]) if isinstance(call["input"], fx.Node) else None
    if isinstance(held, (tuple, list, dict)):
        return held[walk.plain(call["index"])]
    return movement(walk, call)


@rule("cat")
def cat(walk: Walk, call: ops.Call) -> Value:
    """Labels follow one another along the joined dimension and go together along the others."""
    values = [value for value in walk.several(call["tensors"]) if value.shape != (0,)]
    shape, where = walk.shape(call.node), place(call.node)
    dim, rank = values[0].dim(call["dim"]), len(shape)
    result = Value(shape)
    if shape[dim] > 1 and any(dim in value.labels for value in values):
        parts = [_line(walk, value, dim) for value in values]
        line = walk.atoms.told_apart(np.concatenate(parts), where)
        array = line.reshape(tuple(-1 if d == dim else 1 for d in range(rank)))
        known = [value.labels[dim] for value in values if dim in value.labels]
        zero, sites = all(label.zero for label in known), frozenset().union(*(label.sites for label in known))
        result.labels[dim] = Label(array, zero, sites)
    for other in range(rank):
        if other == dim or shape[other] == 1:
            continue
        labels = [value.labels[other] for value in values if other in value.labels]
        arrays = [label.with_array(walk.atoms.tie(label.array, dim)) for label in labels]
        if not arrays:
            continue
        joined = join(walk.atoms, arrays, where)
        if len(labels) < len(values):
            walk.freeze(joined, f"meets a value of fixed size at {where}")
        else:
            result.labels[other] = joined
    return result


def _line(walk: Walk, value: Value, dim: int) -> Any:
    """The atoms along one dimension alone; a single index that has none of its own gets one that stays."""
    if dim not in value.labels:
        return np.zeros(value.shape[dim], dtype=np.int64)
    return walk.atoms.line(value.labels[dim].array, dim)


@rule("stack")
def stack(walk: Walk, call: ops.Call) -> Value:
    """The new dimension keeps every index; along the others the operands go together."""
    values = walk.several(call["tensors"])
    shape = walk.shape(call.node)
    dim = call["dim"] % len(shape)
    labels = broadcast(walk.atoms, values, values[0].shape, place(call.node), "all")
    place_of = {d: d if d < dim else d + 1 for d in range(len(shape) - 1)}
    arrays = {place_of[d]: label.with_array(moved(label.array, place_of, len(shape))) for d, label in labels.items()}
    return Value(shape, arrays)


@rule("glu")
def glu(walk: Walk, call: ops.Call) -> Value:
    """Two halves along a dimension: one is the gate of the other."""
    value = walk.operand(call["input"])
    dim = value.dim(call["dim"])
    halves = move(walk.atoms, walk.sites, value, lambda tensor: tensor.chunk(2, dim), place(call.node))
    return Value(walk.shape(call.node), broadcast(walk.atoms, list(halves), halves[0].shape, place(call.node), "any"))


@rule("pad")
def pad(walk: Walk, call: ops.Call) -> Any:
    """Padding with a constant leaves holes, which have indices of their own; other modes copy."""
    value, amounts, mode = walk.value(call["input"]), call["pad"], call["mode"]
    if call.node.op == "call_module":
        amounts = getattr(walk.module.get_submodule(str(call.node.target)), "padding", None)
        mode = "constant" if _class(walk, call.node).startswith(("Zero", "Constant")) else "another"
    amounts = walk.plain(amounts)
    if value is None or amounts is None or mode not in (None, "constant"):
        return walk.move(call)
    return move(walk.atoms, walk.sites, value, lambda tensor: F.pad(tensor, tuple(amounts)), place(call.node))


def _class(walk: Walk, node: fx.Node) -> str:
    return type(walk.module.get_submodule(str(node.target))).__name__


@rule("assert")
def assertion(walk: Walk, call: ops.Call) -> None:
    return None
