"""What a graph costs: parameters, multiply-accumulates, stored bytes; per node and in sum.

Multiply-accumulates (MACs) are counted for contractions and attention, from the shapes in the metadata; everything else
counts none, as is customary. A node that stands for another one (a lowered kernel) carries its count in ``meta["macs"]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxcompress.graph import ops
from fxcompress.graph.index_notation import factors, notation
from fxcompress.graph.island import regions
from fxcompress.graph.shapes import module_of, shape_of
from fxcompress.graph.tree import submodule, tensors

__all__ = [
    "Cost",
    "NodeCost",
    "cost",
    "layer_parameters",
    "macs",
    "node_costs",
    "parameter_count",
    "stored_bytes",
    "tensor_shape",
]


@dataclass(frozen=True)
class Cost:
    """Totals of a graph module; ``macs`` are those of one forward pass with the example inputs.

    ``counted``  whether the shapes that this takes are known: they are not where no example inputs were given
    """

    nodes: int
    parameters: int
    macs: int
    bytes: int
    counted: bool = True


def cost(module: nn.Module) -> Cost:
    """Totals over every compiled region; parameters and bytes over the whole module, shared tensors once."""
    graphs = list(regions(module).values()) or ([module] if isinstance(module, fx.GraphModule) else [])
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    total = sum(macs(node) for node in nodes)
    return Cost(
        nodes=sum(1 for node in nodes if node.op.startswith("call")),
        parameters=parameter_count(module),
        macs=total,
        bytes=stored_bytes(module),
        counted=total > 0 or not any(_multiplies(node) for node in nodes),
    )


@dataclass(frozen=True)
class NodeCost:
    """What one node costs; ``bytes`` are those of the tensors it reads, whoever else reads them."""

    node: str
    kind: str
    parameters: int
    macs: int
    bytes: int


def node_costs(module: nn.Module) -> list[NodeCost]:
    """A row per operator of every compiled region, in graph order."""
    rows = []
    for region, graph in regions(module).items():
        for node in graph.graph.nodes:
            if node.op.startswith("call"):
                owned = _tensors_of(node)
                rows.append(
                    NodeCost(
                        f"{region}.{node.name}" if region else node.name,
                        str(node.meta.get("kind") or ops.kind(node)),
                        sum(t.numel() for t in owned if t.is_floating_point() or t.dtype == torch.int8),
                        macs(node),
                        sum(t.numel() * t.element_size() for t in owned),
                    )
                )
    return rows


def _tensors_of(node: fx.Node) -> list[torch.Tensor]:
    """The parameters and buffers a node reads: its module's, or those fetched for it."""
    if node.op == "call_module":
        part = module_of(node)
        return list({id(t): t for t in [*part.parameters(), *part.buffers()]}.values())
    owner = node.graph.owning_module
    assert owner is not None
    fetched = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
    return [getattr(owner.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in fetched]


def parameter_count(module: nn.Module) -> int:
    """Elements of parameters, and of what replaced parameters (integer weights, scales do not count)."""
    return sum(layer_parameters(module).values())


def layer_parameters(module: nn.Module) -> dict[str, int]:
    """Layer → elements of its own parameters, and of what replaced them, in the model's order; shared ones once."""
    counts: dict[str, int] = {}
    for name, tensor, learned in tensors(module):
        owner, _, leaf = name.rpartition(".")
        if learned or _stands_for_parameter(leaf, tensor):
            counts[owner] = counts.get(owner, 0) + tensor.numel()
    return counts


def _stands_for_parameter(leaf: str, buffer: torch.Tensor) -> bool:
    if leaf.endswith(("_scale", "_zero_point")):
        return False
    return leaf.endswith(("weight", "bias")) or leaf.startswith("bias_") or buffer.dtype == torch.int8


def stored_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared storage once: what a file of the model's tensors needs."""
    seen: set[int] = set()
    total = 0
    for _, tensor, _ in tensors(module):
        key = tensor.untyped_storage().data_ptr() or id(tensor)
        if key not in seen:
            seen.add(key)
            total += tensor.numel() * tensor.element_size()
    return total


def _multiplies(node: fx.Node) -> bool:
    return node.op.startswith("call") and ops.kind(node) in _COUNTS


Shape = Callable[[ops.Call, Any], torch.Size]


def macs(node: fx.Node, shape: Shape | None = None) -> int:
    """Multiply-accumulates of one node; 0 where shapes are unknown or nothing is contracted.

    ``shape`` gives the shape of an argument (a node, or a parameter); it says what the node would cost with other shapes.
    """
    if "macs" in node.meta:
        return int(node.meta["macs"])
    op = ops.lookup(node) if node.op.startswith("call") else None
    count = _COUNTS.get(op.kind) if op else None
    call = ops.read(node) if count else None
    if call is None or count is None:
        return 0
    try:
        return int(count(call, shape or tensor_shape))
    except (TypeError, IndexError, AttributeError, KeyError):
        return 0


def tensor_shape(call: ops.Call, value: Any) -> torch.Size:
    """The shape of an argument: of a node by its metadata, of a parameter by itself."""
    if isinstance(value, ops.Attr):
        owner = call.node.graph.owning_module
        assert owner is not None
        prefix, _, name = value.name.rpartition(".")
        return getattr(submodule(owner, prefix), name).shape
    shape = shape_of(value)
    if shape is None:
        raise TypeError(f"the shape of {value} is not known")
    return shape


def _conv(call: ops.Call, shape: Shape) -> int:
    return shape(call, call.node).numel() * shape(call, call["weight"])[1:].numel()


def _conv_transpose(call: ops.Call, shape: Shape) -> int:
    return shape(call, call["input"]).numel() * shape(call, call["weight"])[1:].numel()


def _linear(call: ops.Call, shape: Shape) -> int:
    return shape(call, call.node).numel() * shape(call, call["weight"])[-1]


def _matmul(call: ops.Call, shape: Shape) -> int:
    return shape(call, call.node).numel() * shape(call, call["input"])[-1]


def _index_notation(call: ops.Call, shape: Shape) -> int:
    """One for every combination of the indices, where something is summed."""
    shapes = [shape(call, operand) for operand in factors(call)]
    found = notation(call, [len(s) for s in shapes])
    if found is None or len(shapes) < 2:
        return 0
    sizes: dict[str, int] = {}
    for letters, own in zip(found[0], shapes, strict=True):
        for letter, size in zip(letters, own, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return math.prod(sizes.values()) if sizes.keys() - set(found[1]) else 0


def _attention(call: ops.Call, shape: Shape) -> int:
    query, key, value = (shape(call, call[name]) for name in ("query", "key", "value"))
    return query[:-1].numel() * key[-2] * (query[-1] + value[-1])


def _multihead(call: ops.Call, shape: Shape) -> int:
    module: Any = module_of(call.node)
    query, key = shape(call, call["query"]), shape(call, call["key"])
    tokens, others, width = query[:-1].numel(), key[:-1].numel(), query[-1]
    length = key[1 if module.batch_first else 0]
    projections = 2 * tokens * width * width + others * width * (key[-1] + shape(call, call["value"])[-1])
    return projections + 2 * tokens * length * width


def _recurrent(call: ops.Call, shape: Shape) -> int:
    names = [name for name, _ in module_of(call.node).named_parameters() if name.startswith("weight")]
    weights = sum(shape(call, ops.Attr(f"{call.node.target}.{name}")).numel() for name in names)
    meta = call["input"].meta.get("tensor_meta")
    packed = isinstance(meta, tuple) and not hasattr(meta, "shape")  # sequences of several lengths: rows come first
    return (meta[0].shape[0] if packed else shape(call, call["input"])[:-1].numel()) * weights


def _cell(call: ops.Call, shape: Shape) -> int:
    weights = sum(shape(call, call[name]).numel() for name in ("weight_ih", "weight_hh"))
    return shape(call, call["input"])[:-1].numel() * weights


_COUNTS: dict[str, Callable[[ops.Call, Shape], int]] = {
    **{f"conv{dims}d": _conv for dims in (1, 2, 3)},
    "deform_conv2d": _conv,
    **{f"conv_transpose{dims}d": _conv_transpose for dims in (1, 2, 3)},
    "linear": _linear,
    "matmul": _matmul,
    "addmm": _matmul,
    "scaled_dot_product_attention": _attention,
    "multihead_attention": _multihead,
    "lstm": _recurrent,
    "gru": _recurrent,
    "rnn": _recurrent,
    "recurrent_cell": _cell,
    "einsum": _index_notation,
    "tensordot": _index_notation,
}
