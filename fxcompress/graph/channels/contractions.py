"""Rules of operators that sum over channels: linear layers, products, sums in index notation, tables."""

from __future__ import annotations

from typing import Any

import numpy as np

from fxcompress.graph import ops
from fxcompress.graph.channels.calls import place
from fxcompress.graph.channels.labels import Label, Value, aligned, alone, broadcast, join, moved
from fxcompress.graph.channels.walk import Walk, rule
from fxcompress.graph.index_notation import factors, notation


def contract(walk: Walk, labels: list[Label | None], where: str, *weights: Label | None) -> None:
    """The operands' labels of a dimension that is summed over; None: an operand or a weight that is whole there.

    ``weights`` are the labels of the parameter that meets them. A sum loses nothing when a channel goes that is zero once
    its producer is; otherwise what it leaves behind (a bias through a sigmoid) is lost with it.
    """
    operands = [label for label in labels if label is not None]
    known = operands + [weight for weight in weights if weight is not None]
    if not known:
        return
    joined = join(walk.atoms, known, where)
    if len(known) < len(labels) + len(weights):
        walk.freeze(joined, f"is summed with a value of fixed size at {where}")
    if operands and not any(label.zero for label in operands):
        walk.atoms.doubt(joined.array, f"what it leaves behind is not zero at {where}")


def bind(weight: Value, dim: int, read: Label | None, channel: int) -> None:
    """Let a weight's inputs be known by the atoms of the channels they read, which tell where each comes from."""
    own = weight.labels.get(dim)
    if own is None or read is None or read.array.size != read.array.shape[channel] or own.array.size != read.array.size:
        return
    if (read.array > 0).all():
        weight.labels[dim] = Label(read.array.reshape(own.array.shape), own.zero, own.sites)


def independent(walk: Walk, label: Label, of: int, rank: int) -> Label:
    """``label`` without dependence on dimension ``of``, which goes away."""
    array = aligned(label.array, rank)
    return label.with_array(walk.atoms.tie(array, of) if array.shape[of] > 1 else array)


@rule("linear")
def linear(walk: Walk, call: ops.Call) -> Value:
    value, weight = walk.operand(call["input"]), walk.operand(call["weight"])
    where, last = place(call.node), len(value.shape) - 1
    rank = len(value.shape)
    column = lying(walk, weight, 1, last, rank)
    if weight.shape[1] > 1:
        contract(walk, [value.labels.get(last)], where, column)
        bind(weight, 1, value.labels.get(last), last)
    walk.role(call["weight"], 0, "out")
    walk.role(call["weight"], 1, "in")
    shape = (*value.shape[:-1], weight.shape[0])
    result = Value(shape, {d: independent(walk, label, last, rank) for d, label in value.labels.items() if d != last})
    result.labels = {d: _not_zero(label, walk, call["bias"]) for d, label in result.labels.items()}
    produce(walk, call, result, lying(walk, weight, 0, 0, 1), last)
    return result


def lying(walk: Walk, value: Value, dim: int, along: int, rank: int) -> Label | None:
    """The label of a weight's dimension, laid along another dimension of a tensor of ``rank``."""
    line = alone(walk.atoms, value, dim)
    return value.labels[dim].with_array(moved(line, {0: along}, rank)) if line is not None else None


def _not_zero(label: Label, walk: Walk, bias: Any) -> Label:
    return Label(label.array, label.zero and bias is None, label.sites)


def produce(walk: Walk, call: ops.Call, result: Value, label: Label | None, dim: int) -> None:
    """The channels a weight makes, and its bias with them."""
    if label is None:
        walk.freeze(walk.value(call["bias"]), f"belongs to channels of fixed size at {place(call.node)}")
        return
    rank = len(result.shape)
    array = moved(label.array, {0: dim}, rank) if label.array.ndim else label.array
    result.labels[dim] = Label(array, True, label.sites)
    if array.size == result.shape[dim] and walk.adopt(call["bias"], array.reshape(-1)):
        walk.role(call["bias"], 0, "out")
        return
    bias = walk.value(call["bias"]) if call["bias"] is not None else None
    own = alone(walk.atoms, bias, 0) if bias is not None else None
    if own is not None:
        walk.atoms.merge(array, moved(own, {0: dim}, rank), place(call.node))
        walk.role(call["bias"], 0, "out")
    elif bias is not None:
        walk.atoms.freeze(array, f"its bias has a fixed size at {place(call.node)}")


@rule("matmul")
def matmul(walk: Walk, call: ops.Call) -> Value:
    return product(walk, call, call["input"], call["other"])


@rule("addmm")
def addmm(walk: Walk, call: ops.Call) -> Value:
    result = product(walk, call, call["input"], call["other"])
    bias = walk.operand(call["bias"])
    return Value(result.shape, broadcast(walk.atoms, [result, bias], result.shape, place(call.node), "all"))


def product(walk: Walk, call: ops.Call, first: Any, second: Any) -> Value:
    """``[…, n, k] @ […, k, m]``: k is summed over, leading dimensions go together; a vector is one row or column."""
    a, b = walk.operand(first), walk.operand(second)
    shape, left_out = list(walk.shape(call.node)), []
    if len(b.shape) == 1:
        b = _spread(b, (*b.shape, 1), {0: 0})
        shape.append(1)
        left_out.append(len(shape) - 1)
    if len(a.shape) == 1:
        a = _spread(a, (1, *a.shape), {0: 1})
        shape.insert(len(shape) - 1, 1)
        left_out = [len(shape) - 2, *(d + 1 for d in left_out)]
    both = isinstance(walk.env.get(first), Value) and isinstance(walk.env.get(second), Value)
    result = _matrix_product(walk, place(call.node), a, b, tuple(shape), both)
    rest = [d for d in range(len(shape)) if d not in left_out]
    return _spread(result, tuple(shape[d] for d in rest), {d: i for i, d in enumerate(rest)})


def _spread(value: Value, shape: tuple[int, ...], dims: dict[int, int]) -> Value:
    """The same tensor with other dimensions of size one: old dimension → new dimension."""
    labels = {dims[d]: label.with_array(moved(label.array, dims, len(shape))) for d, label in value.labels.items()}
    return Value(shape, labels)


def _matrix_product(walk: Walk, where: str, a: Value, b: Value, shape: tuple[int, ...], both: bool) -> Value:
    """The product of two values of rank two or more; ``both``: neither is a parameter."""
    rank = max(len(a.shape), len(b.shape))
    left, right = _aligned(a, rank), _aligned(b, rank)
    if a.shape[-1] > 1:
        contract(walk, [left.get(rank - 1), _swapped(right.get(rank - 2))], where)
    if both and rank > 2:
        walk.attention |= set().union(*(label.sites for label in [*left.values(), *right.values()]))
    rows = Value(
        (*padded(a.shape, rank)[:-1], 1),
        {d: independent(walk, label, rank - 1, rank) for d, label in left.items() if d < rank - 1},
    )
    columns = Value(
        (*padded(b.shape, rank)[:-2], 1, b.shape[-1]),
        {d: independent(walk, label, rank - 2, rank) for d, label in right.items() if d != rank - 2},
    )
    return Value(shape, broadcast(walk.atoms, [rows, columns], shape, where, "any"))


def _aligned(value: Value, rank: int) -> dict[int, Label]:
    """Labels as a tensor of this rank has them, with leading dimensions of size one."""
    shift = rank - len(value.shape)
    return {d + shift: label.with_array(aligned(label.array, rank)) for d, label in value.labels.items()}


def padded(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (1,) * (rank - len(shape)) + shape


def _swapped(label: Label | None) -> Label | None:
    """A label of the second operand's rows, laid along the first operand's columns."""
    return label.with_array(np.swapaxes(label.array, -1, -2)) if label is not None else None


@rule("bilinear")
def bilinear(walk: Walk, call: ops.Call) -> Value:
    first, second, weight = (walk.operand(call[name]) for name in ("input", "other", "weight"))
    rank, last = len(first.shape), len(first.shape) - 1
    for value, dim in ((first, 1), (second, 2)):
        column = lying(walk, weight, dim, last, rank)
        if weight.shape[dim] > 1:
            contract(walk, [value.labels.get(last)], place(call.node), column)
        walk.role(call["weight"], dim, "in")
        for d, label in value.labels.items():
            if d != last:
                walk.freeze(label, f"a batch dimension at {place(call.node)}")
    walk.role(call["weight"], 0, "out")
    result = Value((*first.shape[:-1], weight.shape[0]))
    produce(walk, call, result, lying(walk, weight, 0, 0, 1), last)
    return result


@rule("einsum", "tensordot", "outer")
def index_notation(walk: Walk, call: ops.Call) -> Value:
    operands = factors(call)
    values = [value for operand in operands if (value := walk.value(operand)) is not None]
    found = notation(call, [len(value.shape) for value in values])
    if found is None:
        return walk.give_up(call.node, f"{call.kind} in the form of lists has no rule")
    inputs, output = found
    shape, where = walk.shape(call.node), place(call.node)
    place_of = {letter: i for i, letter in enumerate(sorted({letter for term in inputs for letter in term}))}
    rank, summed = len(place_of), [d for letter, d in place_of.items() if letter not in output]
    spread = [_laid_out(walk, value, [place_of[x] for x in term], rank) for value, term in zip(values, inputs, strict=True)]
    sizes = tuple(max(value.shape[d] for value in spread) for d in range(rank))
    for d in summed:
        contract(walk, [v.labels.get(d) for v in spread if v.shape[d] > 1], where)
    joined = broadcast(walk.atoms, [v.without(*summed) for v in spread], sizes, where, "any")
    if len(spread) > 1 and all(isinstance(walk.env.get(operand), Value) for operand in operands):
        walk.attention |= set().union(*(label.sites for v in spread for label in v.labels.values()))
    result, dims = Value(shape), {place_of[letter]: i for i, letter in enumerate(output)}
    for d, label in joined.items():
        array = walk.atoms.tie(label.array, *summed)
        result.labels[dims[d]] = label.with_array(moved(array, dims, len(shape)))
    return result


def _laid_out(walk: Walk, value: Value, places: list[int], rank: int) -> Value:
    """An operand with every dimension at the place of its index, of size one elsewhere; of an index that it names twice (a
    diagonal) both dimensions lose the same."""
    full, labels = [1] * rank, dict[int, Label]()
    for d, size in enumerate(value.shape):
        full[places[d]] = size
    repeated = len(set(places)) < len(places)
    for d, label in value.labels.items():
        own = label.with_array(
            walk.row_of(label, d, places[d], rank) if repeated else moved(label.array, dict(enumerate(places)), rank)
        )
        labels[places[d]] = join(walk.atoms, [own, labels[places[d]]], "a diagonal") if places[d] in labels else own
    for d in range(len(places)):
        if d not in value.labels and places.count(places[d]) > 1:
            walk.freeze(labels.pop(places[d], None), "a diagonal with a dimension of fixed size")
    return Value(tuple(full), labels)


@rule("cosine_similarity", "cdist")
def compared(walk: Walk, call: ops.Call) -> Value:
    """Two tensors compared along a dimension: corresponding indices go together; the others stay."""
    values, where = [walk.operand(call[name]) for name in ("input", "other")], place(call.node)
    dim = -1 if call.kind == "cdist" else call["dim"]
    labels = [value.labels.get(value.dim(dim)) for value in values]
    lines = [
        label.with_array(walk.row_of(label, value.dim(dim), 0, 1)) if label is not None else None
        for value, label in zip(values, labels, strict=True)
    ]
    contract(walk, lines, where)
    for value in values:
        walk.freeze(value.without(value.dim(dim)), f"is compared with others at {where}")
    return Value(walk.shape(call.node))


@rule("embedding")
def embedding(walk: Walk, call: ops.Call) -> Value:
    return _look_up(walk, call)


@rule("embedding_bag")
def embedding_bag(walk: Walk, call: ops.Call) -> Value:
    return _look_up(walk, call)


def _look_up(walk: Walk, call: ops.Call) -> Value:
    weight = walk.operand(call["weight"])
    shape = walk.shape(call.node)
    walk.freeze(weight.labels.get(0), "the entries of a table stay")
    walk.role(call["weight"], 1, "out")
    last = len(shape) - 1
    found = lying(walk, weight, 1, last, len(shape))
    if found is not None and _renormalises(walk, call):
        walk.freeze(found, f"the length of its entries is bounded at {place(call.node)}")
    return Value(shape, {last: found} if found is not None else {})


def _renormalises(walk: Walk, call: ops.Call) -> bool:
    """Whether a look-up scales entries to ``max_norm`` in place, as a longer or shorter entry would not be."""
    if call.node.op == "call_module":
        return getattr(walk.module.get_submodule(str(call.node.target)), "max_norm", None) is not None
    return call["max_norm"] is not None
