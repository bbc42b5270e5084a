"""accelerate-sparsity: 2:4 weights go to sparse tensor cores where that measures faster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import fx, nn
from torch.nn.utils import parametrize

from fxcompress.graph import ops
from fxcompress.graph.module import shared_copy
from fxcompress.graph.shapes import module_of, shape_of
from fxcompress.pass_base import Context, Pass, Promise, close
from fxcompress.pruning import semi_structured

__all__ = ["AccelerateSparsity"]


@dataclass(frozen=True)
class AccelerateSparsity(Pass):
    """Run 2:4 weights on sparse tensor cores, layer by layer, where that measures faster than dense.

    Linear layers and 1×1 convolutions in float16 or bfloat16 on an NVIDIA GPU whose baked weights keep two of every four
    inputs are packed and timed on the shape of their input; ``speedup`` is the least ratio that counts. Everything else
    stays dense, with the reason. The dense form is kept with the model: it is what is saved.
    """

    name: ClassVar[str] = "accelerate-sparsity"
    promise: ClassVar[Promise] = close(rtol=2e-2)

    speedup: Annotated[float, Field(gt=0.0)] = 1.0

    def run(self, module: fx.GraphModule, context: Context) -> None:
        dense = shared_copy(module)
        done: dict[str, str | None] = {}
        for node in module.graph.nodes:
            if ops.kind(node) in ("linear", "conv2d"):
                layer = str(node.target)
                if layer not in done:
                    done[layer] = self._accelerate(module, node)
                if done[layer]:
                    context.skip(node, f"{done[layer]}; it stays dense")
        if any(reason is None for reason in done.values()):
            module.meta["portable"] = dense

    def _accelerate(self, module: fx.GraphModule, node: fx.Node) -> str | None:
        """Pack the layer of ``node``; returns why it was not, or None."""
        if node.op != "call_module":
            return "its weight is given to a function, not held by a layer"
        layer, shape = module_of(node), shape_of(node.all_input_nodes[0])
        if type(layer) not in (nn.Linear, nn.Conv2d):
            masked = parametrize.is_parametrized(layer, "weight")
            return "its mask is not baked" if masked else f"a {type(layer).__name__} has no sparse kernel"
        reason = semi_structured.obstacle(layer)
        if reason is None and shape is None:
            reason = "the shape of its input is not known, so that it cannot be timed: give example_inputs"
        if reason is not None or shape is None:
            return reason
        try:
            sparse = semi_structured.SparseLinear(layer, semi_structured.pack(layer.weight))  # type: ignore[arg-type]
            before, now = semi_structured.measure(layer, shape), semi_structured.measure(sparse, shape)
        except (RuntimeError, NotImplementedError, ValueError) as error:  # kernels refuse shapes by raising
            return f"torch cannot run it sparse: {str(error).splitlines()[0]}"
        if before < now * self.speedup:
            return f"sparse takes {now:.3f} ms and dense {before:.3f} ms"
        module.set_submodule(str(node.target), sparse)
        return None
