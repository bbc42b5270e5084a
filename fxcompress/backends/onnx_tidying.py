"""An exported ONNX model as runtimes fuse it best: constants as initialisers, weights as they are read, nothing unused.

Needs onnx_ir.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

__all__ = ["tidied"]


def tidied(model: Any, *, openvino: bool = False) -> Any:
    """Constants as initialisers, transposed weights stored transposed, and nothing that is not used; as a proto.

    Every weight has scales and zero points of its own: where two share them, OpenVINO computes both layers in float. With
    ``openvino`` what its compiler breaks on is written otherwise.
    """
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for node in list(model.graph):
        if node.op_type == "Squeeze":
            _fold_squeeze(node)
        elif node.op_type == "Transpose":
            _fold_transpose(node)
        elif node.op_type == "Conv":
            _drop_made_up_bias(node)
        elif node.op_type == "Pad":
            _open_circle(node)
        elif node.op_type == "Concat" and openvino:
            _bound_rounded(node)
    _name_batch(model)
    common.RemoveUnusedNodesPass()(model)
    return ir.to_proto(model)


def _name_batch(model: Any) -> None:
    """Call the free leading dimension ``batch`` wherever a value's shape shows it."""
    leading = next((v.shape[0] for v in model.graph.inputs if v.shape and isinstance(v.shape[0], ir.SymbolicDim)), None)
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values if leading is not None else ():
        if value.shape is not None:
            named = [ir.SymbolicDim("batch") if size == leading else size for size in value.shape]
            value.shape = ir.Shape(named)


def _drop_made_up_bias(node: Any) -> None:
    """Take out the zeros that the exporter expands for a bias that is not there; for volumes they have a wrong shape."""
    maker = node.inputs[2].producer() if len(node.inputs) > 2 and node.inputs[2] is not None else None
    if maker is not None and maker.op_type == "Expand":
        node.resize_inputs(2)


def _fold_squeeze(node: Any) -> None:
    """A scale of one element as a scalar."""
    scale = node.inputs[0]
    if not scale.is_initializer() or scale.const_value.numpy().size != 1:
        return
    value = ir.tensor(scale.const_value.numpy().reshape(()), name=f"{scale.name}_scalar")
    ir.convenience.replace_all_uses_with(node.outputs[0], _initializer(node.graph, value))


def _fold_transpose(node: Any) -> None:
    """Transpose(DequantizeLinear(weight)): store the weight transposed, its scales along the axis where they now are."""
    source = node.inputs[0].producer()
    if source is None or source.op_type != "DequantizeLinear" or not source.inputs[0].is_initializer():
        return
    order = node.attributes["perm"].as_ints()
    weight = source.inputs[0]
    moved = ir.tensor(np.ascontiguousarray(weight.const_value.numpy().transpose(order)), name=f"{weight.name}_transposed")
    attributes = []
    if len(source.inputs[1].shape) == 1:
        attributes = [ir.AttrInt64("axis", order.index(source.attributes["axis"].as_int()))]
    made = ir.Node("", "DequantizeLinear", [_initializer(node.graph, moved), *source.inputs[1:]], attributes)
    node.graph.insert_before(node, made)
    made.outputs[0].name = f"{node.outputs[0].name}_value"
    ir.convenience.replace_all_uses_with(node.outputs[0], made.outputs[0])


def _open_circle(node: Any) -> None:
    """Padding that goes round, which OpenVINO's reader lacks: along each dimension, its end, the value and its beginning."""
    mode = node.attributes.get("mode")
    pads = node.inputs[1].const_value.numpy().tolist() if node.inputs[1].is_initializer() else [-1]
    if mode is None or mode.as_string() != "wrap" or min(pads) < 0:
        return
    made: list[Any] = []
    value, rank = node.inputs[0], len(pads) // 2
    for axis, (before, after) in enumerate(zip(pads[:rank], pads[rank:], strict=True)):
        end = [_slice(node.graph, value, axis, -before, _END)] if before else []
        beginning = [_slice(node.graph, value, axis, 0, after)] if after else []
        if end or beginning:
            parts = [*(part.outputs[0] for part in end), value, *(part.outputs[0] for part in beginning)]
            made += [*end, *beginning, ir.Node("", "Concat", parts, [ir.AttrInt64("axis", axis)])]
            value = made[-1].outputs[0]
    for number, new in enumerate(made):
        new.outputs[0].name = f"{node.outputs[0].name}_round_{number}"
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], made, [node.outputs[0]], [value])


_END = 2**31 - 1

_WITH_CONSTANTS = ("QuantizeLinear", "BatchNormalization", "Mul", "Add", "Sub", "Div", "Clip")


def _bound_rounded(node: Any) -> None:
    """Bound what is rounded behind a concat by its lowest level, which changes nothing, where it may be rounded again.

    OpenVINO's process ends (2026.4, sizes fixed) on a concat, a rounding, factors and addends that are constants, if any,
    and another rounding.
    """
    rounded = [reader for reader in node.outputs[0].consumers() if reader.op_type == "QuantizeLinear"]
    for back in [reader for q in rounded for reader in q.outputs[0].consumers() if reader.op_type == "DequantizeLinear"]:
        value = back.outputs[0]
        readers = [reader for reader in value.consumers() if reader.op_type in _WITH_CONSTANTS]
        if not readers:
            continue
        scale, zero_point = (given.const_value.numpy() for given in back.inputs[1:3])
        lowest = ((np.iinfo(zero_point.dtype).min - zero_point.astype(scale.dtype)) * scale).astype(scale.dtype)
        bound = _initializer(node.graph, ir.tensor(lowest, name=f"{value.name}_lowest"))
        made = ir.Node("", "Max", [value, bound])
        node.graph.insert_after(back, made)
        made.outputs[0].name = f"{value.name}_bounded"
        for reader in readers:
            reader.replace_input_with(reader.inputs.index(value), made.outputs[0])


def _slice(graph: Any, value: Any, axis: int, start: int, end: int) -> Any:
    numbers = [ir.tensor(np.array([n], np.int64), name=f"number_{n}") for n in (start, end, axis)]
    return ir.Node("", "Slice", [value, *(_initializer(graph, number) for number in numbers)])


def _initializer(graph: Any, tensor: Any) -> Any:
    """The initialiser called like ``tensor``, made where there is none."""
    if tensor.name not in graph.initializers:
        stored = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(stored)
    return graph.initializers[tensor.name]
