"""gptq: weights are rounded one input after the other, and those that follow make up for the error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, fx

from fxcompress.graph.select import Layer
from fxcompress.options import Count
from fxcompress.pass_base import APPROXIMATE, Context, Pass, Promise
from fxcompress.passes.adaround import round_layers
from fxcompress.quantization.layer_grid import LayerGrid
from fxcompress.quantization.lockstep import Step
from fxcompress.quantization.patches import Patches
from fxcompress.quantization.second_order import second_order_levels

__all__ = ["GPTQ"]

_POSITIONS = 8192
"""As many places of a layer's input tell how its inputs go together; more of a large image would say little more."""
_AT_ONCE = 1 << 22
"""Numbers of such places that are in memory at once."""


@dataclass(frozen=True)
class GPTQ(Pass):
    """Round weights by second-order information, so that each layer's result stays: in seconds, without learning.

    GPTQ, also known as OPTQ (Frantar et al. 2022): layer by layer, input after input is rounded, and the weights of inputs
    that are not rounded yet make up for the error, as far as the inputs go together on the data, which are those that the
    quantized network hands the layer. Scales stay what they were; the weights end on their grid. A layer whose result on the
    data would be no nearer to the float one keeps the rounding that it had.

    Options: ``num_batches`` of the data; ``damping``, the share of the inputs' mean power that is added to each one's: more
    where samples are few; ``include_layers``/``exclude_layers``, by name, glob, ``re:`` or ``type:``.
    """

    name: ClassVar[str] = "gptq"
    takes: ClassVar[tuple[str, ...]] = ("observed",)
    needs: ClassVar[tuple[str, ...]] = ("data",)
    promise: ClassVar[Promise] = APPROXIMATE

    num_batches: Count = 8
    damping: Annotated[float, Field(gt=0.0)] = 0.01
    include_layers: tuple[Layer, ...] | None = None
    exclude_layers: tuple[Layer, ...] = ()

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        generator = context.generator()

        def rounded(step: Step, grid: LayerGrid, expected: list[Tensor]) -> Tensor | None:
            weight = self._rounded(step, grid, generator)
            if weight is None:
                context.skip(step.call.node, "what it receives is not finite")
            elif _error(step, weight - grid.weight) >= _error(step, step.weight - grid.weight):
                context.skip(step.call.node, "no rounding was found that is better than the one it has")
                weight = None
            return weight

        round_layers(self, model, context, rounded)

    def _rounded(self, step: Step, grid: LayerGrid, generator: torch.Generator) -> Tensor | None:
        patches = Patches(step.call, grid.weight)
        scale, low, high = (patches.rows(value)[..., :1] for value in (grid.scale, *grid.bounds))
        views = [patches.view(input) for input in step.quantized]
        count = sum(map(patches.count, views))
        levels = second_order_levels(
            patches.rows(grid.weight),
            *(scale, low, high),
            _products(patches, views, count, generator),
            samples=count / math.prod(patches.kernel),  # windows overlap
            damping=self.damping,
            adjacent=grid.bounded,
        )
        return None if levels is None else grid.values(patches.weight(levels))


def _products(patches: Patches, views: list[Tensor], count: int, generator: torch.Generator) -> Tensor:
    """Σ x·xᵀ over the places of a layer's inputs, ``[groups, inputs, inputs]``; drawn at random where they are many."""
    size = patches.inputs
    total = views[0].new_zeros(patches.groups, size, size)
    for view in views:
        places = torch.arange(patches.count(view), device="cpu")
        if count > _POSITIONS:
            mixed = torch.randperm(len(places), generator=generator, device="cpu")
            places = mixed[: round(len(places) * _POSITIONS / count)]
        for part in places.to(view.device).split(max(1, _AT_ONCE // (patches.groups * size))):
            x = patches.picked(view, part)
            total += x.mT @ x
    return total


def _error(step: Step, change: Tensor) -> float:
    """The squared error of the layer's result where its weight changes so."""
    return sum(float(step.apply(input, change, None).square().sum()) for input in step.quantized)
