"""fold-quantization: observers become explicit quantize and dequantize operators, weights become int8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxcompress import backends
from fxcompress.backends.base import Backend
from fxcompress.errors import DataError
from fxcompress.graph import edit, ops, qdq
from fxcompress.graph.island import regions
from fxcompress.graph.module import shared_copy
from fxcompress.graph.shapes import module_of, tensor_meta
from fxcompress.pass_base import APPROXIMATE, Context, Pass, Promise
from fxcompress.quantization.fake_quant import FakeQuantize, fake_quantizers
from fxcompress.quantization.grid import Grid
from fxcompress.quantization.observer import ActivationObserver, observers
from fxcompress.quantization.placement import activation_grid, operands
from fxcompress.quantization.weight_folder import WeightFolder

__all__ = ["FoldQuantization", "quantized_copy"]


@dataclass(frozen=True)
class FoldQuantization(Pass):
    """Turn observed ranges into quantize/dequantize operators around every integer operator.

    A value is quantized once, whoever reads it; operators that keep their input's range are requantized on the same scale;
    weights are stored as int8 beside their scales, under the names they had. The result runs anywhere, exports, and is what
    backends lower from. Operators whose values no batch ever reached stay in float.
    """

    name: ClassVar[str] = "fold-quantization"
    takes: ClassVar[tuple[str, ...]] = ("observed",)
    leaves: ClassVar[str | None] = "qdq"
    promise: ClassVar[Promise] = APPROXIMATE

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        graphs = regions(model).values()
        known = [bool(o.calibrator.count) for module in graphs for o in observers(module).values()]
        known += [bool(f.scale.any()) for module in graphs for f in fake_quantizers(module).values() if f.axis is None]
        if known and not any(known):
            raise DataError("the model is not calibrated: no observer has seen data. Run batches through it first.")
        super().run_model(model, context)

    def run(self, module: fx.GraphModule, context: Context) -> None:
        _Folding(module, context).run()


def quantized_copy(
    module: fx.GraphModule, change: Callable[[fx.GraphModule], object] = lambda trial: None
) -> fx.GraphModule:
    """The quantize/dequantize graph of an observed one, after a change; ``module`` stays as it is."""
    trial = shared_copy(module)
    change(trial)
    FoldQuantization().run(trial, Context())
    edit.finish(trial)
    return trial


@dataclass(frozen=True)
class _Parameters:
    """The scale and zero point of one value."""

    scale: float
    zero_point: int
    grid: Grid

    def quantize(self, node: fx.Node) -> fx.Node:
        levels = (self.grid.quant_min, self.grid.quant_max, self.grid.dtype)
        made = edit.insert_after(node, qdq.quantize, (node, self.scale, self.zero_point, *levels))
        _describe(made, node, self.grid.dtype)
        return made

    def dequantize(self, node: fx.Node) -> fx.Node:
        made = edit.insert_after(node, qdq.dequantize, (node, self.scale, self.zero_point))
        _describe(made, node, torch.float32)
        return made


def _describe(node: fx.Node, like: fx.Node, dtype: torch.dtype) -> None:
    meta = tensor_meta(like)
    if meta is not None:
        node.meta["tensor_meta"] = meta._replace(dtype=dtype, requires_grad=False)


def _apart(node: fx.Node) -> str:
    readers = " and ".join(sorted({ops.kind(user) for user in node.users} - {"output"})) or "nothing"
    return f"its range is watched behind {readers}: fold-batchnorm and fuse-activations join them with it, before this pass"


class _Folding:
    """The rewrite of one region."""

    def __init__(self, module: fx.GraphModule, context: Context) -> None:
        self.module, self.context = module, context
        self.settings: dict[str, Any] = module.meta["quantization"]
        self.backend: Backend = backends.find(self.settings["backend"])
        self.parameters: dict[fx.Node, _Parameters] = {}
        self.weights: dict[str, FakeQuantize] = {}

    def run(self) -> None:
        watching = self._remove_observers()
        folder = WeightFolder(self.module, self.backend, self.settings, self.weights)
        for node in list(self.module.graph.nodes):
            if node.meta.get("integer"):
                self._settle(node, watching)
            elif node in watching and (found := self._observed(watching[node])):
                self.parameters[node] = found
        for node in list(self.module.graph.nodes):
            if node.meta.get("integer") and self.backend.rules[ops.kind(node)].output == "shared":
                self._share(node)
        for node in list(self.module.graph.nodes):
            if node in self.parameters:
                self._quantize_value(node)
        for node in list(self.module.graph.nodes):
            call = ops.read(node) if node.meta.get("integer") else None
            if call is not None and self.backend.rules[call.kind].weighted:
                folder.fold(call)

    def _remove_observers(self) -> dict[fx.Node, ActivationObserver | FakeQuantize]:
        """Take observers and fake-quantizers out; those of weights go to ``self.weights``, the others are returned."""
        watching: dict[fx.Node, ActivationObserver | FakeQuantize] = {}
        for node in list(self.module.graph.nodes):
            if node.meta.get("observer"):
                source, observer = node.all_input_nodes[0], module_of(node)
                assert isinstance(observer, (ActivationObserver, FakeQuantize))
                if source.op == "get_attr" and isinstance(observer, FakeQuantize):
                    self.weights[str(source.target)] = observer
                else:
                    watching[source] = observer
                edit.bypass(node)
        return watching

    def _observed(self, observer: ActivationObserver | FakeQuantize) -> _Parameters | None:
        if isinstance(observer, FakeQuantize):
            scale = float(observer.scale.detach().abs())
            return _Parameters(scale, int(observer.zero_point), observer.grid) if scale else None
        if not observer.calibrator.count:
            return None
        target = activation_grid(self.backend, self.settings, observer.bits)
        found = observer.calibrator.compute_scale_zp(target)
        return _Parameters(float(found[0]), int(found[1]), target)

    def _settle(self, node: fx.Node, watching: dict[fx.Node, ActivationObserver | FakeQuantize]) -> None:
        """Find the parameters of an integer operator's result; without ranges the operator goes back to float."""
        call = ops.read(node)
        assert call is not None
        rule = self.backend.rules[call.kind]
        sources = operands(call, rule)
        found, known = None, all(source in self.parameters for source in sources)
        if known:
            if rule.fixed is not None:
                found = _Parameters(*rule.fixed, activation_grid(self.backend, {}))
            elif rule.output == "input":
                found = self.parameters[sources[0]]
            elif node in watching:
                found = self._observed(watching[node])
        if found is not None:
            self.parameters[node] = found
        elif not (known and rule.float_result and node not in watching):
            self._demote(node, "no calibration batch reached it" if node in watching or not known else _apart(node))

    def _demote(self, node: fx.Node, reason: str) -> None:
        node.meta["integer"] = False
        node.meta["float"] = reason
        self.context.skip(node, node.meta["float"])

    def _share(self, node: fx.Node) -> None:
        """Put the operands of ``node`` on the scale of its result, through operators that hand a scale on."""
        call = ops.read(node)
        assert call is not None
        pending = operands(call, self.backend.rules[call.kind])
        while pending:
            source = pending.pop()
            self.parameters[source] = self.parameters[node]
            rule = self.backend.rules.get(ops.kind(source)) if source.meta.get("integer") else None
            if rule is not None and rule.output == "input":
                pending += operands(ops.read(source), rule)  # type: ignore[arg-type]

    def _quantize_value(self, node: fx.Node) -> None:
        is_integer = bool(node.meta.get("integer"))
        if is_integer and tensor_meta(node) is None and ops.kind(node) in ("chunk", "split", "unbind"):
            return
        readers = [user for user in node.users if user.meta.get("integer")]
        if is_integer and (readers or not self.backend.rules[ops.kind(node)].float_result):
            readers = list(node.users)
        if not readers:
            return
        quantized = self.parameters[node].quantize(node)
        value = self.parameters[node].dequantize(quantized)
        for reader in readers:
            reader.replace_input_with(node, value)
