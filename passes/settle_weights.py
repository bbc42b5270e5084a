"""settle-weights: weights that are computed from others become plain weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxcompress.graph.meta_run import propagate
from fxcompress.graph.projections import spell_projections
from fxcompress.graph.settling import fold_computed, settle
from fxcompress.pass_base import Context, Pass, Promise, close
from fxcompress.pruning.prunable import bake_masks
from fxcompress.pruning.sites import Mask

__all__ = ["SettleWeights"]


@dataclass(frozen=True)
class SettleWeights(Pass):
    """Compute once what is computed from parameters alone: normed, masked, standardized weights, joined biases.

    Weight norm, spectral norm, parametrizations and what the graph itself computes for a convolution or linear layer are
    written into a plain weight, which then is quantized and trains like any other. Products with a stored weight (``x @ w``,
    ``addmm``, ``bmm``, ``einsum``, ``tensordot``) become linear layers, or grouped convolutions where each group has a
    weight of its own.

    Masks of this package and of ``torch.nn.utils.prune`` become zeros.

    Options: ``trains``, the weights will be trained: masks stay on them, and so does the code that computes a weight from
    one that something else reads too.
    """

    name: ClassVar[str] = "settle-weights"
    promise: ClassVar[Promise] = close(rtol=1e-5)

    trains: bool = False

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        if not self.trains and (count := bake_masks(model)):
            context.note("", f"{count} masks are now part of their weights")
        super().run_model(model, context)

    def run(self, module: fx.GraphModule, context: Context) -> None:
        for layer, what in settle(module, Mask, pruned=not self.trains):
            context.note(layer, what)
        spelled = list(spell_projections(module))
        for node, what in spelled:
            context.note(node, what)
        if spelled and (example := context.example()) is not None:
            propagate(module, example)
        for node, what in fold_computed(module, shared=not self.trains):
            context.note(node, what)
