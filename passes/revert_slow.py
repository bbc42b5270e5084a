"""revert-slow: what integers make slower goes back to float before it is lowered."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from fxcompress import backends
from fxcompress.backends.flat import examples
from fxcompress.errors import BackendError
from fxcompress.graph import edit
from fxcompress.graph.inputs import Arguments
from fxcompress.graph.module import shared_copy
from fxcompress.graph.recorder import Values
from fxcompress.pass_base import APPROXIMATE, Context, Pass, Promise
from fxcompress.passes.lower import Lower
from fxcompress.quantization.components import Component, components, extract, put_back
from fxcompress.timing import interleaved

__all__ = ["RevertSlow"]


@dataclass(frozen=True)
class RevertSlow(Pass):
    """Measure every part that runs in integers against the same part in float, and put the slower ones back to float.

    A part is a set of integer operators that hand each other values without leaving integers. Its kernels and its float
    operators take turns on values from a run on the example inputs, with torch's number of threads. A backend that runs the
    graph as a whole is measured as a whole. What goes back has its trained weights where ``fold-quantization`` ran in the
    same process, dequantized ones otherwise.

    Options: ``margin``: how much faster integers must be; 0.05 wants 5 %.
    """

    name: ClassVar[str] = "revert-slow"
    takes: ClassVar[tuple[str, ...]] = ("qdq",)
    promise: ClassVar[Promise] = APPROXIMATE

    margin: float = 0.0

    def run(self, module: fx.GraphModule, context: Context) -> None:
        settings = module.meta.get("quantization")
        if settings is None:
            return
        backend = backends.find(settings["backend"])
        if backend.unavailable():
            context.note("", f"nothing was measured: {backend.unavailable()}")
            return
        call = context.example() or examples(module)
        whole = backend is backends.AUTO or backend.whole
        parts = [_everything(module)] if whole else components(module)
        values = Values(module, {node.name for part in parts for node in part.inputs})
        values.record(call)
        floats: dict[str, Tensor] = module.meta.get("float_weights", {})
        for part in parts:
            if part.operators:
                inputs = tuple(values.values[node.name] for node in part.inputs)
                self._judge(module, part, call if whole else Arguments(inputs, {}), floats, context)

    def _judge(
        self, module: fx.GraphModule, part: Component, call: Arguments, floats: dict[str, Tensor], context: Context
    ) -> None:
        lowered, in_float = (shared_copy(module) if part.whole else extract(module, part) for _ in range(2))
        names = {node.name for node in part.operators}
        put_back(in_float, tuple(node for node in in_float.graph.nodes if node.name in names), floats)
        try:
            Lower().run(lowered, Context())
        except BackendError as error:
            context.note("", f"a part was not measured: {error}")
            return
        edit.finish(lowered)
        turns = {"int8": lowered, "float": in_float}
        timed = interleaved(
            {name: functools.partial(graph, *call.args, **call.kwargs) for name, graph in turns.items()},
            runs=11,
            seconds=3.0,
        )
        int8, float_ = timed["int8"].median, timed["float"].median
        if int8 <= float_ * (1 - self.margin):
            return
        reason = f"int8 took {1e3 * int8:.3f} ms and float {1e3 * float_:.3f} ms"
        for node in part.operators:
            node.meta["float"] = reason
        context.skip(part.operators[0], f"{reason}: put back to float, {len(part.operators)} operator(s) in all")
        put_back(module, part.operators, floats)


def _everything(module: fx.GraphModule) -> Component:
    return Component(tuple(node for node in module.graph.nodes if node.meta.get("integer")), (), (), whole=True)
