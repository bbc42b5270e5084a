"""Rules of operators that keep every channel in its place: arithmetic, activations, normalisation, pooling, reductions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxcompress.graph import ops
from fxcompress.graph.channels.calls import place
from fxcompress.graph.channels.labels import Label, Value, alone, broadcast, join, map_values, moved, row, values_in
from fxcompress.graph.channels.walk import FAMILIES, Count, Walk, rule

ZERO_IF_ALL = {"add", "sub", "rsub", "maximum", "minimum", "where", "lerp", "addcmul", "to", "complex"}
ZERO_IF_ANY = {"mul", "and"}
ZERO_IF_FIRST = {"div", "pow", "masked_fill", "clamp", "floordiv", "mod"}
"""When the result of a binary operator is zero: if all its operands are, if any is, if the first is."""


@rule("pointwise", table=FAMILIES)
def pointwise(walk: Walk, call: ops.Call) -> Value:
    shape = walk.shape(call.node)
    arguments = [walk.value(value) for name, value in call.arguments.items() if name != "activation"]
    values = [value for value in arguments if value is not None]
    return Value(shape, broadcast(walk.atoms, values, shape, place(call.node), _zero_of(walk, call, values)))


def _zero_of(walk: Walk, call: ops.Call, values: list[Value]) -> str:
    """When the result is zero; a constant operand decides by its value."""
    if call.kind in ZERO_IF_ANY:
        return "any"
    if call.kind in ZERO_IF_FIRST:
        return "all" if len(values) == 1 and _first_is_value(walk, call) and _keeps_zero(walk, call) else "never"
    if call.kind in ZERO_IF_ALL:
        return "all" if all(v in (0, None) or walk.value(v) is not None for v in _operands(call)) else "never"
    return "all" if _keeps_zero(walk, call) else "never"


def _operands(call: ops.Call) -> list[Any]:
    constants = [v for k, v in call.arguments.items() if k not in ("activation", "inplace", "alpha", "dtype")]
    return [0 if v == 0 and not isinstance(v, fx.Node) else v for v in constants if not isinstance(v, torch.dtype)]


def _first_is_value(walk: Walk, call: ops.Call) -> bool:
    return walk.value(call["input"]) is not None


@rule("activation", table=FAMILIES)
def activation(walk: Walk, call: ops.Call) -> Value:
    value = walk.operand(call["input"])
    zero = _keeps_zero(walk, call)
    return Value(value.shape, {d: Label(label.array, label.zero and zero, label.sites) for d, label in value.labels.items()})


def _keeps_zero(walk: Walk, call: ops.Call) -> bool:
    """Whether an elementwise operator with one tensor operand maps zero to zero: it is asked."""
    names = [n.name for n in call.node.all_input_nodes if isinstance(walk.env[n], Value)]
    if len(names) != 1:
        return False
    known = walk.readings.of(call.node, walk.env, names)
    if "zero" not in known:
        known["zero"] = _gives_zero(walk, call, names[0])
    return bool(known["zero"])


def _gives_zero(walk: Walk, call: ops.Call, name: str) -> bool:
    try:
        result = walk.evaluate(call.node, "cpu", **{name: torch.zeros((), dtype=torch.float32, device="cpu")})
    except Exception:  # it wants a real shape; nothing is claimed
        return False
    return isinstance(result, torch.Tensor) and bool((result == 0).all())


@rule("to")
def convert(walk: Walk, call: ops.Call) -> Value | None:
    return walk.value(call["input"])


@rule("prelu")
def prelu(walk: Walk, call: ops.Call) -> Value:
    value, weight = walk.operand(call["input"]), walk.operand(call["weight"])
    result = Value(value.shape, dict(value.labels))
    if weight.shape and weight.shape[-1] > 1:
        _bind(walk, call, result, 1, ("weight",))
        line = alone(walk.atoms, weight, 0)
        if line is not None:
            walk.counts.append(Count(call.node, "num_parameters", line))
    return result


def _bind(walk: Walk, call: ops.Call, result: Value, channel: int, names: tuple[str, ...]) -> None:
    """Vectors with an entry per channel go with the channels."""
    given = result.labels.get(channel)
    channels = given.array.reshape(-1) if given is not None and given.array.size == result.shape[channel] else None
    for name in names:
        role = "scale" if name == "weight" and call.kind == "batch_norm" else "norm"
        if channels is not None and walk.adopt(call[name], channels):
            walk.role(call[name], 0, role)
            result.labels[channel] = replace(result.labels[channel], zero=True)
            continue
        vector = walk.value(call[name]) if call[name] is not None else None
        line = alone(walk.atoms, vector, 0) if vector is not None else None
        if line is None:
            if vector is not None and vector.shape[0] > 1:
                walk.freeze(result.labels.get(channel), f"meets a value of fixed size at {place(call.node)}")
            continue
        walk.role(call[name], 0, role)
        array = moved(line, {0: channel}, len(result.shape))
        label = result.labels.get(channel)
        if label is None:
            walk.atoms.freeze(array, f"belongs to channels of fixed size at {place(call.node)}")
            continue
        joined = join(walk.atoms, [label, Label(array)], place(call.node))
        result.labels[channel] = Label(joined.array, True, label.sites)


@rule("batch_norm", "instance_norm")
def batch_norm(walk: Walk, call: ops.Call) -> Value:
    """An index of another dimension may go from under kept statistics; from under its own it takes a part of them."""
    value = walk.operand(call["input"])
    result = Value(value.shape, dict(value.labels))
    for dim, label in value.labels.items():
        if dim != 1:
            result.labels[dim] = Label(label.array, False, label.sites)
            if call["running_mean"] is None:
                walk.atoms.doubt(label.array, f"changes the statistics of {place(call.node)}")
    names = ("weight", "bias", "running_mean", "running_var")
    _bind(walk, call, result, 1, names)
    if 1 in value.labels:
        walk.counts.append(Count(call.node, "num_features", row(result.labels[1].array, 1)))
    return result


@rule("layer_norm", "rms_norm")
def layer_norm(walk: Walk, call: ops.Call) -> Value:
    value = walk.operand(call["input"])
    rank, where = len(value.shape), place(call.node)
    normalised = call["normalized_shape"]
    count = len(normalised) if isinstance(normalised, (tuple, list, torch.Size)) else 1
    result = Value(value.shape, dict(value.labels))
    first = rank - count
    for name in ("weight", "bias"):
        vector = walk.value(call[name]) if call[name] is not None else None
        for dim in range(count) if vector is not None else ():
            assert vector is not None
            walk.role(call[name], dim, "norm")
            if dim not in vector.labels:
                if vector.shape[dim] > 1:
                    walk.freeze(result.labels.get(first + dim), f"meets a value of fixed size at {where}")
                continue
            array = moved(vector.labels[dim].array, {d: first + d for d in range(count)}, rank)
            if first + dim in result.labels:
                walk.atoms.merge(result.labels[first + dim].array, array, where)
            else:
                walk.atoms.freeze(array, f"belongs to channels of fixed size at {where}")
    for dim in range(first, rank):
        if dim in result.labels:
            label = result.labels[dim]
            walk.atoms.doubt(label.array, f"changes the statistics of {where}")
            result.labels[dim] = Label(label.array, call["weight"] is not None or call.kind == "rms_norm", label.sites)
            walk.counts.append(Count(call.node, f"normalized_shape.{dim - first}", row(label.array, dim)))
    return result


@rule("group_norm")
def group_norm(walk: Walk, call: ops.Call) -> Value:
    """Channels in groups that share statistics: whole groups go exactly; equal numbers from every group change them."""
    value = walk.operand(call["input"])
    result, where, groups = Value(value.shape, dict(value.labels)), place(call.node), call["num_groups"]
    for dim, label in value.labels.items():
        if dim != 1:
            walk.freeze(label, f"statistics run over it at {where}")
    _bind(walk, call, result, 1, ("weight", "bias"))
    found = result.labels.get(1)
    if found is None or not isinstance(groups, int):
        walk.freeze(found, f"its groups are not known at {where}")
        return result
    line = walk.atoms.line(found.array, 1).reshape(groups, -1)
    whole = line.shape[1] == 1
    if not whole:
        site = f"{where}:groups"
        whole = walk.sites.choose(site, 2, line) == 1
        result.labels[1] = Label(found.array, found.zero, found.sites | {site})
    if whole:
        walk.atoms.tie(line, 1)
        walk.counts.append(Count(call.node, "num_groups", line[:, 0]))
    else:
        walk.sites.equal(line, 1, where)
        walk.atoms.doubt(line, f"changes the statistics of {where}")
    walk.counts.append(Count(call.node, "num_channels", line.reshape(-1)))
    return result


@rule("softmax", "log_softmax", "softmin")
def softmax(walk: Walk, call: ops.Call) -> Value | None:
    return _along(walk, call, "changes the sum of")


@rule("softmax2d")
def softmax2d(walk: Walk, call: ops.Call) -> Value | None:
    return _along(walk, call, "changes the sum of", default=-3)


@rule("normalize")
def normalize(walk: Walk, call: ops.Call) -> Value | None:
    return _along(walk, call, None, default=1)


def _along(walk: Walk, call: ops.Call, doubt: str | None, default: int = -1) -> Value | None:
    value = walk.operand(call["input"])
    dim = call["dim"] if isinstance(call["dim"], int) else default
    label = value.labels.get(value.dim(dim))
    if label is None:
        return value
    if doubt is not None:
        walk.atoms.doubt(label.array, f"{doubt} {place(call.node)}")
    result = Value(value.shape, dict(value.labels))
    result.labels[value.dim(dim)] = Label(label.array, label.zero and doubt is None, label.sites)
    return result


@rule("local_response_norm")
def local_response_norm(walk: Walk, call: ops.Call) -> Value:
    value = walk.operand(call["input"])
    walk.freeze(value.labels.get(1), f"neighbouring channels meet at {place(call.node)}")
    return value.without(1)


@rule("pooling", table=FAMILIES)
def pooling(walk: Walk, call: ops.Call) -> Any:
    """Space changes its size, channels stay; pooled dimensions that are labelled keep every index."""
    value = walk.operand(call["input"])
    spatial = int(call.kind[-2]) if call.kind[-2].isdigit() else len(value.shape) - 2
    kept = len(value.shape) - spatial
    for dim, label in value.labels.items():
        if dim >= kept:
            walk.freeze(label, f"a window slides over it at {place(call.node)}")
    labels = {
        d: label.with_array(walk.atoms.tie(label.array, *range(kept, label.array.ndim)))
        for d, label in value.labels.items()
        if d < kept
    }
    shapes = walk.unlabelled(call.node)
    return map_values(lambda v: Value(v.shape, dict(labels)), shapes)


@rule("grid_sample")
def grid_sample(walk: Walk, call: ops.Call) -> Value:
    value, grid = walk.value(call["input"]), walk.value(call["grid"])
    assert value is not None
    walk.freeze(grid, f"coordinates at {place(call.node)}")
    for dim, label in value.labels.items():
        if dim > 1:
            walk.freeze(label, f"a grid runs over it at {place(call.node)}")
    return Value(walk.shape(call.node), {1: value.labels[1]} if 1 in value.labels else {})


@rule("fft")
def fourier(walk: Walk, call: ops.Call) -> Value:
    """Dimensions that are transformed stay whole; every index of the others is transformed by itself."""
    value = walk.operand(call["input"])
    dims = _transformed(call, value)
    for dim in dims & set(value.labels):
        walk.freeze(value.labels[dim], f"it is transformed at {place(call.node)}")
    labels = dict(value.without(*dims).labels)
    for dim, label in labels.items():
        labels[dim] = label.with_array(walk.atoms.tie(label.array, *dims))
    return Value(walk.shape(call.node), labels)


def _transformed(call: ops.Call, value: Value) -> set[int]:
    """The dimensions a Fourier transform runs over: those it names, or as many of the last as its name and sizes say."""
    if call["dim"] is not None:
        return {value.dim(d) for d in ([call["dim"]] if isinstance(call["dim"], int) else call["dim"])}
    name, sizes, rank = str(getattr(call.node.target, "__name__", "")).split(".")[0], call["s"], len(value.shape)
    given = len(sizes) if isinstance(sizes, (tuple, list)) else rank
    count = {"2": 2, "n": given}.get(name[-1:], rank if "shift" in name else 1)
    return set(range(rank - count, rank))


@rule("view_as_complex", "view_as_real")
def pairs(walk: Walk, call: ops.Call) -> Value:
    """The last dimension of a tensor of real numbers holds real and imaginary parts; the others are as they were."""
    value, shape = walk.operand(call["input"]), walk.shape(call.node)
    rest = min(len(value.shape), len(shape))
    walk.freeze(value.labels.get(rest), f"real and imaginary parts at {place(call.node)}")
    labels = {}
    for dim, label in value.without(rest).labels.items():
        array = walk.atoms.tie(label.array, rest) if label.array.ndim > rest else label.array
        labels[dim] = label.with_array(array.reshape(*array.shape[:rest], *(1,) * (len(shape) - rest)))
    return Value(shape, labels)


ORDERED = ("argmax", "topk", "sort", "cumsum")
"""Reductions whose result depends on where along the dimension a value stands."""


@rule("reduction", table=FAMILIES)
def reduction(walk: Walk, call: ops.Call) -> Any:
    """Dimensions that are reduced go; whether that is exact depends on the operator and on what a channel leaves behind."""
    value = walk.operand(call["input"])
    where, rank = place(call.node), len(value.shape)
    dims = _reduced(call, value)
    if dims is None:
        return pointwise(walk, call)
    for dim in dims & set(value.labels):
        label = value.labels[dim]
        if call.kind in ORDERED:
            walk.freeze(label, f"order matters at {where}")
        elif not (call.kind in ("sum", "norm") and label.zero):
            walk.atoms.doubt(label.array, f"changes the {call.kind} of {where}")
    shapes = walk.unlabelled(call.node)
    if call.kind in ("topk", "sort", "cumsum"):
        kept = {d: label for d, label in value.labels.items() if d not in dims}
        return map_values(lambda v: Value(v.shape, dict(kept)), shapes)
    keepdim = call["keepdim"] is True or any(len(v.shape) == rank for v in values_in(shapes))
    rest = [d for d in range(rank) if d not in dims]
    place_of = {d: (d if keepdim else i) for i, d in enumerate(rest)}
    labels = {}
    for dim, label in value.labels.items():
        if dim in dims:
            continue
        array = walk.atoms.tie(label.array, *dims)
        made = rank if keepdim else len(rest)
        labels[place_of[dim]] = Label(moved(array, place_of, made), label.zero, label.sites)
    return map_values(lambda v: Value(v.shape, dict(labels)), shapes)


def _reduced(call: ops.Call, value: Value) -> set[int] | None:
    """The dimensions a reduction runs over; None where it compares two tensors instead."""
    dim = call["dim"]
    if isinstance(dim, fx.Node):
        return None
    if dim is None or isinstance(dim, bool):
        dim = -1 if call.kind in ("topk", "sort") else tuple(range(len(value.shape)))
    return {value.dim(d) for d in ((dim,) if isinstance(dim, int) else dim)} or set(range(len(value.shape)))
