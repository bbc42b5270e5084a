"""lower: explicit quantize/dequantize graphs become a backend's integer kernels."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from fxcompress import backends
from fxcompress.errors import BackendError
from fxcompress.graph.island import regions
from fxcompress.pass_base import APPROXIMATE, Context, Pass, Promise

__all__ = ["Lower"]


@dataclass(frozen=True)
class Lower(Pass):
    """Lower to the kernels of the backend that the graph was quantized for.

    The portable form is kept with the model: it is what is saved, and what a loaded model is lowered from again.

    Options: ``engine``, for backends that can do without (TensorRT): None builds one where that is possible, True makes it
    an error where it is not, False keeps the quantize/dequantize graph.
    """

    name: ClassVar[str] = "lower"
    takes: ClassVar[tuple[str, ...]] = ("qdq",)
    leaves: ClassVar[str | None] = "lowered"
    promise: ClassVar[Promise] = APPROXIMATE

    engine: bool | None = None

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        for module in regions(model).values():
            module.meta["portable"] = portable(module)
        super().run_model(model, context)

    def run(self, module: fx.GraphModule, context: Context) -> None:
        settings = module.meta.get("quantization")
        if settings is None:
            return
        backend = backends.find(settings["backend"])
        reason = backend.unavailable()
        if reason and (self.engine or not backend.optional):
            raise BackendError(f"{backend.name} cannot run here: {reason}. Keep the quantize/dequantize graph instead.")
        if backend.optional and (reason or self.engine is False):
            why = reason or "no engine was asked for"
            context.note("", f"{why}: the quantize/dequantize graph stays, and export_onnx writes what {backend.name} takes")
            return
        elsewhere = {t.device.type for t in [*module.parameters(), *module.buffers()]} - {backend.device}
        if elsewhere:
            raise BackendError(
                f"{backend.name} runs on {backend.runs_on} and the model is on {elsewhere.pop()}: "
                f"move it with .to({backend.device!r}) first."
            )
        if backend.saturates() and not settings["bound_pairs"] and not settings["reduce_range"]:
            context.note("", "weights are not bounded for this CPU: partial sums may saturate; quantize again here")
        backend.lower(module, context.skip)


def portable(module: nn.Module) -> nn.Module:
    """A copy of the graph that shares the tensors."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
