"""adaround: weights are rounded so that each layer's result stays, rather than each weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor, fx
from tqdm import tqdm

from fxcompress.graph import ops
from fxcompress.graph.select import Layer, Selection
from fxcompress.graph.tree import evaluating
from fxcompress.options import Count, Fraction
from fxcompress.pass_base import APPROXIMATE, Context, Pass, Promise, hidden
from fxcompress.passes.correct_bias import twins_of, walkable
from fxcompress.quantization.layer_grid import LayerGrid
from fxcompress.quantization.lockstep import Step
from fxcompress.quantization.rounding import Rounding, adaptive_levels

__all__ = ["AdaRound", "round_layers"]


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
        options = Rounding(self.iterations, self.batch_size, self.learning_rate, self.regularization, self.warm_start)
        generator = context.generator()

        def rounded(step: Step, grid: LayerGrid, expected: list[Tensor]) -> Tensor:
            def layer(input: Tensor, weight: Tensor) -> Tensor:
                return step.activate(step.apply(input, weight, step.bias))

            on = grid.scale, grid.zero_point, grid.grid
            with torch.enable_grad():
                targets = [step.activate(part) for part in expected]
                return grid.values(adaptive_levels(grid.weight, *on, layer, step.quantized, targets, options, generator))

        round_layers(self, model, context, rounded)


def round_layers(
    options: _Chosen,
    model: fx.GraphModule,
    context: Context,
    rounded: Callable[[Step, LayerGrid, list[Tensor]], Tensor | None],
) -> None:
    """Walk a model layer by layer, and let the chosen ones have the weight that ``rounded`` finds; None: the one they have.

    ``rounded(step, grid, expected)`` is told what the float network computes there before the activation.
    """
    selection = Selection(options.include_layers, options.exclude_layers).on(model)
    calls = walkable(options.name, model, context, options.num_batches)
    if not calls:
        return
    with evaluating(model), torch.no_grad():
        twins = twins_of(model, calls)
        layers = twins.layers(context.skip)
        for name in tqdm(layers, options.name, disable=hidden(context.progress), leave=False, unit="layer"):
            step = twins.reach(name)
            weight, expected, owner = step.weight, step.expected(model), ops.owner_name(step.call.node)
            if not owner or owner in selection:
                grid = LayerGrid.of(model, step.call)
                found = rounded(step, grid, expected)
                if found is not None:
                    grid.pin(model, found)
                    weight = found
            twins.leave(step, expected, [step.apply(input, weight, step.bias) for input in step.quantized])


class _Chosen(Protocol):
    """A pass that rounds the weights of layers chosen by name."""

    name: ClassVar[str]

    @property
    def num_batches(self) -> int: ...
    @property
    def include_layers(self) -> tuple[Layer, ...] | None: ...
    @property
    def exclude_layers(self) -> tuple[Layer, ...]: ...
