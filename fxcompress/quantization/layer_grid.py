"""The grid that a layer's weight lies on, and weights that were rounded on it in another way than to nearest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxcompress import backends
from fxcompress.graph import edit, fused, ops
from fxcompress.graph.qdq import along
from fxcompress.quantization.fake_quant import FakeQuantize, fixed_on_weight, on_weight
from fxcompress.quantization.grid import Grid
from fxcompress.quantization.placement import weight_axis, weight_options
from fxcompress.quantization.weights import weight_grid

__all__ = ["LayerGrid"]


@dataclass(frozen=True)
class LayerGrid:
    """Where the weight of one quantized layer of an observed graph may lie.

    ``weight``                 in float, ``axis`` its output channels
    ``scale``, ``zero_point``  broadcast with it
    ``bounded``                pairs of levels are bounded, so that 16-bit sums cannot saturate: the two levels next to every
                               weight keep to that, others may not
    """

    call: ops.Call
    weight: Tensor
    axis: int
    scale: Tensor
    zero_point: Tensor
    grid: Grid
    bounded: bool

    @classmethod
    def of(cls, module: fx.GraphModule, call: ops.Call) -> LayerGrid:
        """The grid of a fake-quantizer on the weight, or the one that its extremes give it."""
        settings, axis = module.meta["quantization"], weight_axis(call)
        weight = edit.get_tensor(module, call["weight"].name).detach()
        options = weight_options(call, backends.find(settings["backend"]), settings)
        node = on_weight(call)
        if node is None:
            scale, zero_point, grid = weight_grid(weight, axis, **options)
            zero = torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point
        else:
            fake = fixed_on_weight(module, node)
            scale, zero, grid = fake.scale, fake.zero_point, fake.grid
        step, zero = along(scale, weight.dim(), axis), along(zero, weight.dim(), axis)
        return cls(call, weight, axis, step, zero, grid, options["bound_pairs"])

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest level, counted from the zero point; they broadcast with the weight."""
        return self.grid.quant_min - self.zero_point, self.grid.quant_max - self.zero_point

    def values(self, levels: Tensor) -> Tensor:
        """Levels, counted from the zero point, as weights."""
        return torch.empty_like(self.weight).copy_(levels * self.scale)

    def pin(self, module: fx.GraphModule, rounded: Tensor) -> None:
        """Let the quantized network have the weight ``rounded``, which is on the grid; the float weight stays as it is."""
        channels = self.weight.shape[self.axis]
        scale, zero_point = (value.flatten().expand(channels).clone() for value in (self.scale, self.zero_point))
        fake = FakeQuantize(self.grid, scale, zero_point, self.axis, shift=rounded - self.weight).eval()
        node = on_weight(self.call)
        if node is None:
            node = self._insert(module, fake)
        else:
            module.set_submodule(str(node.target), fake)
            node.args = node.args[:1]

    def _insert(self, module: fx.GraphModule, fake: FakeQuantize) -> fx.Node:
        call, stored = self.call, self.call["weight"].name
        name = edit.add_module(module, f"fake_quant.{stored.replace('.', '_')}", fake)
        with module.graph.inserting_before(call.node):
            weight = module.graph.get_attr(stored)
            bias = module.graph.get_attr(call["bias"].name) if call["bias"] is not None else None
        node = edit.insert_before(call.node, name, (weight,))
        node.meta["observer"] = True
        fused.make_functional(call, node, bias)
        return node
