"""adaround: weights are rounded so that each layer's result stays, rather than each weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, fx
from tqdm import tqdm

from fxcompress import backends
from fxcompress.graph import edit, fused, ops
from fxcompress.graph.qdq import along
from fxcompress.graph.select import Layer, Selection
from fxcompress.graph.tree import evaluating
from fxcompress.options import Count, Fraction
from fxcompress.pass_base import APPROXIMATE, Context, Pass, Promise, hidden
from fxcompress.passes.correct_bias import twins_of, walkable
from fxcompress.quantization.fake_quant import FakeQuantize
from fxcompress.quantization.lockstep import Step, Twins
from fxcompress.quantization.placement import weight_axis, weight_options
from fxcompress.quantization.rounding import Rounding, adaptive_levels
from fxcompress.quantization.weights import weight_grid

__all__ = ["AdaRound"]


@dataclass(frozen=True)
class AdaRound(Pass):
    """Learn for every weight whether it is rounded down or up, by what that does to the layer's result.

    Adaptive rounding (Nagel et al. 2020): layer by layer, the result in the quantized network, after its activation, is
    fitted to that in the float one, each network handing the layer what it has there. Scales stay what they were; the
    weights end on their grid.

    Options: ``iterations`` per layer, of ``batch_size`` samples drawn from ``num_batches`` batches; ``learning_rate``;
    ``regularization`` weighs the pull of every weight to one of its two levels, after ``warm_start``;
    ``include_layers``/``exclude_layers``, by name, glob, ``re:`` or ``type:``.
    """

    name: ClassVar[str] = "adaround"
    takes: ClassVar[tuple[str, ...]] = ("observed",)
    needs: ClassVar[tuple[str, ...]] = ("data",)
    promise: ClassVar[Promise] = APPROXIMATE

    iterations: Count = 1000
    num_batches: Count = 8
    batch_size: Count = 32
    learning_rate: Annotated[float, Field(gt=0.0)] = 5e-2
    regularization: Annotated[float, Field(ge=0.0)] = 1.0
    warm_start: Fraction = 0.2
    include_layers: tuple[Layer, ...] | None = None
    exclude_layers: tuple[Layer, ...] = ()

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        selection = Selection(self.include_layers, self.exclude_layers).on(model)
        calls = walkable(self.name, model, context, self.num_batches)
        if not calls:
            return
        with evaluating(model), torch.no_grad():
            twins = twins_of(model, calls)
            generator = context.generator()
            layers = twins.layers(context.skip)
            for name in tqdm(layers, self.name, disable=hidden(context.progress), leave=False, unit="layer"):
                step = twins.reach(name)
                owner = ops.owner_name(step.call.node)
                if owner and owner not in selection:
                    parts = [step.apply(input, step.weight, step.bias) for input in step.quantized]
                    twins.leave(step, step.expected(twins.module), parts)
                else:
                    self._round(twins, step, generator)

    def _round(self, twins: Twins, step: Step, generator: torch.Generator) -> None:
        module, call = twins.module, step.call
        settings = module.meta["quantization"]
        backend = backends.find(settings["backend"])
        weight, axis = edit.get_tensor(module, call["weight"].name).detach(), weight_axis(call)
        scale, zero_point, grid = weight_grid(weight, axis, **weight_options(call, backend, settings))
        zero = torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point
        expected = step.expected(module)

        def layer(input: Tensor, rounded: Tensor) -> Tensor:
            return step.activate(step.apply(input, rounded, step.bias))

        options = Rounding(self.iterations, self.batch_size, self.learning_rate, self.regularization, self.warm_start)
        spread = along(scale, weight.dim(), axis), along(zero, weight.dim(), axis)
        with torch.enable_grad():
            targets = [step.activate(part) for part in expected]
            levels = adaptive_levels(weight, *spread, grid, layer, step.quantized, targets, options, generator)
        rounded = (levels * spread[0]).to(weight.dtype)
        twins.leave(step, expected, [step.apply(input, rounded, step.bias) for input in step.quantized])
        edit.set_tensor(module, call["weight"].name, torch.empty_like(weight).copy_(rounded))
        channels = weight.shape[axis]
        _pin(module, call, FakeQuantize(grid, scale.expand(channels).clone(), zero.expand(channels).clone(), axis))


def _pin(module: fx.GraphModule, call: ops.Call, fake: FakeQuantize) -> None:
    """Keep the weight on this scale: put a fake-quantizer with it on the weight, which rounds nothing further."""
    stored, graph = call["weight"].name, module.graph
    found = [
        node for node in call.node.all_input_nodes if node.meta.get("observer") and node.all_input_nodes[0].op == "get_attr"
    ]
    if found:
        module.set_submodule(str(found[0].target), fake.eval())
        found[0].args = found[0].args[:1]
        return
    name = edit.add_module(module, f"fake_quant.{stored.replace('.', '_')}", fake)
    with graph.inserting_before(call.node):
        weight = graph.get_attr(stored)
        bias = graph.get_attr(call["bias"].name) if call["bias"] is not None else None
    pinned = edit.insert_before(call.node, name, (weight,))
    pinned.meta["observer"] = True
    fused.make_functional(call, pinned, bias)
