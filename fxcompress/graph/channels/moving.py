"""Rules of operators that move values, and of those that make tensors or answer questions about them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fxcompress.graph import ops
from fxcompress.graph.channels.labels import Label, Value, broadcast, join, moved
from fxcompress.graph.channels.movement import move
from fxcompress.graph.channels.walk import FAMILIES, Walk, place, rule

PICKS = {"getitem", "slice", "select", "narrow", "index_select", "index"}
"""Kinds that pick indices along a dimension."""


@rule("movement", table=FAMILIES)
def movement(walk: Walk, call: ops.Call) -> Any:
    others = [node for node in call.node.all_input_nodes if node is not call["input"]] if call.kind in PICKS else []
    if any(isinstance(walk.env[node], Value) and _dtype(node) == torch.bool for node in others):
        return walk.give_up(call.node, "picks where a mask says so")
    result = walk.move(call)
    if any(_varies(walk, node) for node in others):
        _keep_what_is_picked_from(walk, call, result)
    return result


def _dtype(node: fx.Node) -> Any:
    return getattr(node.meta.get("tensor_meta"), "dtype", None)


def _varies(walk: Walk, node: fx.Node) -> bool:
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
    return any(isinstance(walk.env[n], Value) or _varies(walk, n) for n in node.all_input_nodes)


def _keep_what_is_picked_from(walk: Walk, call: ops.Call, result: Any) -> None:
    """Another call may pick other indices, so no dimension that is not passed on whole may lose any."""
    source = walk.value(call["input"])
    seen = [label.array.ravel() for v in pytree.tree_leaves(result) if isinstance(v, Value) for label in v.labels.values()]
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
    return walk.constant(call.node)


@rule("getitem")
def getitem(walk: Walk, call: ops.Call) -> Any:
    held = walk.env.get(call["input"]) if isinstance(call["input"], fx.Node) else None
    if isinstance(held, (tuple, list, dict)):
        return held[walk.plain(call["index"])]
    return movement(walk, call)


@rule("cat")
def cat(walk: Walk, call: ops.Call) -> Value:
    """Labels follow one another along the joined dimension and go together along the others."""
    values = [value for tensor in call["tensors"] if (value := walk.value(tensor)) is not None]
    values = [value for value in values if value.shape != (0,)]
    shape, where = walk.shape(call.node), place(call.node)
    dim, rank = values[0].dim(call["dim"]), len(shape)
    result = Value(shape)
    if shape[dim] > 1 and any(dim in value.labels for value in values):
        parts = [_line(walk, value, dim) for value in values]
        line = _told_apart(walk, np.concatenate(parts), where)
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


def _told_apart(walk: Walk, line: Any, where: str) -> Any:
    """The line with atoms of its own where one atom stands in it several times, so that what comes of each is known."""
    live = line[line > 0]
    if len(np.unique(live)) == len(live):
        return line
    made = np.where(line > 0, walk.atoms.new(len(line)), 0)
    walk.atoms.merge(made, line, where)
    return made


def _line(walk: Walk, value: Value, dim: int) -> Any:
    """The atoms along one dimension alone; a single index that has none of its own gets one that stays."""
    if dim not in value.labels:
        return np.zeros(value.shape[dim], dtype=np.int64)
    array = value.labels[dim].array
    for other in range(array.ndim):
        if other != dim:
            array = walk.atoms.tie(array, other)
    return array.reshape(-1)


@rule("stack")
def stack(walk: Walk, call: ops.Call) -> Value:
    """The new dimension keeps every index; along the others the operands go together."""
    values = [value for tensor in call["tensors"] if (value := walk.value(tensor)) is not None]
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
        mode = {"ReflectionPad2d": "reflect", "ReplicationPad2d": "replicate"}.get(_class(walk, call.node), "constant")
    amounts = walk.plain(amounts)
    if value is None or amounts is None or mode not in (None, "constant"):
        return walk.move(call)
    return move(walk.atoms, walk.sites, value, lambda tensor: F.pad(tensor, tuple(amounts)), place(call.node))


def _class(walk: Walk, node: fx.Node) -> str:
    return type(walk.module.get_submodule(str(node.target))).__name__


@rule("expand")
def expand(walk: Walk, call: ops.Call) -> Value:
    """An index of an expanded dimension has nothing of its own, so it may go where its size is written as a number."""
    result: Value = walk.move(call)
    sizes = call["sizes"]
    source = walk.value(call["input"])
    if source is None or not isinstance(sizes, (tuple, list)) or len(sizes) != len(result.shape):
        return result
    for dim, size in enumerate(sizes):
        own = dim - (len(sizes) - len(source.shape))
        if isinstance(size, int) and size > 1 and (own < 0 or source.shape[own] == 1):
            shape = tuple(size if d == dim else 1 for d in range(len(sizes)))
            result.labels[dim] = Label(walk.atoms.new(*shape), False)
    return result


@rule("expand_as")
def expand_as(walk: Walk, call: ops.Call) -> Value:
    """Expanded dimensions have the size of the other tensor's, and go with them."""
    value, other = walk.value(call["input"]), walk.value(call["other"])
    if value is None or other is None:
        return walk.give_up(call.node, "expands to a shape that is not known")  # type: ignore[no-any-return]
    return Value(other.shape, broadcast(walk.atoms, [value, other], other.shape, place(call.node)))


@rule("copy")
def copy(walk: Walk, call: ops.Call) -> Any:
    """Writing over a view: what is written goes with what it replaces."""
    name = getattr(call.node.target, "__name__", str(call.node.target)).split(".")[0]
    target, written = walk.value(call["input"]), walk.value(call["other"])
    if target is None or written is None or name != "copy_":
        return walk.give_up(call.node, f"{name} has no rule")
    return Value(target.shape, broadcast(walk.atoms, [target, written], target.shape, place(call.node)))


@rule("gather", "fold", "setitem")
def opaque(walk: Walk, call: ops.Call) -> Any:
    return walk.give_up(call.node, f"{call.kind} has no rule")


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
    sizes = call["size"]
    sizes = sizes[0] if isinstance(sizes, (tuple, list)) and sizes and isinstance(sizes[0], (tuple, list)) else sizes
    zero = "zeros" in name
    for dim, size in enumerate(shapes.shape):
        written = sizes[dim] if isinstance(sizes, (tuple, list)) and dim < len(sizes) else None
        if isinstance(written, int) and size > 1:
            shape = tuple(size if d == dim else 1 for d in range(len(shapes.shape)))
            shapes.labels[dim] = Label(walk.atoms.new(*shape), zero)
    return shapes


@rule("like")
def like(walk: Walk, call: ops.Call) -> Any:
    """A new tensor of another's shape goes with it."""
    value = walk.value(call["input"])
    if value is None:
        return walk.unlabelled(call.node)
    zero = "zeros" in str(getattr(call.node.target, "__name__", call.node.target))
    return Value(value.shape, {d: Label(label.array, zero, label.sites) for d, label in value.labels.items()})


@rule("assert")
def assertion(walk: Walk, call: ops.Call) -> None:
    return None
