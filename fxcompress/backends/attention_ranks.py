"""Attention without a dimension for heads, or for samples: the exporter writes attention in four dimensions only."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from fxcompress.graph import ops
from fxcompress.graph.shapes import shape_of

__all__ = ["lacks_heads", "open_attention"]

_VALUES = ("query", "key", "value")
_ORDER = (*_VALUES, "attn_mask", "dropout_p", "is_causal")


def lacks_heads(node: fx.Node) -> bool:
    """Whether ``node`` is attention over values of fewer than four dimensions."""
    return node.op.startswith("call") and ops.kind(node) == "scaled_dot_product_attention" and _missing(node) > 0


def open_attention(graph: fx.Graph, node: fx.Node, values: dict[fx.Node, Any]) -> fx.Node:
    """Write ``node`` into ``graph`` with leading dimensions of one, which masks follow."""
    given = dict(fx.node.map_arg(_given(node), values.__getitem__))
    for _ in range(_missing(node)):
        given |= {name: graph.call_function(torch.unsqueeze, (given[name], 0)) for name in _VALUES}
    made = graph.call_function(F.scaled_dot_product_attention, (), given)
    for _ in range(_missing(node)):
        made = graph.call_function(torch.squeeze, (made, 0))
    return made


def _given(node: fx.Node) -> dict[str, Any]:
    return dict(zip(_ORDER, node.args, strict=False)) | dict(node.kwargs)


def _missing(node: fx.Node) -> int:
    """How many dimensions to put before the query's; 0 where its shape is not known."""
    query = _given(node)["query"]
    return 4 - len((isinstance(query, fx.Node) and shape_of(query)) or range(4))
