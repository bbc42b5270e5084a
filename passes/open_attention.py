"""open-attention: nn.MultiheadAttention becomes projections, an attention core and an output projection in the graph."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn
from torch.nn import functional as F

from fxcompress.graph import edit, ops
from fxcompress.graph.attention import attend
from fxcompress.graph.meta_run import propagate
from fxcompress.graph.shapes import module_of, shape_of
from fxcompress.pass_base import Context, Pass, Promise, close

__all__ = ["OpenAttention"]


@dataclass(frozen=True)
class OpenAttention(Pass):
    """Open nn.MultiheadAttention into linear layers, reshapes and scaled dot-product attention.

    Its parts can then be quantized, pruned and counted like any others. Parameters keep their names (``in_proj_weight``,
    ``out_proj.weight``); where query, key and value differ, the packed projection is split into ``q_proj_weight``,
    ``k_proj_weight``, ``v_proj_weight`` and biases of the same form. Masks, padding, and what ``add_bias_kv`` and
    ``add_zero_attn`` append become nodes too, dropout of attention a layer that is active while training. Sizes stay free.

    Options: ``matmuls``: also write the attention itself as matmul, softmax, matmul, for backends that multiply activations
    in integers.
    """

    name: ClassVar[str] = "open-attention"
    promise: ClassVar[Promise] = close(rtol=1e-4)
    replaces: ClassVar[bool] = True

    matmuls: bool = False

    def run(self, module: fx.GraphModule, context: Context) -> None:
        calls = [node for node in module.graph.nodes if ops.kind(node) == "multihead_attention"]
        if not calls and not self.matmuls:
            return
        tied = edit.tied(module)
        for name in dict.fromkeys(str(node.target) for node in calls):
            _open_layer(module, [node for node in calls if node.target == name], tied, context)
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


def _open_layer(module: fx.GraphModule, calls: list[fx.Node], tied: set[int], context: Context) -> None:
    """Open every call of one layer; its projection stays packed where each call attends to its own query."""
    layer = module_of(calls[0])
    assert isinstance(layer, nn.MultiheadAttention)
    packed = layer.in_proj_weight is not None and all(_attends_to_itself(node) for node in calls)
    shared = any(id(parameter) in tied for parameter in layer.parameters())
    for node in calls:
        reason = "it shares parameters with another layer" if shared and not packed else _obstacle(node, layer)
        if reason:
            context.skip(node, reason)
            return
    unbatched = [len(shape_of(_arguments(node)["query"]) or ()) == 2 for node in calls]
    for node, single in zip(calls, unbatched, strict=True):
        _open(module, node, layer, packed, single)


def _attends_to_itself(node: fx.Node) -> bool:
    given = _arguments(node)
    return given["query"] is given["key"] is given["value"]


def _obstacle(node: fx.Node, layer: nn.MultiheadAttention) -> str | None:
    given = _arguments(node)
    shape = shape_of(given["query"])
    masks = [given[name] for name in ("key_padding_mask", "attn_mask") if given.get(name) is not None]
    if layer.out_proj._forward_hooks or layer.out_proj._forward_pre_hooks:
        return "it has hooks, which opening it would drop"
    if shape is None:
        return "the shape of its input is not known: give example_inputs"
    if any(not isinstance(mask, fx.Node) or mask.meta.get("tensor_meta") is None for mask in masks):
        return "its mask is not known"
    if any(ops.kind(user) != "getitem" or user.args[1] not in (0, 1) for user in node.users):
        return "its result is passed on whole"
    return None


def _open(module: fx.GraphModule, node: fx.Node, layer: nn.MultiheadAttention, packed: bool, unbatched: bool) -> None:
    given = _arguments(node)
    build = _Builder(module, node, layer, unbatched=unbatched)
    query, key, value = build.project(given["query"], given["key"], given["value"], packed)
    mask = build.mask(given.get("attn_mask"), given.get("key_padding_mask"))
    key, value = build.extended(key, "bias_k"), build.extended(value, "bias_v")
    weights = [user for user in node.users if user.args[1] == 1 and user.users]
    if weights and given["need_weights"]:
        scores = _weights(node, query, key, 1 / math.sqrt(layer.head_dim), mask, layer.dropout)
        core = edit.insert_before(node, torch.matmul, (scores, value))
        shown = edit.insert_before(node, torch.mean, (scores, 1)) if given["average_attn_weights"] else scores
        shown = build.call(torch.squeeze, shown, 0) if build.unbatched else shown
        for user in weights:
            _stand_in(user, shown)
    else:
        allowed = mask.added if mask.hidden is None else build.call(torch.logical_not, mask.hidden)
        options = {} if allowed is None else {"attn_mask": allowed}
        core = attend(node, layer.dropout, query, key, value, **options)
    result = build.join(core)
    for user in list(node.users):
        if user.args[1] == 0:
            _stand_in(user, result)
        elif not user.users:
            module.graph.erase_node(user)
    if not node.users:
        module.graph.erase_node(node)


def _stand_in(node: fx.Node, by: fx.Node) -> None:
    by.meta.setdefault("tensor_meta", node.meta.get("tensor_meta"))
    edit.replace(node, by)


@dataclass(frozen=True)
class _Mask:
    """What keeps a query from a key: numbers ``added`` to their score, or a flag by which it is ``hidden``."""

    added: fx.Node | None = None
    hidden: fx.Node | None = None


@dataclass(frozen=True)
class _Builder:
    """Writes nodes before an attention layer's call, reading its parameters."""

    module: fx.GraphModule
    node: fx.Node
    layer: nn.MultiheadAttention
    unbatched: bool

    def call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return edit.insert_before(self.node, function, args, **kwargs)

    def fetch(self, name: str) -> fx.Node | None:
        owner, _, leaf = name.rpartition(".")
        if getattr(self.layer.get_submodule(owner), leaf, None) is None:
            return None
        with self.module.graph.inserting_before(self.node):
            return self.module.graph.get_attr(f"{self.node.target}.{name}")

    def project(self, query: fx.Node, key: fx.Node, value: fx.Node, packed: bool) -> list[fx.Node]:
        """Query, key and value as ``[batch, heads, tokens, head size]``."""
        heads = (self.layer.num_heads, self.layer.head_dim)
        order = (0, 2, 1, 3) if self.layer.batch_first else (1, 2, 0, 3)
        query, key, value = self._batched(query, key, value)
        if packed:
            joint = self.call(F.linear, query, self.fetch("in_proj_weight"), self.fetch("in_proj_bias"))
            split = self.call(torch.unflatten, joint, -1, (3, *heads))
            moved = self.call(torch.permute, split, (2, *(axis if axis < 2 else axis + 1 for axis in order)))
            return [self.call(torch.select, moved, 0, part) for part in range(3)]
        self._split_projection()
        parts = []
        for letter, source in zip("qkv", (query, key, value), strict=True):
            weight, bias = self.fetch(f"{letter}_proj_weight"), self.fetch(f"{letter}_proj_bias")
            projected = self.call(F.linear, source, weight, bias)
            parts.append(self.call(torch.permute, self.call(torch.unflatten, projected, -1, heads), order))
        return parts

    def _batched(self, *sources: fx.Node) -> list[fx.Node]:
        if not self.unbatched:
            return list(sources)
        made = {
            source: self.call(torch.unsqueeze, source, int(not self.layer.batch_first)) for source in dict.fromkeys(sources)
        }
        return [made[source] for source in sources]

    def _split_projection(self) -> None:
        for kind in ("weight", "bias"):
            packed = getattr(self.layer, f"in_proj_{kind}", None)
            if packed is None or getattr(self.layer, f"q_proj_{kind}", None) is not None:
                continue
            for letter, part in zip("qkv", packed.detach().chunk(3), strict=True):
                fresh = nn.Parameter(part.clone(), requires_grad=packed.requires_grad)
                self.layer.register_parameter(f"{letter}_proj_{kind}", fresh)

    def extended(self, source: fx.Node, bias: str) -> fx.Node:
        """Keys or values with a token of learned bias and one of zeros behind them, as the layer asks."""
        learned = self.fetch(bias)
        if learned is not None:
            split = self.call(torch.unflatten, learned, -1, (self.layer.num_heads, self.layer.head_dim))
            token = self.call(torch.add, self._blank(source), self.call(torch.permute, split, (0, 2, 1, 3)))
            source = self.call(torch.cat, [source, token], 2)
        return self.call(torch.cat, [source, self._blank(source)], 2) if self.layer.add_zero_attn else source

    def _blank(self, source: fx.Node) -> fx.Node:
        return self.call(torch.zeros_like, self.call(torch.narrow, source, 2, 0, 1))

    def mask(self, attention: fx.Node | None, padding: fx.Node | None) -> _Mask:
        """Both masks as one, in a shape that broadcasts with ``[batch, heads, tokens, source tokens]``."""
        numbers: list[fx.Node] = []
        flags: list[fx.Node] = []
        for given in (attention, padding):
            if given is None:
                continue
            found, shaped = given.meta["tensor_meta"], given
            if given is padding:
                for dim in (0,) * self.unbatched + (1, 1):
                    shaped = self.call(torch.unsqueeze, shaped, dim)
            elif len(found.shape) == 3:  # one for every head of every sample
                shaped = self.call(torch.unflatten, shaped, 0, (-1, self.layer.num_heads))
            more = int(self.layer.bias_k is not None) + int(self.layer.add_zero_attn)
            shaped = self.call(F.pad, shaped, (0, more)) if more else shaped
            (flags if found.dtype == torch.bool else numbers).append(shaped)
        hidden = flags[0] if len(flags) == 1 else self.call(torch.logical_or, *flags) if flags else None
        added = numbers[0] if len(numbers) == 1 else self.call(torch.add, *numbers) if numbers else None
        if added is None or hidden is None:
            return _Mask(added, hidden)
        return _Mask(self.call(torch.masked_fill, added, hidden, float("-inf")), None)

    def join(self, core: fx.Node) -> fx.Node:
        """Heads side by side again, in the layout of the layer's input, through the output projection."""
        order = (0, 2, 1, 3) if self.layer.batch_first else (2, 0, 1, 3)
        joined = self.call(torch.flatten, self.call(torch.permute, core, order), 2)
        result = self.call(F.linear, joined, self.fetch("out_proj.weight"), self.fetch("out_proj.bias"))
        return self.call(torch.squeeze, result, int(not self.layer.batch_first)) if self.unbatched else result


def _weights(before: fx.Node, query: fx.Node, key: fx.Node, scale: float, mask: _Mask, dropout: float) -> fx.Node:
    """softmax(scale · query · keyᵀ + mask), some of it dropped out while training"""
    scaled = edit.insert_before(before, torch.mul, (query, scale))
    scores = edit.insert_before(before, torch.matmul, (scaled, edit.insert_before(before, torch.transpose, (key, -2, -1))))
    if mask.added is not None:
        scores = edit.insert_before(before, torch.add, (scores, mask.added))
    if mask.hidden is not None:
        scores = edit.insert_before(before, torch.masked_fill, (scores, mask.hidden, float("-inf")))
    weights = edit.insert_before(before, torch.softmax, (scores, -1))
    return edit.insert_layer(before, "dropout", nn.Dropout(dropout), (weights,)) if dropout else weights


def _write_out(node: fx.Node) -> str | None:
    """Write attention out in matmuls, or the reason why not."""
    call = ops.read(node)
    assert call is not None
    query, key, mask = call["query"], call["key"], call["attn_mask"]
    shape = shape_of(query)
    if (call["dropout_p"] and node.op != "call_module") or call["is_causal"] or call["enable_gqa"]:
        return "it drops out in any mode, is causal, or groups its queries"
    if mask is not None and (not isinstance(mask, fx.Node) or mask.meta.get("tensor_meta") is None):
        return "its mask is not known"
    if shape is None:
        return "the shape of its query is not known: give example_inputs"
    scale = call["scale"] if call["scale"] is not None else 1 / math.sqrt(shape[-1])
    if mask is not None and mask.meta["tensor_meta"].dtype == torch.bool:
        found = _Mask(hidden=edit.insert_before(node, torch.logical_not, (mask,)))
    else:
        found = _Mask(added=mask)
    weights = _weights(node, query, key, scale, found, call["dropout_p"])
    edit.replace(node, edit.insert_before(node, torch.matmul, (weights, call["value"])))
    return None
