"""Rules of what runs over a sequence: attention and recurrences."""

from __future__ import annotations

from typing import Any

import numpy as np

from fxcompress.graph import ops
from fxcompress.graph.channels.atoms import Ints
from fxcompress.graph.channels.calls import place
from fxcompress.graph.channels.contractions import contract, padded
from fxcompress.graph.channels.labels import Label, Value, aligned, broadcast, map_values
from fxcompress.graph.channels.walk import Count, Walk, rule
from fxcompress.graph.shapes import module_of


@rule("scaled_dot_product_attention")
def attention(walk: Walk, call: ops.Call) -> Value:
    query, key, value = (walk.operand(call[name]) for name in ("query", "key", "value"))
    where, rank = place(call.node), len(query.shape)
    if call["enable_gqa"] is True:
        key, value = (_repeated(v, query.shape[-3] // v.shape[-3]) for v in (key, value))
    contract(walk, [query.labels.get(rank - 1), key.labels.get(rank - 1)], where)
    walk.attention |= set().union(*(label.sites for v in (query, key, value) for label in v.labels.values()))
    for operand, dim in ((key, rank - 2), (value, rank - 2), (query, rank - 2)):
        walk.freeze(operand.labels.get(dim), f"attention runs over it at {where}")
    shape = walk.shape(call.node)
    parts = [query.without(rank - 1, rank - 2), key.without(rank - 1, rank - 2), value.without(rank - 1, rank - 2)]
    batch = broadcast(walk.atoms, [Value((*v.shape[:-2], 1, 1), v.labels) for v in parts], (*shape[:-2], 1, 1), where, "any")
    mask = walk.value(call["attn_mask"])
    if mask is not None:
        weights = Value((*shape[:-2], 1, 1), batch)
        heads = Value(
            (*padded(mask.shape, rank)[:-2], 1, 1),
            {
                d + rank - len(mask.shape): label.with_array(aligned(label.array, rank))
                for d, label in mask.labels.items()
                if d < len(mask.shape) - 2
            },
        )
        batch = broadcast(walk.atoms, [weights, heads], (*shape[:-2], 1, 1), where, "any")
        for d in (-1, -2):
            walk.freeze(mask.labels.get(mask.dim(d)), f"attention runs over it at {where}")
    result = Value(shape, dict(batch))
    last = value.labels.get(rank - 1)
    if last is not None:
        result.labels[rank - 1] = last.with_array(walk.atoms.tie(last.array, rank - 2))
    return result


def _repeated(value: Value, times: int) -> Value:
    """Grouped-query attention: each head of keys and values serves ``times`` heads of queries."""
    dim = len(value.shape) - 3
    shape = (*value.shape[:dim], value.shape[dim] * times, *value.shape[dim + 1 :])
    labels = {
        d: label.with_array(np.repeat(label.array, times, axis=dim) if label.array.shape[dim] > 1 else label.array)
        for d, label in value.labels.items()
    }
    return Value(shape, labels)


@rule("lstm", "gru", "rnn")
def recurrent(walk: Walk, call: ops.Call) -> Any:
    """All layers and directions share one hidden size: each has units of its own, and each keeps as many.

    A hidden unit owns its row in every gate, its column in the recurrent weights, and its input column one layer up.
    """
    part: Any = module_of(call.node)
    value = walk.operand(call["input"])
    name, where = str(call.node.target), place(call.node)
    extra = [v for v in walk.inputs(call.node) if v is not value]
    directions = 2 if part.bidirectional else 1
    gates = {"LSTM": 4, "GRU": 3}.get(part.mode, 1)
    size, projected = part.hidden_size, part.proj_size
    cells = walk.atoms.new(part.num_layers * directions, size)
    outs = walk.atoms.new(part.num_layers * directions, projected) if projected else cells
    last = len(value.shape) - 1
    walk.freeze(value.without(last), f"a recurrence runs over it, or it is a batch dimension, at {where}")
    below = value.labels.get(last)
    lower = given = walk.atoms.line(below.array, last) if below is not None else None
    for layer in range(part.num_layers):
        for direction in range(directions):
            row = layer * directions + direction
            suffix = f"_l{layer}" + ("_reverse" if direction else "")
            _cell(walk, f"{name}.", suffix, np.tile(cells[row], gates), outs[row], lower, where, bool(projected))
        lower = outs[layer * directions : (layer + 1) * directions].reshape(-1)
    walk.counts.append(Count(call.node, "hidden_size", cells[0]))
    if projected:
        walk.counts.append(Count(call.node, "proj_size", outs[0]))
    if below is not None and given is not None:
        walk.counts.append(Count(call.node, "input_size", given))
        if not below.zero:
            walk.atoms.doubt(given, f"what it leaves behind is not zero at {where}")
    for array in [cells, outs] if projected else [cells]:
        walk.sites.equal(array, 1, where)
        if size == 1:
            walk.atoms.freeze(array, "one unit is left")
    for state in extra:
        walk.freeze(state, f"an initial state at {where}")
    if extra:
        walk.atoms.freeze(cells, f"an initial state of fixed size at {where}")
        walk.atoms.freeze(outs, f"an initial state of fixed size at {where}")
    return _recurrent_results(walk, call, part, cells, outs, lower)


@rule("recurrent_cell")
def recurrent_cell(walk: Walk, call: ops.Call) -> Any:
    """One step: a hidden unit owns its rows of gates, its column in the recurrent weights, and its place in the states."""
    value, where, held = walk.operand(call["input"]), place(call.node), call["weight_ih"]
    if not isinstance(held, ops.Attr) or not held.name.endswith("weight_ih"):
        return walk.give_up(call.node, "its weights are computed")
    (rows, _), (_, size) = (walk.operand(call[name]).shape for name in ("weight_ih", "weight_hh"))
    units = walk.atoms.new(size)
    walk.freeze(value.without(len(value.shape) - 1), f"a batch dimension at {where}")
    below = value.labels.get(len(value.shape) - 1)
    lower = walk.atoms.line(below.array, len(value.shape) - 1) if below is not None else None
    _cell(walk, held.name.removesuffix("weight_ih"), "", np.tile(units, rows // size), units, lower, where, False)
    walk.counts.append(Count(call.node, "hidden_size", units))
    if lower is not None:
        walk.counts.append(Count(call.node, "input_size", lower))
    state = walk.value(call["state"])
    states = [state] if state is not None else walk.several(call["state"] or ())
    for state in states:
        _same_units(walk, state, units, where)
    given = [label for v in (value, *states) if (label := v.labels.get(len(v.shape) - 1)) is not None]
    for label in given:
        if not label.zero:
            walk.atoms.doubt(label.array, f"what it leaves behind is not zero at {where}")
    shapes = walk.unlabelled(call.node)
    zero = all(label.zero for label in given)
    return map_values(lambda v: _with_units(v, units, zero), shapes)


def _same_units(walk: Walk, state: Value, units: Ints, where: str) -> None:
    last = len(state.shape) - 1
    label = state.labels.get(last)
    if label is not None:
        walk.atoms.merge(walk.atoms.line(label.array, last), units, where)
    elif state.shape[last] > 1:
        walk.atoms.freeze(units, f"a state of fixed size at {where}")
    for dim in set(state.labels) - {last}:
        walk.freeze(state.labels[dim], f"a batch dimension at {where}")


def _with_units(value: Value, units: Ints, zero: bool) -> Value:
    last = len(value.shape) - 1
    value.labels[last] = Label(units.reshape((1,) * last + (-1,)), zero)
    return value


def _cell(
    walk: Walk, prefix: str, suffix: str, rows: Ints, fed_back: Ints, lower: Ints | None, where: str, projected: bool
) -> None:
    tensors = [f"{prefix}weight_ih{suffix}", f"{prefix}weight_hh{suffix}"]
    tensors += [n for kind in ("bias_ih", "bias_hh") if (n := f"{prefix}{kind}{suffix}") in walk.state]
    for tensor in tensors:
        label = walk.tensor(tensor).labels.get(0)
        if label is not None:
            walk.atoms.merge(label.array.reshape(-1), rows, where)
            walk.roles.setdefault((walk.canonical[tensor], 0), "out")
    columns = [(tensors[1], fed_back), (tensors[0], lower)]
    if projected:
        columns.append((f"{prefix}weight_hr{suffix}", rows[: len(rows) // 4]))
        made = walk.tensor(f"{prefix}weight_hr{suffix}").labels.get(0)
        if made is not None:
            walk.atoms.merge(made.array.reshape(-1), fed_back, where)
            walk.roles.setdefault((walk.canonical[f"{prefix}weight_hr{suffix}"], 0), "out")
    for tensor, atoms in columns:
        label = walk.tensor(tensor).labels.get(1)
        walk.roles.setdefault((walk.canonical[tensor], 1), "in")
        if label is None:
            continue
        if atoms is None:
            walk.freeze(label, f"is summed with a value of fixed size at {where}")
        else:
            walk.atoms.merge(label.array.reshape(-1), atoms, where)


def _recurrent_results(walk: Walk, call: ops.Call, part: Any, cells: Ints, outs: Ints, top: Ints | None) -> Any:
    """(output, state), where a state is [layers · directions, batch, size]."""
    shapes: Any = walk.unlabelled(call.node)
    output, states = shapes
    assert top is not None
    rank = len(output.shape)
    output.labels[rank - 1] = Label(top.reshape((1,) * (rank - 1) + (-1,)))

    def state(value: Value, atoms: Ints) -> Value:
        own = len(value.shape) - 1
        shape = (atoms.shape[0], *(1,) * (own - 1), atoms.shape[1])
        value.labels[own] = Label(atoms.reshape(shape))
        return value

    if isinstance(states, Value):
        return output, state(states, outs)
    return output, (state(states[0], outs), state(states[1], cells))
