"""quantize-dynamic: weights become int8 ahead, activations when they are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx, nn

from fxcompress import backends
from fxcompress.backends.base import Backend
from fxcompress.errors import BackendError, ConfigError
from fxcompress.graph import edit, inplace, ops, qdq
from fxcompress.graph.cost import macs
from fxcompress.graph.recurrent import CLASSES, QuantizedRecurrent
from fxcompress.graph.select import Layer, Selection
from fxcompress.graph.shapes import dtype_of, module_of
from fxcompress.pass_base import APPROXIMATE, Context, Pass, Promise
from fxcompress.quantization.overrides import Overrides, weight_grid_of
from fxcompress.quantization.placement import computed, layer_name, overwritten_input
from fxcompress.quantization.weight_folder import WeightFolder
from fxcompress.quantization.weights import quantize_weight

__all__ = ["QuantizeDynamic"]


@dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """Quantize linear and recurrent layers without data: each input is put on the 8-bit grid of its own range.

    Attention layers are covered once ``open-attention`` has made linear layers of their projections.

    Options: ``backend``; ``per_channel``, ``symmetric``: the grid of weights; ``include_layers``/``exclude_layers``, by
    name, glob, ``re:`` or ``type:``; ``overrides``, ``{layers: {bits, per_channel, symmetric,
    float}}``, of weights; ``reduce_range``: as ``insert-observers`` has it.
    """

    name: ClassVar[str] = "quantize-dynamic"
    leaves: ClassVar[str | None] = "qdq"
    promise: ClassVar[Promise] = APPROXIMATE

    backend: str = "fbgemm"
    per_channel: bool = True
    symmetric: bool = True
    include_layers: tuple[Layer, ...] | None = None
    exclude_layers: tuple[Layer, ...] = ()
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    reduce_range: bool | None = None

    def __post_init__(self) -> None:
        backend = backends.find(self.backend)
        if not backend.dynamic:
            able = [name for name, other in backends.BACKENDS.items() if other.dynamic]
            raise BackendError(f"{backend.name} has no kernels that quantize at run time; {', '.join(able)} have.")
        Overrides(self.overrides)
        for pattern, options in self.overrides.items():
            wrong = {"activation_bits", "calibrator", "calibrator_options"} & set(options)
            if wrong:
                raise ConfigError(
                    f"the override for {pattern!r} sets {wrong.pop()!r}; activations are quantized to 8 bits as they come."
                )

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        Selection(self.include_layers, self.exclude_layers).check(model)
        Overrides(self.overrides).check(model)
        super().run_model(model, context)

    def run(self, module: fx.GraphModule, context: Context) -> None:
        backend = backends.find(self.backend)
        settings = {
            "backend": backend.name,
            "per_channel": self.per_channel,
            "symmetric": self.symmetric or not backend.affine_weights,
            "reduce_range": bool(self.reduce_range),
            "bound_pairs": self.reduce_range is None and backend.saturates(),
            "full_range": self.reduce_range is False,
        }
        module.meta["quantization"] = settings
        rewriting = _Rewriting(module, backend, settings)
        overrides = Overrides(self.overrides)
        in_float = tuple(name for name in self.overrides if self.overrides[name].get("float"))
        selection = Selection(self.include_layers, (*self.exclude_layers, *in_float))
        chosen, written = [], inplace.overwritten(module)
        for node in module.graph.nodes:
            call = ops.read(node) if node.op.startswith("call") else None
            if call is None:
                continue
            layer = layer_name(node, context.region)
            reason = rewriting.obstacle(call) or overwritten_input(node, written)
            if reason is None and layer and layer not in selection:
                reason = "it is excluded by name"
            if reason is None:
                node.meta |= {"integer": True, "macs": macs(node), "weight_grid": weight_grid_of(overrides[layer])}
                chosen.append(call)
            else:
                node.meta["float"] = reason
                if call.op.family in ("contraction", "recurrent", "attention"):
                    context.skip(node, reason)
        for call in chosen:
            rewriting.quantize(call)


class _Rewriting:
    """The rewrite of one region."""

    def __init__(self, module: fx.GraphModule, backend: Backend, settings: Mapping[str, Any]) -> None:
        self.module, self.backend, self.settings = module, backend, settings
        self.folder = WeightFolder(module, backend, settings)
        self.quant_max = 127 if settings["reduce_range"] else 255
        self.values: dict[fx.Node, fx.Node] = {}

    def obstacle(self, call: ops.Call) -> str | None:
        """Why this call stays in float, or None."""
        if call.kind not in self.backend.dynamic:
            return f"{self.backend.name} has no dynamic kernel for {call.kind}"
        if call.kind in ("lstm", "gru"):
            return _recurrent_obstacle(module_of(call.node))
        source = call["input"]
        dtype = dtype_of(source) if isinstance(source, fx.Node) else None
        if dtype not in (None, torch.float32):
            return f"its input is {dtype}"
        return self.backend.rules[call.kind].refuse(call) or computed(call)

    def quantize(self, call: ops.Call) -> None:
        if call.kind in ("lstm", "gru"):
            self._recurrent(call.node)
            return
        source = call["input"]
        self.folder.fold(call)
        call.node.update_arg(0, self._value(source))

    def _value(self, source: fx.Node) -> fx.Node:
        """``source`` on the grid of its own range, one node however many read it."""
        if source not in self.values:
            made = edit.insert_after(source, qdq.fake_quantize_dynamic, (source, self.quant_max))
            made.meta["tensor_meta"] = source.meta.get("tensor_meta")
            self.values[source] = made
        return self.values[source]

    def _recurrent(self, node: fx.Node) -> None:
        layer = module_of(node)
        if isinstance(layer, QuantizedRecurrent):  # called more than once
            return
        assert isinstance(layer, nn.RNNBase)
        asked = {"bits": 8, **self.settings, **node.meta["weight_grid"]}
        options = {key: asked[key] for key in ("bits", "per_channel", "symmetric", "bound_pairs")}
        made = CLASSES[type(layer)](layer, self.quant_max)
        for name, parameter in layer.named_parameters():
            if name.startswith("bias"):
                made.register_buffer(name, parameter.detach().clone())
                continue
            levels, scale, zero_point = quantize_weight(parameter, adjacent=self.backend.adjacent, **options)
            made.register_buffer(name, levels)
            made.register_buffer(f"{name}_scale", scale)
            made.register_buffer(f"{name}_zero_point", zero_point)
        owner, _, leaf = str(node.target).rpartition(".")
        self.module.get_submodule(owner)._modules[leaf] = made.train(layer.training)


def _recurrent_obstacle(layer: nn.Module) -> str | None:
    if isinstance(layer, QuantizedRecurrent):
        return None
    assert isinstance(layer, nn.RNNBase)
    if type(layer) not in CLASSES:
        return f"it is a {type(layer).__name__}, a class of its own"
    if {name for name, _ in layer.named_parameters()} != set(layer._flat_weights_names):
        return "its weights are computed by a hook or a parametrization"
    if layer.proj_size:
        return "it projects its hidden state (proj_size)"
    if layer.training and layer.dropout:
        return "its dropout is active"
    if next(layer.parameters()).dtype != torch.float32:
        return f"its weights are {next(layer.parameters()).dtype}"
    return None
