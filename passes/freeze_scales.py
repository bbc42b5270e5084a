"""freeze-scales: training is over; every fake-quantizer keeps the scale it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxcompress.graph.shapes import module_of
from fxcompress.pass_base import Context, Pass, Promise, close
from fxcompress.quantization.fake_quant import FakeQuantize, fixed_on_weight

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
                fixed[name] = fixed_on_weight(module, node) if _on_weight(node) else fake.fixed()
            node.args = node.args[:1]
        for name, fake in fixed.items():
            module.set_submodule(name, fake)


def _on_weight(node: fx.Node) -> bool:
    return node.all_input_nodes[0].op == "get_attr"
