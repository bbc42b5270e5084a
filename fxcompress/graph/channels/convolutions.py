"""Rules of convolutions: plain, grouped, depthwise, transposed."""

from __future__ import annotations

import numpy as np

from fxcompress.graph import ops
from fxcompress.graph.channels.atoms import Ints
from fxcompress.graph.channels.calls import place
from fxcompress.graph.channels.contractions import bind, contract, lying, produce
from fxcompress.graph.channels.labels import Label, Value
from fxcompress.graph.channels.making import counts_channels
from fxcompress.graph.channels.walk import Count, Walk, rule

CONVOLUTIONS = tuple(f"conv{d}d" for d in (1, 2, 3))
TRANSPOSED = tuple(f"conv_transpose{d}d" for d in (1, 2, 3))


@rule(*CONVOLUTIONS)
def convolution(walk: Walk, call: ops.Call) -> Value:
    return _convolved(walk, call, transposed=False)


@rule(*TRANSPOSED)
def transposed_convolution(walk: Walk, call: ops.Call) -> Value:
    return _convolved(walk, call, transposed=True)


@rule("deform_conv2d")
def deformable_convolution(walk: Walk, call: ops.Call) -> Value:
    """A convolution that reads where its offsets say; what it reads keeps its channels where they are in several groups."""
    value, offset, weight = (walk.operand(call[name]) for name in ("input", "offset", "weight"))
    for name in ("offset", "mask"):
        walk.freeze(walk.value(call[name]), f"says where a kernel reads at {place(call.node)}")
    if offset.shape[1] != 2 * weight.shape[-1] * weight.shape[-2]:
        walk.freeze(value, f"groups of its channels are read in places of their own at {place(call.node)}")
    return _convolved(walk, call, transposed=False)


def _convolved(walk: Walk, call: ops.Call, transposed: bool) -> Value:
    """A kernel's weight is [outputs, inputs, …], or [inputs, outputs, …] where it is transposed."""
    value, weight = walk.operand(call["input"]), walk.operand(call["weight"])
    made, read = (1, 0) if transposed else (0, 1)
    spatial = int(call.kind[-2])
    channel = len(value.shape) - spatial - 1
    result = Value(walk.shape(call.node))
    _keep_space(walk, call, value, weight, channel, spatial, result)
    walk.role(call["weight"], made, "out")
    walk.role(call["weight"], read, "in")
    groups = walk.plain(call["groups"])
    if not isinstance(groups, int) or (groups > 1 and 0 not in weight.labels):
        return walk.give_up(call.node, "its groups are not known")
    if groups not in (value.shape[channel], result.shape[channel]) and counts_channels(walk, call["groups"]):
        return walk.give_up(call.node, "its groups are computed")
    if groups != 1:
        return _grouped(walk, call, value, weight, channel, result, transposed)
    column, found = lying(walk, weight, read, channel, len(value.shape)), lying(walk, weight, made, 0, 1)
    if weight.shape[read] > 1:
        contract(walk, [value.labels.get(channel)], place(call.node), column)
        bind(weight, read, value.labels.get(channel), channel)
    produce(walk, call, result, found, channel)
    return result


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


def _grouped(
    walk: Walk, call: ops.Call, value: Value, weight: Value, channel: int, result: Value, transposed: bool
) -> Value:
    """A grouped convolution is a batched product over groups: channels split into groups, sum within each, merge again.

    Every group may keep inputs and outputs of its own as long as each keeps as many; or whole groups go, which is tried
    first where groups have one input or one output.
    """
    where, groups = place(call.node), int(walk.plain(call["groups"]))
    per_input, per_output = value.shape[channel] // groups, result.shape[channel] // groups
    found = value.labels.get(channel)
    flat = found.with_array(walk.atoms.line(found.array, channel)) if found is not None else None
    inputs = flat.array.reshape(groups, per_input) if flat is not None else None
    sites: frozenset[str] = flat.sites if flat is not None else frozenset()
    few, many = sorted((per_input, per_output))
    whole = few == 1
    if many > 1:
        site = f"{where}:groups"
        if not whole:
            walk.grouped[site] = groups
        whole = (walk.sites.choose(site, 2, weight.labels[0].array if inputs is None else inputs) == 0) == whole
        sites |= {site}
    made = _whole_groups(walk, call, weight, inputs, groups, per_output, transposed) if whole else None
    if made is None and weight.shape[1] > 1 and 1 not in weight.labels:
        return walk.give_up(call.node, "its groups are of a fixed size")
    if made is None:
        rows, made = _group_weights(walk, weight, groups, per_input, per_output, transposed)
        if inputs is not None:
            walk.atoms.merge(inputs, rows, where)
            walk.sites.equal(inputs, 1, where)
        else:
            walk.atoms.freeze(rows, f"is summed with a value of fixed size at {where}")
        if per_output == 1:
            walk.atoms.freeze(made, f"the only one of its group at {where}")
        walk.sites.equal(made, 1, where)
    if flat is not None and not flat.zero:
        walk.atoms.doubt(flat.array, f"what it leaves behind is not zero at {where}")
    produce(walk, call, result, Label(np.ascontiguousarray(made).reshape(-1), True, sites), channel)
    return result


def _group_weights(
    walk: Walk, weight: Value, groups: int, per_input: int, per_output: int, transposed: bool
) -> tuple[Ints, Ints]:
    """The weight's inputs [groups, inputs per group] and outputs [groups, outputs per group].

    Every group of a parameter has inputs of its own; those of a weight that is computed are the same in all.
    """
    size = per_output if transposed else per_input
    if weight.shape[1] == 1:  # the only one of its group stays
        outer = weight.labels[0].array.reshape(groups, -1)
        only = np.zeros((groups, 1), dtype=np.int64)
        return (outer, only) if transposed else (only, outer)
    if weight.labels[1].array.shape[0] == 1:
        rows = walk.atoms.new(groups, size) if any(weight is v for v in walk.tensors.values()) else None
        if rows is None:
            rows = np.broadcast_to(weight.labels[1].array.reshape(1, size), (groups, size))
        rows = np.repeat(rows, weight.shape[0] // groups, axis=0)
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
        walk.atoms.rank(inputs)
    else:
        walk.atoms.freeze(own, f"takes channels of fixed size at {where}")
    walk.counts.append(Count(call.node, "groups", leaders.reshape(-1)))
    return made
