"""A graph as exchange formats want it: tensors in, tensors out, and made-up values of the shapes that it was traced with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxcompress.backends.attention_ranks import lacks_heads, open_attention
from fxcompress.backends.average_pools import is_odd_pool, open_pool
from fxcompress.backends.embedding_bags import is_bag, open_bag
from fxcompress.backends.sample_convolutions import counts_samples, open_groups
from fxcompress.errors import BackendError
from fxcompress.graph import ops, qdq
from fxcompress.graph.containers import leaves
from fxcompress.graph.guards import CHECKS
from fxcompress.graph.inputs import Arguments
from fxcompress.graph.shapes import dtype_of, tensor_meta

__all__ = ["Flat", "casts_edge", "examples", "flatten"]


@dataclass(frozen=True)
class Flat:
    """A graph that takes tensors one by one and gives a tuple of tensors, as exchange formats want it.

    ``inputs``   the names of the tensors it takes, in order
    ``outputs``  the nodes of the original graph whose values it gives, in order
    """

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[fx.Node, ...]
    examples: tuple[Tensor, ...]


def flatten(module: fx.GraphModule) -> Flat:
    """``module`` with its containers opened; arguments that are not tensors are fixed to their defaults.

    Example tensors are made up from the shapes in the metadata. Raises BackendError where these are not known. Casts of
    inputs to float32 and of outputs from it are left to the caller, since runtimes take float32.
    """
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    names: list[str] = []
    examples: list[Tensor] = []
    for node in module.graph.nodes:
        if node.target in CHECKS or (node.op == "placeholder" and any(casts_edge(user) for user in node.users)):
            continue
        if node.op == "placeholder" or (casts_edge(node) and node.args[0] not in values):
            example = _example(node)
            if example is None:
                values[node] = node.args[0] if node.args else None
                continue
            names.append(node.name)
            examples.append(example)
            values[node] = graph.placeholder(node.name)
            values[node].meta["tensor_meta"] = node.meta["tensor_meta"]
        elif node.op == "output":
            outputs = [result.all_input_nodes[0] if casts_edge(result) else result for result in _results(node)]
            graph.output(tuple(values[result] for result in outputs))
        elif written := next((write for concerns, write in _OTHERWISE if concerns(node)), None):
            values[node] = written(graph, node, values)
        else:
            values[node] = graph.node_copy(node, lambda old: values[old])
            values[node].meta.pop("nn_module_stack", None)  # torch.export would read it, and wants it in its own form
    if not outputs:
        raise BackendError("the graph gives no tensor; there is nothing to export.")
    flat = fx.GraphModule(module, _drop_redundant_activations(graph))
    return Flat(flat.eval(), tuple(names), tuple(outputs), tuple(examples))


_OTHERWISE: tuple[tuple[Callable[[fx.Node], bool], Callable[[fx.Graph, fx.Node, dict[fx.Node, Any]], fx.Node]], ...] = (
    (is_bag, open_bag),
    (counts_samples, open_groups),
    (is_odd_pool, open_pool),
    (lacks_heads, open_attention),
)
"""Which nodes exchange formats or runtimes lack, and what is written in their place."""


def examples(module: fx.GraphModule) -> Arguments:
    """Arguments of one call, made up from the shapes in the metadata; a graph takes its placeholders' values in order."""
    values = [_example(node) for node in module.graph.nodes if node.op == "placeholder"]
    codegen = module.graph._codegen
    if isinstance(codegen, fx.graph._PyTreeCodeGen):
        spec = codegen.pytree_info.in_spec
        args, kwargs = pytree.tree_unflatten(values, spec)
        return Arguments(tuple(args), kwargs)
    names = [str(node.target).lstrip("*") for node in module.graph.nodes if node.op == "placeholder"]
    return Arguments((), {name: value for name, value in zip(names, values, strict=True) if value is not None})


def _example(node: fx.Node) -> Tensor | None:
    """Seeded noise of the placeholder's shape and dtype; None where its value is no tensor."""
    if "tensor_meta" not in node.meta:
        raise BackendError(
            f"the shape of input {node.name!r} is not known: give example_inputs, or data, when the model is quantized."
        )
    meta = tensor_meta(node)
    if meta is None:
        return None
    generator = torch.Generator().manual_seed(0)
    if meta.dtype.is_floating_point:
        return torch.randn(meta.shape, generator=generator, dtype=torch.float32, device="cpu").to(meta.dtype)
    return torch.zeros(meta.shape, dtype=meta.dtype, device="cpu")


_OTHERS = (torch.float16, torch.bfloat16, torch.float64)


def casts_edge(node: fx.Node) -> bool:
    """Whether a node does nothing but make an input of another type float32, or of a result an output of another type."""
    if node.op != "call_method" or node.target != "to" or len(node.args) != 2:
        return False
    source, dtype = node.args
    assert isinstance(source, fx.Node)
    if source.op == "placeholder":
        return dtype is torch.float32 and dtype_of(source) in _OTHERS and len(ops.value_readers(source)) == 1
    return dtype in _OTHERS and dtype_of(source) == torch.float32 and all(user.op == "output" for user in node.users)


def _results(output: fx.Node) -> list[fx.Node]:
    found = dict.fromkeys(leaves(output.args[0]))
    for leaf in found:
        if tensor_meta(leaf) is None and "tensor_meta" in leaf.meta:
            raise BackendError(f"output {leaf.name!r} is no tensor, and an exported graph gives tensors only.")
    return list(found)


def _drop_redundant_activations(graph: fx.Graph) -> fx.Graph:
    """Take ReLU and ReLU6 out where the quantize after it clamps at the very same levels: the same bits, and one kernel."""
    for node in graph.nodes:
        activation = node.kwargs.get("activation") if node.op == "call_function" else None
        readers = list(node.users)
        if activation in ("relu", "relu6") and readers and all(_clamps(reader, activation) for reader in readers):
            found = ops.lookup(node)
            assert found is not None
            node.target = torch.add if found.kind == "add" else getattr(nn.functional, found.kind)
            node.kwargs = {}
    return graph


def _clamps(node: fx.Node, activation: str) -> bool:
    if node.target is not qdq.quantize:
        return False
    grid = qdq.read(node)
    return grid.zero_point == grid.low and (activation == "relu" or round(6.0 / grid.scale) + grid.zero_point >= grid.high)
