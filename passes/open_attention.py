"""open-attention: nn.MultiheadAttention becomes projections, an attention core and an output projection in the graph."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn
from torch.nn import functional as F

from fxcompress.graph import edit, ops
from fxcompress.graph.shapes import module_of, propagate, shape_of
from fxcompress.pass_base import Context, Pass, Promise, close

__all__ = ["OpenAttention"]


@dataclass(frozen=True)
class OpenAttention(Pass):
    """Open nn.MultiheadAttention into linear layers, reshapes and scaled dot-product attention.

    Its parts can then be quantized, pruned and counted like any others. Parameters keep their names (``in_proj_weight``,
    ``out_proj.weight``); where query, key and value differ, the packed projection is split into ``q_proj_weight``,
    ``k_proj_weight``, ``v_proj_weight`` and biases of the same form. Sizes stay free.

    Options: ``matmuls``: also write the attention itself as matmul, softmax, matmul, for backends that multiply activations
    in integers.
    """

    name: ClassVar[str] = "open-attention"
    promise: ClassVar[Promise] = close(rtol=1e-4)

    matmuls: bool = False

    def run(self, module: fx.GraphModule, context: Context) -> None:
        calls = [node for node in module.graph.nodes if ops.kind(node) == "multihead_attention"]
        if not calls and not self.matmuls:
            return
        counts = {node.target: sum(other.target == node.target for other in calls) for node in calls}
        tied = edit.tied(module)
        for node in calls:
            layer = module_of(node)
            assert isinstance(layer, nn.MultiheadAttention)
            reason = "it is called several times" if counts[node.target] > 1 else _obstacle(node, layer, tied)
            if reason:
                context.skip(node, reason)
            else:
                _open(module, node, layer)
        _describe(module, context)
        if self.matmuls:
            for node in list(module.graph.nodes):
                if ops.kind(node) == "scaled_dot_product_attention" and (reason := _write_out(node)):
                    context.skip(node, reason)
            _describe(module, context)


def _describe(module: fx.GraphModule, context: Context) -> None:
    example = context.example()
    if example is not None:
        propagate(module, example)


def _arguments(node: fx.Node) -> dict[str, Any]:
    names = (
        "query",
        "key",
        "value",
        "key_padding_mask",
        "need_weights",
        "attn_mask",
        "average_attn_weights",
        "is_causal",
    )
    return {"need_weights": True, "average_attn_weights": True, **ops.call_arguments(names, node.args, node.kwargs)}


def _obstacle(node: fx.Node, layer: nn.MultiheadAttention, tied: set[int]) -> str | None:
    given = _arguments(node)
    shape = shape_of(given["query"])
    if any(id(parameter) in tied for parameter in layer.parameters()):
        return "it shares parameters with another layer"
    if edit.has_hooks(node) or layer.out_proj._forward_hooks or layer.out_proj._forward_pre_hooks:
        return "it has hooks, which opening it would drop"
    if layer.bias_k is not None or layer.bias_v is not None or layer.add_zero_attn:
        return "it appends a bias or zeros to the keys"
    if layer.training and layer.dropout:
        return "its dropout is active"
    if shape is None:
        return "the shape of its input is not known: give example_inputs"
    if len(shape) != 3:
        return "its input has no batch dimension"
    if given.get("key_padding_mask") is not None or given.get("attn_mask") is not None:
        return "it takes a mask"
    if any(ops.kind(user) != "getitem" or user.args[1] not in (0, 1) for user in node.users):
        return "its result is passed on whole"
    return None


def _open(module: fx.GraphModule, node: fx.Node, layer: nn.MultiheadAttention) -> None:
    given = _arguments(node)
    build = _Builder(module, node, layer)
    query, key, value = build.project(given["query"], given["key"], given["value"])
    weights = [user for user in node.users if user.args[1] == 1 and user.users]
    if weights and given["need_weights"]:
        scores = _weights(node, query, key, 1 / math.sqrt(layer.head_dim))
        core = edit.insert_before(node, torch.matmul, (scores, value))
        shown = edit.insert_before(node, torch.mean, (scores, 1)) if given["average_attn_weights"] else scores
        for user in weights:
            edit.replace(user, shown)
    else:
        core = edit.insert_before(node, F.scaled_dot_product_attention, (query, key, value))
    result = build.join(core)
    for user in list(node.users):
        if user.args[1] == 0:
            edit.replace(user, result)
        elif not user.users:
            module.graph.erase_node(user)
    if not node.users:
        module.graph.erase_node(node)


class _Builder:
    """Writes nodes before an attention layer's call, reading its parameters."""

    def __init__(self, module: fx.GraphModule, node: fx.Node, layer: nn.MultiheadAttention) -> None:
        self.module, self.node, self.layer, self.name = module, node, layer, str(node.target)

    def call(self, function: Any, *args: Any) -> fx.Node:
        return edit.insert_before(self.node, function, args)

    def fetch(self, name: str) -> fx.Node | None:
        owner, _, leaf = name.rpartition(".")
        if getattr(self.layer.get_submodule(owner), leaf, None) is None:
            return None
        with self.module.graph.inserting_before(self.node):
            return self.module.graph.get_attr(f"{self.name}.{name}")

    def project(self, query: fx.Node, key: fx.Node, value: fx.Node) -> list[fx.Node]:
        """Query, key and value as ``[batch, heads, tokens, head size]``."""
        heads = (self.layer.num_heads, self.layer.head_dim)
        order = (0, 2, 1, 3) if self.layer.batch_first else (1, 2, 0, 3)
        if query is key is value and self.layer.in_proj_weight is not None:
            packed = self.call(F.linear, query, self.fetch("in_proj_weight"), self.fetch("in_proj_bias"))
            split = self.call(torch.unflatten, packed, -1, (3, *heads))
            moved = self.call(torch.permute, split, (2, *(axis if axis < 2 else axis + 1 for axis in order)))
            return [self.call(torch.select, moved, 0, part) for part in range(3)]
        self._split_projection()
        parts = []
        for letter, source in zip("qkv", (query, key, value), strict=True):
            weight, bias = self.fetch(f"{letter}_proj_weight"), self.fetch(f"{letter}_proj_bias")
            projected = self.call(F.linear, source, weight, bias)
            parts.append(self.call(torch.permute, self.call(torch.unflatten, projected, -1, heads), order))
        return parts

    def _split_projection(self) -> None:
        for kind in ("weight", "bias"):
            packed = getattr(self.layer, f"in_proj_{kind}", None)
            if packed is None:
                continue
            for letter, part in zip("qkv", packed.detach().chunk(3), strict=True):
                fresh = nn.Parameter(part.clone(), requires_grad=packed.requires_grad)
                self.layer.register_parameter(f"{letter}_proj_{kind}", fresh)

    def join(self, core: fx.Node) -> fx.Node:
        """Heads side by side again, in the layout of the layer's input, through the output projection."""
        order = (0, 2, 1, 3) if self.layer.batch_first else (2, 0, 1, 3)
        joined = self.call(torch.flatten, self.call(torch.permute, core, order), 2)
        return self.call(F.linear, joined, self.fetch("out_proj.weight"), self.fetch("out_proj.bias"))


def _weights(before: fx.Node, query: fx.Node, key: fx.Node, scale: float, mask: fx.Node | None = None) -> fx.Node:
    """softmax(scale · query · keyᵀ + mask)"""
    scaled = edit.insert_before(before, torch.mul, (query, scale))
    scores = edit.insert_before(before, torch.matmul, (scaled, edit.insert_before(before, torch.transpose, (key, -2, -1))))
    if mask is not None:
        scores = edit.insert_before(before, torch.add, (scores, mask))
    return edit.insert_before(before, torch.softmax, (scores, -1))


def _write_out(node: fx.Node) -> str | None:
    """Write attention out in matmuls, or the reason why not."""
    call = ops.read(node)
    assert call is not None
    query, key, mask = call["query"], call["key"], call["attn_mask"]
    shape = shape_of(query)
    if call["dropout_p"] or call["is_causal"] or call["enable_gqa"]:
        return "it drops out, is causal, or groups its queries"
    if mask is not None and (not isinstance(mask, fx.Node) or mask.meta.get("tensor_meta") is None):
        return "its mask is not known"
    if mask is not None and mask.meta["tensor_meta"].dtype == torch.bool:
        return "its mask is boolean"
    if shape is None:
        return "the shape of its query is not known: give example_inputs"
    scale = call["scale"] if call["scale"] is not None else 1 / math.sqrt(shape[-1])
    weights = _weights(node, query, key, scale, mask)
    edit.replace(node, edit.insert_before(node, torch.matmul, (weights, call["value"])))
    return None
