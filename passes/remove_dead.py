"""remove-dead: what nobody uses, and what passes values through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from fxcompress.graph import edit, ops
from fxcompress.graph.attention import forget_dropout
from fxcompress.graph.inplace import drop_dead
from fxcompress.graph.shapes import dtype_of, module_of
from fxcompress.pass_base import EXACT, STAGES, Context, Pass, Promise

__all__ = ["RemoveDead"]


@dataclass(frozen=True)
class RemoveDead(Pass):
    """Remove nodes whose result nobody uses, identities (``x + 0``, ``x * 1`` too), and on request dropout in eval mode.

    Options: ``dropout``, also remove dropout that is in eval mode, that of attention too (a model that will be trained again
    needs it).
    """

    name: ClassVar[str] = "remove-dead"
    takes: ClassVar[tuple[str, ...]] = STAGES
    promise: ClassVar[Promise] = EXACT

    dropout: bool = False

    def run(self, module: fx.GraphModule, context: Context) -> None:
        for node in list(module.graph.nodes):
            if self._passes_through(node):
                edit.bypass(node)
            elif self.dropout:
                forget_dropout(node)
        drop_dead(module)

    def _passes_through(self, node: fx.Node) -> bool:
        kind = ops.kind(node)
        if kind in _NEUTRAL:
            return _is_neutral(node, _NEUTRAL[kind])
        if kind == "identity":
            return node.op == "call_module" and type(module_of(node)) is nn.Identity
        if kind != "dropout" or not self.dropout:
            return False
        call = ops.read(node)
        assert call is not None
        training = module_of(node).training if node.op == "call_module" else call["training"]
        return training is False


_NEUTRAL = {"add": 0, "sub": 0, "mul": 1, "div": 1}
"""Operator → the number that changes nothing."""


def _is_neutral(node: fx.Node, number: int) -> bool:
    """Whether an operator on a floating-point tensor and a number gives the tensor."""
    call = ops.read(node)
    assert call is not None
    first, second = call["input"], call["other"]
    if call.kind in ("add", "mul") and not isinstance(first, fx.Node):
        first, second = second, first
    plain = isinstance(first, fx.Node) and type(second) in (int, float) and not node.kwargs
    return plain and second == number and (dtype := dtype_of(first)) is not None and dtype.is_floating_point
