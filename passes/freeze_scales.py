"""freeze-scales: training is over; every fake-quantizer keeps the scale it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from fxcompress.graph import edit
from fxcompress.graph.shapes import module_of
from fxcompress.pass_base import Context, Pass, Promise, close
from fxcompress.quantization.fake_quant import FakeQuantize

__all__ = ["FreezeScales"]


@dataclass(frozen=True)
class FreezeScales(Pass):
    """Fix the scale of every fake-quantizer: of weights as they are, of activations as training left them.

    Batch normalisation can be folded after it, and ``fold-quantization`` stores the very levels that training ended with.
    """

    name: ClassVar[str] = "freeze-scales"
    takes: ClassVar[tuple[str, ...]] = ("observed",)
    promise: ClassVar[Promise] = close(rtol=1e-5)

    def run(self, module: fx.GraphModule, context: Context) -> None:
        fixed: dict[str, FakeQuantize] = {}
        for node in module.graph.nodes:
            fake = module_of(node) if node.meta.get("observer") else None
            if not isinstance(fake, FakeQuantize):
                continue
            name = str(node.target)
            if name not in fixed:
                fixed[name] = fake.fixed(*(_value(module, arg) for arg in node.args)) if _on_weight(node) else fake.fixed()
            node.args = node.args[:1]
        for name, fake in fixed.items():
            module.set_submodule(name, fake)


def _on_weight(node: fx.Node) -> bool:
    return node.all_input_nodes[0].op == "get_attr"


def _value(module: fx.GraphModule, arg: Any) -> Any:
    return edit.get_tensor(module, str(arg.target)) if isinstance(arg, fx.Node) else arg
