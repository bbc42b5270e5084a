"""Rules of operators that sum over channels: convolutions, products, attention, embeddings, recurrences."""

from __future__ import annotations

from typing import Any

import numpy as np

from fxcompress.graph import ops
from fxcompress.graph.channels.atoms import Ints
from fxcompress.graph.channels.labels import Label, Value, aligned, broadcast, join, moved
from fxcompress.graph.channels.walk import Count, Walk, place, rule
from fxcompress.graph.shapes import module_of

CONVOLUTIONS = tuple(f"conv{d}d" for d in (1, 2, 3))
TRANSPOSED = tuple(f"conv_transpose{d}d" for d in (1, 2, 3))


def contract(walk: Walk, labels: list[Label | None], where: str, weight: Label | None = None) -> None:
    """The operands' labels of a dimension that is summed over; None: an operand that is whole there.

    ``weight`` is the label of the parameter that meets them. A sum loses nothing when a channel goes that is zero once its
    producer is; otherwise what it leaves behind (a bias through a sigmoid) is lost with it.
    """
    operands = [label for label in labels if label is not None]
    known = operands + ([weight] if weight is not None else [])
    if not known:
        return
    joined = join(walk.atoms, known, where)
    if len(operands) < len(labels):
        walk.freeze(joined, f"is summed with a value of fixed size at {where}")
    if operands and not any(label.zero for label in operands):
        walk.atoms.doubt(joined.array, f"what it leaves behind is not zero at {where}")


def independent(walk: Walk, label: Label, of: int, rank: int) -> Label:
    """``label`` without dependence on dimension ``of``, which goes away."""
    array = aligned(label.array, rank)
    return label.with_array(walk.atoms.tie(array, of) if array.shape[of] > 1 else array)


@rule("linear")
def linear(walk: Walk, call: ops.Call) -> Value:
    value, weight = walk.operand(call["input"]), walk.operand(call["weight"])
    where, last = place(call.node), len(value.shape) - 1
    rank = len(value.shape)
    wanted = weight.labels.get(1)
    column = wanted.with_array(moved(wanted.array, {1: last}, rank)) if wanted else None
    if weight.shape[1] > 1:
        contract(walk, [value.labels.get(last)], where, column)
    walk.role(call["weight"], 0, "out")
    walk.role(call["weight"], 1, "in")
    shape = (*value.shape[:-1], weight.shape[0])
    result = Value(shape, {d: independent(walk, label, last, rank) for d, label in value.labels.items() if d != last})
    result.labels = {d: _not_zero(label, walk, call["bias"]) for d, label in result.labels.items()}
    _produce(walk, call, result, weight.labels.get(0), last)
    return result


def _not_zero(label: Label, walk: Walk, bias: Any) -> Label:
    return Label(label.array, label.zero and bias is None, label.sites)


def _produce(walk: Walk, call: ops.Call, result: Value, label: Label | None, dim: int) -> None:
    """The channels a weight makes, and its bias with them."""
    if label is None:
        return
    rank = len(result.shape)
    array = moved(label.array, {0: dim}, rank) if label.array.ndim else label.array
    bias = walk.value(call["bias"]) if call["bias"] is not None else None
    if bias is not None and 0 in bias.labels:
        walk.atoms.merge(array, moved(bias.labels[0].array, {0: dim}, rank), place(call.node))
        walk.role(call["bias"], 0, "out")
    elif bias is not None:
        walk.atoms.freeze(array, f"its bias has a fixed size at {place(call.node)}")
    result.labels[dim] = Label(array, True, label.sites)


@rule(*CONVOLUTIONS)
def convolution(walk: Walk, call: ops.Call) -> Value:
    value, weight = walk.operand(call["input"]), walk.operand(call["weight"])
    spatial = int(call.kind[-2])
    channel = len(value.shape) - spatial - 1
    result = Value(walk.shape(call.node))
    _keep_space(walk, call, value, weight, channel, spatial, result)
    walk.role(call["weight"], 0, "out")
    walk.role(call["weight"], 1, "in")
    if call["groups"] == 1:
        wanted = weight.labels.get(1)
        column = wanted.with_array(moved(wanted.array, {1: channel}, len(value.shape))) if wanted else None
        if weight.shape[1] > 1:
            contract(walk, [value.labels.get(channel)], place(call.node), column)
        _produce(walk, call, result, _flat(weight.labels.get(0)), channel)
        return result
    return _grouped(walk, call, value, weight, channel, result, transposed=False)


@rule(*TRANSPOSED)
def transposed(walk: Walk, call: ops.Call) -> Value:
    value, weight = walk.operand(call["input"]), walk.operand(call["weight"])
    spatial = int(call.kind[-2])
    channel = len(value.shape) - spatial - 1
    result = Value(walk.shape(call.node))
    _keep_space(walk, call, value, weight, channel, spatial, result)
    walk.role(call["weight"], 0, "in")
    walk.role(call["weight"], 1, "out")
    if call["groups"] == 1:
        wanted = weight.labels.get(0)
        column = wanted.with_array(moved(wanted.array, {0: channel}, len(value.shape))) if wanted else None
        if weight.shape[0] > 1:
            contract(walk, [value.labels.get(channel)], place(call.node), column)
        made = weight.labels.get(1)
        made = made.with_array(moved(made.array, {1: 0}, 1)) if made else None
        _produce(walk, call, result, made, channel)
        return result
    return _grouped(walk, call, value, weight, channel, result, transposed=True)


def _keep_space(walk: Walk, call: ops.Call, value: Value, weight: Value, channel: int, spatial: int, result: Value) -> None:
    """A kernel and the space it slides over keep their sizes; a batch dimension passes."""
    for dim, label in value.labels.items():
        if dim > channel:
            walk.freeze(label, f"a kernel slides over it at {place(call.node)}")
        elif dim < channel:
            array = walk.atoms.tie(label.array, channel)
            result.labels[dim] = Label(array, label.zero and call["bias"] is None, label.sites)
    for dim, label in weight.labels.items():
        if dim > 1:
            walk.freeze(label, "a kernel keeps its size")


def _flat(label: Label | None) -> Label | None:
    return label.with_array(label.array.reshape(-1)) if label is not None else None


def _grouped(
    walk: Walk, call: ops.Call, value: Value, weight: Value, channel: int, result: Value, transposed: bool
) -> Value:
    """A grouped convolution is a batched product over groups: channels split into groups, sum within each, merge again.

    Every group may keep inputs and outputs of its own as long as each keeps as many; or whole groups go.
    """
    where, groups = place(call.node), int(call["groups"])
    per_input, per_output = value.shape[channel] // groups, result.shape[channel] // groups
    found = value.labels.get(channel)
    flat = _line(walk, found, channel) if found is not None else None
    inputs = flat.array.reshape(groups, per_input) if flat is not None else None
    sites: frozenset[str] = flat.sites if flat is not None else frozenset()
    whole = min(per_input, per_output) == 1
    if not whole:
        site = f"{where}:groups"
        whole = walk.sites.choose(site, 2, weight.labels[0].array if inputs is None else inputs) == 1
        sites |= {site}
    made = _whole_groups(walk, call, weight, inputs, groups, per_output, transposed) if whole else None
    if made is None:
        rows, made = _group_weights(walk, weight, groups, per_input, per_output, transposed)
        if inputs is not None:
            walk.atoms.merge(inputs, rows, where)
            walk.sites.equal(inputs, 1, where)
        else:
            walk.atoms.freeze(rows, f"is summed with a value of fixed size at {where}")
        walk.sites.equal(made, 1, where)
    if flat is not None and not flat.zero:
        walk.atoms.doubt(flat.array, f"what it leaves behind is not zero at {where}")
    _produce(walk, call, result, Label(np.ascontiguousarray(made).reshape(-1), True, sites), channel)
    return result


def _line(walk: Walk, label: Label, channel: int) -> Label:
    """A label along the channels alone."""
    array = label.array
    for dim in range(array.ndim):
        if dim != channel:
            array = walk.atoms.tie(array, dim)
    return label.with_array(array.reshape(-1))


def _group_weights(
    walk: Walk, weight: Value, groups: int, per_input: int, per_output: int, transposed: bool
) -> tuple[Ints, Ints]:
    """The weight's inputs [groups, inputs per group] and outputs [groups, outputs per group], of its own for every group."""
    size = per_output if transposed else per_input
    if weight.labels[1].array.shape[0] == 1:
        rows = np.repeat(walk.atoms.new(groups, size), weight.shape[0] // groups, axis=0)
        weight.labels[1] = Label(rows.reshape(weight.shape[0], size, *(1,) * (len(weight.shape) - 2)))
    inner = weight.labels[1].array.reshape(groups, -1, size)[:, 0]
    outer = weight.labels[0].array.reshape(groups, -1)
    return (outer, inner) if transposed else (inner, outer)


def _whole_groups(
    walk: Walk, call: ops.Call, weight: Value, inputs: Ints | None, groups: int, per_output: int, transposed: bool
) -> Ints:
    """A group goes with all its inputs and outputs; returns its outputs [groups, outputs per group]."""
    where = place(call.node)
    walk.freeze(weight.labels.get(1), f"a group keeps its channels at {where}")
    own = weight.labels[0].array.reshape(groups, -1)
    leaders = own[:, :1]
    made = np.repeat(leaders, per_output, axis=1) if transposed else own
    walk.atoms.merge(leaders, own, where)
    if inputs is not None:
        walk.atoms.merge(leaders, inputs, where)
    else:
        walk.atoms.freeze(own, f"takes channels of fixed size at {where}")
    walk.counts.append(Count(call.node, "groups", leaders.reshape(-1)))
    return made


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
        (*_padded(a.shape, rank)[:-1], 1),
        {d: independent(walk, label, rank - 1, rank) for d, label in left.items() if d < rank - 1},
    )
    columns = Value(
        (*_padded(b.shape, rank)[:-2], 1, b.shape[-1]),
        {d: independent(walk, label, rank - 2, rank) for d, label in right.items() if d != rank - 2},
    )
    return Value(shape, broadcast(walk.atoms, [rows, columns], shape, where, "any"))


def _aligned(value: Value, rank: int) -> dict[int, Label]:
    """Labels as a tensor of this rank has them, with leading dimensions of size one."""
    shift = rank - len(value.shape)
    return {d + shift: label.with_array(aligned(label.array, rank)) for d, label in value.labels.items()}


def _padded(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (1,) * (rank - len(shape)) + shape


def _swapped(label: Label | None) -> Label | None:
    """A label of the second operand's rows, laid along the first operand's columns."""
    return label.with_array(np.swapaxes(label.array, -1, -2)) if label is not None else None


@rule("bilinear")
def bilinear(walk: Walk, call: ops.Call) -> Value:
    first, second, weight = (walk.operand(call[name]) for name in ("input", "other", "weight"))
    rank, last = len(first.shape), len(first.shape) - 1
    for value, dim in ((first, 1), (second, 2)):
        wanted = weight.labels.get(dim)
        column = wanted.with_array(moved(wanted.array, {dim: last}, rank)) if wanted else None
        if weight.shape[dim] > 1:
            contract(walk, [value.labels.get(last)], place(call.node), column)
        walk.role(call["weight"], dim, "in")
        for d, label in value.labels.items():
            if d != last:
                walk.freeze(label, f"a batch dimension at {place(call.node)}")
    walk.role(call["weight"], 0, "out")
    result = Value((*first.shape[:-1], weight.shape[0]))
    _produce(walk, call, result, _flat(weight.labels.get(0)), last)
    return result


@rule("einsum")
def einsum(walk: Walk, call: ops.Call) -> Value:
    equation, operands = call["equation"], call["operands"]
    values = [walk.value(operand) for operand in operands]
    if not isinstance(equation, str) or any(value is None for value in values):
        return walk.give_up(call.node, "einsum in the form of lists has no rule")  # type: ignore[no-any-return]
    shape, where = walk.shape(call.node), place(call.node)
    inputs, output = _letters(equation, [len(v.shape) for v in values if v is not None], len(shape))
    rank = len(letters := sorted({letter for term in inputs for letter in term}))
    place_of = {letter: i for i, letter in enumerate(letters)}
    spread: list[Value] = []
    for value, term in zip(values, inputs, strict=True):
        assert value is not None
        if len(set(term)) < len(term):
            return walk.give_up(call.node, "einsum with a repeated index has no rule")  # type: ignore[no-any-return]
        dims = {d: place_of[letter] for d, letter in enumerate(term)}
        full = [1] * rank
        for d, size in enumerate(value.shape):
            full[dims[d]] = size
        spread.append(
            Value(
                tuple(full), {dims[d]: label.with_array(moved(label.array, dims, rank)) for d, label in value.labels.items()}
            )
        )
    sizes = tuple(max(value.shape[d] for value in spread) for d in range(rank))
    for letter in letters:
        if letter not in output:
            d = place_of[letter]
            contract(walk, [v.labels.get(d) for v in spread if v.shape[d] > 1], where)
    joined = broadcast(
        walk.atoms, [v.without(*(place_of[x] for x in letters if x not in output)) for v in spread], sizes, where, "any"
    )
    if len(spread) > 1 and all(isinstance(walk.env.get(operand), Value) for operand in operands):
        walk.attention |= set().union(*(label.sites for v in spread for label in v.labels.values()))
    result = Value(shape)
    for d, label in joined.items():
        array = label.array
        for letter in letters:
            if letter not in output:
                array = walk.atoms.tie(array, place_of[letter])
        dims = {place_of[letter]: i for i, letter in enumerate(output)}
        result.labels[dims[d]] = label.with_array(moved(array, dims, len(shape)))
    return result


def _letters(equation: str, ranks: list[int], rank: int) -> tuple[list[list[str]], list[str]]:
    """The index names of every operand and of the result; an ellipsis becomes names of its own, from the right."""
    left, _, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")

    def spell(term: str, size: int) -> list[str]:
        if "..." not in term:
            return list(term)
        before, after = term.split("...")
        hidden = size - len(before) - len(after)
        return [*before, *(f".{hidden - i}" for i in range(hidden)), *after]

    inputs = [spell(term, size) for term, size in zip(terms, ranks, strict=True)]
    if "->" not in equation:
        names = [letter for term in inputs for letter in term]
        hidden = sorted({n for n in names if n.startswith(".")}, key=lambda n: -int(n[1:]))
        return inputs, [*hidden, *sorted(n for n in set(names) if names.count(n) == 1 and not n.startswith("."))]
    return inputs, spell(right, rank)


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
            (*_padded(mask.shape, rank)[:-2], 1, 1),
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
    result, last = Value(shape), len(shape) - 1
    if 1 in weight.labels:
        label = weight.labels[1]
        result.labels[last] = Label(moved(label.array, {1: last}, len(shape)), True, label.sites)
    return result


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
    below = value.labels.get(last)
    if below is not None:
        for dim in range(below.array.ndim):
            if dim != last:
                below = below.with_array(walk.atoms.tie(below.array, dim))
    lower = below.array.reshape(-1) if below is not None else None
    for layer in range(part.num_layers):
        for direction in range(directions):
            row = layer * directions + direction
            suffix = f"l{layer}" + ("_reverse" if direction else "")
            _cell(walk, f"{name}.", suffix, np.tile(cells[row], gates), outs[row], lower, where, bool(projected))
        lower = outs[layer * directions : (layer + 1) * directions].reshape(-1)
    walk.counts.append(Count(call.node, "hidden_size", cells[0]))
    if projected:
        walk.counts.append(Count(call.node, "proj_size", outs[0]))
    if below is not None:
        walk.counts.append(Count(call.node, "input_size", below.array.reshape(-1)))
        if not below.zero:
            walk.atoms.doubt(below.array, f"what it leaves behind is not zero at {where}")
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


def _cell(
    walk: Walk, prefix: str, suffix: str, rows: Ints, fed_back: Ints, lower: Ints | None, where: str, projected: bool
) -> None:
    tensors = [f"{prefix}weight_ih_{suffix}", f"{prefix}weight_hh_{suffix}"]
    tensors += [n for kind in ("bias_ih", "bias_hh") if (n := f"{prefix}{kind}_{suffix}") in walk.state]
    for tensor in tensors:
        label = walk.tensor(tensor).labels.get(0)
        if label is not None:
            walk.atoms.merge(label.array.reshape(-1), rows, where)
            walk.roles.setdefault((walk.canonical[tensor], 0), "out")
    columns = [(tensors[1], fed_back), (tensors[0], lower)]
    if projected:
        columns.append((f"{prefix}weight_hr_{suffix}", rows[: len(rows) // 4]))
        made = walk.tensor(f"{prefix}weight_hr_{suffix}").labels.get(0)
        if made is not None:
            walk.atoms.merge(made.array.reshape(-1), fed_back, where)
            walk.roles.setdefault((walk.canonical[f"{prefix}weight_hr_{suffix}"], 0), "out")
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
