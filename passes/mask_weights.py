"""mask-weights: zeros in the weights, by magnitude, with the dense weight learnable underneath."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from fxcompress.graph.select import Layer, Selection
from fxcompress.options import Fraction, Seed
from fxcompress.pass_base import APPROXIMATE, Context, Pass, Promise
from fxcompress.pruning.magnitude_pruner import mask_weights
from fxcompress.pruning.masks import check_criterion
from fxcompress.pruning.prunable import sites

__all__ = ["MaskWeights"]


@dataclass(frozen=True)
class MaskWeights(Pass):
    """Mask the smallest weights of convolutions and linear layers.

    Options: ``sparsity``, the share of all chosen weights that become zero; ``criterion``, ``l1``, ``l2``, ``random`` or one
    that was registered in ``CRITERIA``; ``layers``, a share for single layers instead (or patterns), each on its own;
    ``n_m``, keep exactly N of every M along the input dimension instead; ``include_layers``/``exclude_layers``, by name,
    glob, ``re:`` or ``type:``; ``seed``. A layer whose inputs M does not divide stays dense and is named. Weights that a
    graph gives to functions are masked too. ``bake-masks`` makes masks permanent, which quantization needs.
    """

    name: ClassVar[str] = "mask-weights"
    promise: ClassVar[Promise] = APPROXIMATE

    sparsity: Fraction = 0.5
    layers: dict[str, float] = field(default_factory=dict)
    criterion: str = "l1"
    n_m: tuple[int, int] | None = None
    include_layers: tuple[Layer, ...] | None = None
    exclude_layers: tuple[Layer, ...] = ()
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_criterion(self.criterion)

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        selection = Selection(self.include_layers, self.exclude_layers).on(model)
        chosen = sites(model, selection, context.skip)
        asked = self.layers or self.sparsity
        mask_weights(chosen, asked, criterion=self.criterion, n_m=self.n_m, seed=self.seed, skip=context.skip)
