"""A quantize/dequantize graph with float16 between its operators, for runtimes that like it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx

from fxcompress.backends.flat import Flat
from fxcompress.graph import ops, qdq
from fxcompress.graph.shapes import tensor_meta

__all__ = ["in_half"]


def in_half(flat: Flat) -> Flat:
    """The graph with float16 between its operators: scales, biases, activations; inputs and outputs keep their type.

    Softmax, normalisation, exponentials and sums compute in float32 between two casts; nothing is cast between a dequantize
    and its reader. What joins integers to integers is float32 on the way, as ONNX Runtime's kernel for it wants its scales.
    """
    module = copy.deepcopy(flat.module).half()
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "placeholder" and _is_float(node):
            _cast_after(node, torch.float16)
        elif node.target in (qdq.dequantize, qdq.dequantize_per_channel):
            node.update_kwarg("dtype", torch.float16)
        elif node.op == "output":
            node.args = (tuple(_cast(node, value, torch.float32) if _is_float(value) else value for value in node.args[0]),)
        elif ops.kind(node) in _FRAGILE and _is_float(node):
            _compute_in_single(module, node)
    for node in [node for node in graph.nodes if _joins_integers(node)]:
        _join_in_single(node)
    graph.lint()
    module.recompile()
    return Flat(module, flat.inputs, flat.outputs, flat.examples)


_NORMS = ("layer_norm", "group_norm", "instance_norm", "rms_norm", "batch_norm")

_FRAGILE = (*_NORMS, "softmax", "log_softmax", "exp", "pow", "sum", "var", "norm", "mean", "cumsum")


def _is_float(node: Any) -> bool:
    meta = tensor_meta(node) if isinstance(node, fx.Node) else None
    return meta is not None and meta.dtype == torch.float32


def _cast(before: fx.Node, value: fx.Node, dtype: torch.dtype) -> fx.Node:
    with before.graph.inserting_before(before):
        return before.graph.call_method("to", (value, dtype))


def _cast_after(node: fx.Node, dtype: torch.dtype) -> None:
    with node.graph.inserting_after(node):
        made = node.graph.call_method("to", (node, dtype))
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made and user.target is not qdq.quantize)
    if not made.users:
        node.graph.erase_node(made)


def _compute_in_single(module: fx.GraphModule, node: fx.Node) -> None:
    for source in node.all_input_nodes:
        if _is_float(source) or source.op == "get_attr":
            node.replace_input_with(source, _cast(node, source, torch.float32))
    if node.op == "call_module":
        module.get_submodule(str(node.target)).float()
    _cast_after(node, torch.float16)


def _joins_integers(node: fx.Node) -> bool:
    """Whether ``node`` concatenates dequantized values, and is quantized by all that read it."""
    sources = node.all_input_nodes if node.op.startswith("call") and ops.kind(node) == "cat" else []
    ends = bool(node.users) and all(user.target is qdq.quantize for user in node.users)
    return bool(sources) and ends and all(source.target is qdq.dequantize for source in sources)


def _join_in_single(node: fx.Node) -> None:
    for source in node.all_input_nodes:
        with node.graph.inserting_before(node):
            node.replace_input_with(source, node.graph.call_function(qdq.dequantize, source.args[:3]))
        if not source.users:
            node.graph.erase_node(source)
