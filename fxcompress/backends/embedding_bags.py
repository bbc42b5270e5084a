"""Bags of embeddings as lookups and a reduction: what runtimes take, where the exporter's loop over bags can crash them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from fxcompress.errors import BackendError
from fxcompress.graph import ops
from fxcompress.graph.shapes import module_of, shape_of

__all__ = ["is_bag", "open_bag"]

_SIGNATURE = inspect.signature(F.embedding_bag)
_REDUCTIONS: dict[str, Any] = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax}
_PLAIN = ("offsets", "max_norm", "per_sample_weights", "padding_idx")


def is_bag(node: fx.Node) -> bool:
    """Whether ``node`` looks up bags of embeddings."""
    return node.op.startswith("call") and ops.kind(node) == "embedding_bag"


def open_bag(graph: fx.Graph, node: fx.Node, values: dict[fx.Node, Any]) -> fx.Node:
    """Write ``node`` into ``graph``: bags of one length, a row each. Raises BackendError for any other form."""
    asked = _arguments(node)
    shape = shape_of(node.all_input_nodes[0])
    odd = [name for name in _PLAIN if asked.get(name) is not None]
    if odd or shape is None or len(shape) != 2:
        reason = f"with {odd[0]}" if odd else "without a row for each bag"
        raise BackendError(f"{node.name!r} is an embedding bag {reason}, which ONNX runtimes do not take.")
    indices, weight = asked["input"], asked["weight"]
    fetched = graph.get_attr(weight) if isinstance(weight, str) else values[weight]
    rows = graph.call_function(F.embedding, (values[indices], fetched))
    return graph.call_function(_REDUCTIONS[asked["mode"]], (rows, 1))


def _arguments(node: fx.Node) -> dict[str, Any]:
    """What ``F.embedding_bag`` would be called with; a module's weight by name."""
    if node.op == "call_module":
        layer: Any = module_of(node)
        own = {name: getattr(layer, name, None) for name in ("max_norm", "mode", "padding_idx")}
        given = dict(zip(("input", "offsets", "per_sample_weights"), node.args, strict=False)) | dict(node.kwargs)
        return {"weight": f"{node.target}.weight", **own, **given}
    try:
        bound = _SIGNATURE.bind(*node.args, **node.kwargs)
    except TypeError as error:
        raise BackendError(f"{node.name!r} is an embedding bag in a form that cannot be written as ONNX.") from error
    bound.apply_defaults()
    return dict(bound.arguments)
