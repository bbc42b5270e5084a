"""The parts of a quantize/dequantize graph that run in integers without a break, each as a graph of its own and in float."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from fxcompress.graph import edit, qdq
from fxcompress.graph.module import shared_copy

__all__ = ["Component", "components", "extract", "put_back"]

_DEQUANTIZES = (qdq.dequantize, qdq.dequantize_per_channel)


@dataclass(frozen=True)
class Component:
    """Integer operators that hand values to each other without leaving integers.

    ``operators``  in graph order
    ``inputs``     values from outside that they read
    ``outputs``    values of theirs that others read
    ``whole``      it stands for the whole graph, float operators and all
    """

    operators: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    whole: bool = False


def components(module: fx.GraphModule) -> list[Component]:
    """Every component, in the order of its first operator."""
    parent: dict[fx.Node, fx.Node] = {node: node for node in module.graph.nodes if node.meta.get("integer")}

    def root(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for node in parent:
        for source in map(_origin, node.all_input_nodes):
            if source in parent:
                parent[root(node)] = root(source)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in parent:
        groups.setdefault(root(node), []).append(node)
    return [_component(group) for group in groups.values()]


def _origin(node: fx.Node) -> fx.Node:
    """The value behind a quantize and dequantize of it, or the node itself."""
    if node.target is qdq.dequantize:
        levels = qdq.source(node)
        if levels.target is qdq.quantize:
            return qdq.source(levels)
    return node


def _component(group: list[fx.Node]) -> Component:
    inside = set(group)
    inputs = [s for node in group for s in map(_origin, node.all_input_nodes) if s not in inside and not _is_constant(s)]
    outputs: dict[fx.Node, None] = {}
    for node in group:
        for value in (node, *_dequantized(node)):
            if any(user not in inside and user.target is not qdq.quantize for user in value.users):
                outputs[value] = None
    return Component(tuple(group), tuple(dict.fromkeys(inputs)), tuple(outputs))


def _is_constant(node: fx.Node) -> bool:
    return node.op == "get_attr" or node.target in _DEQUANTIZES


def _dequantized(node: fx.Node) -> Iterator[fx.Node]:
    for quantize in node.users:
        if quantize.target is qdq.quantize:
            yield from quantize.users


def extract(module: fx.GraphModule, component: Component) -> fx.GraphModule:
    """The component as a graph that takes its inputs in order and gives a tuple of its outputs; it shares the tensors."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in component.inputs:
        values[node] = graph.placeholder(node.name)
        values[node].meta = dict(node.meta)
    inside = set(component.operators)

    for node in module.graph.nodes:
        if node in inside or node in component.outputs:
            edit.copy_into(graph, node, values)
    graph.output(tuple(values[node] for node in component.outputs))
    made = shared_copy(fx.GraphModule(module, graph))  # layers of its own, so that sweeping up leaves the model's alone
    made.meta = dict(module.meta)
    return made


def put_back(module: fx.GraphModule, operators: tuple[fx.Node, ...], floats: dict[str, Tensor]) -> None:
    """Turn operators to float: their operands and results are no longer quantized, their weights are those of ``floats``.

    A weight that ``floats`` does not hold stays the dequantized one.
    """
    for node in operators:
        node.meta["integer"] = False
        for source in node.all_input_nodes:
            if _origin(source) is not source:
                node.replace_input_with(source, _origin(source))
            elif source.target is qdq.dequantize_per_channel:
                stored = str(qdq.source(source).target)
                if stored in floats:
                    node.replace_input_with(source, _float_weight(module, source, stored, floats))
        for value in list(_dequantized(node)):
            value.replace_all_uses_with(node)
    for node in reversed(module.graph.nodes):
        if node.target in (qdq.quantize, *_DEQUANTIZES) and not node.users:
            module.graph.erase_node(node)
    edit.finish(module)


def _float_weight(module: fx.GraphModule, before: fx.Node, name: str, floats: dict[str, Tensor]) -> fx.Node:
    readers = [user for node in module.graph.find_nodes(op="get_attr", target=name) for user in node.users]
    if all(user is before for user in readers):
        edit.set_tensor(module, name, floats[name])
        kept = name
    else:
        kept = f"{name}_float"
        edit.set_tensor(module, kept, floats[name])
    with module.graph.inserting_before(before):
        made = module.graph.get_attr(kept)
    made.meta["tensor_meta"] = before.meta.get("tensor_meta")
    return made
