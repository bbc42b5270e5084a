"""Scaled dot-product attention as a layer, so that its dropout follows the mode of the model."""

from __future__ import annotations

from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxcompress.graph import edit, ops
from fxcompress.graph.shapes import module_of

__all__ = ["ScaledDotProductAttention", "attend", "forget_dropout"]


class ScaledDotProductAttention(nn.Module):
    """``F.scaled_dot_product_attention`` that drops weights with probability ``dropout_p`` while training."""

    def __init__(self, dropout_p: float) -> None:
        super().__init__()
        self.dropout_p = dropout_p

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        dropped = self.dropout_p if self.training else 0.0
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropped, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    def extra_repr(self) -> str:
        return f"dropout_p={self.dropout_p}"


def attend(before: fx.Node, dropout_p: float, *operands: fx.Node, **options: object) -> fx.Node:
    """Attention before a node: a layer where it drops weights out, else a function."""
    if dropout_p:
        return edit.insert_layer(before, "core", ScaledDotProductAttention(dropout_p), operands, **options)
    return edit.insert_before(before, F.scaled_dot_product_attention, operands, **options)


_OPTIONS = ("attn_mask", "is_causal", "scale", "enable_gqa")


def forget_dropout(node: fx.Node) -> None:
    """Let a function take the place of the layer where that is in eval mode."""
    call = ops.read(node) if node.op == "call_module" else None
    if call is None or not isinstance(module_of(node), ScaledDotProductAttention) or module_of(node).training:
        return
    given = {name: call[name] for name in _OPTIONS if call[name] is not None}
    made = attend(node, 0.0, call["query"], call["key"], call["value"], **given)
    made.meta = {**node.meta}
    edit.replace(node, made)
