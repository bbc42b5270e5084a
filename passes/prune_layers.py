"""prune-layers: whole residual blocks, or layers that keep their input's shape, are left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import fx

from fxcompress.errors import ConfigError, did_you_mean
from fxcompress.graph.island import regions
from fxcompress.graph.select import Layer, Selection
from fxcompress.options import Fraction, Seed
from fxcompress.pass_base import APPROXIMATE, Context, Pass, Promise
from fxcompress.pruning.blocks import Block, cut
from fxcompress.pruning.depth import candidates, importance, least

__all__ = ["PruneLayers"]


@dataclass(frozen=True)
class PruneLayers(Pass):
    """Leave out the least important residual blocks, or layers whose input and output shapes agree.

    A residual block is an addition of a value and a branch computed from it; without the branch the value passes. Options:
    ``sparsity``, the share of removable parts that go, exact to one; ``units``, ``blocks``, ``layers``, or ``auto``: blocks
    where there are any, else layers; ``criterion``, ``l1_norm`` (mean |w|), ``l2_norm`` (root of the mean w²), ``bn_scale``
    (mean |γ| of the last batch normalisation), ``taylor`` (|Σ w·∂L/∂w|, needs labels), ``cosine`` (1 − cosine between what
    enters and what leaves, needs data) or ``random``; ``remove``, names that go whatever they score;
    ``include_layers``/``exclude_layers``; ``seed``. Without anything removable it is an error that gives the reasons.
    """

    name: ClassVar[str] = "prune-layers"
    needs: ClassVar[tuple[str, ...]] = ("inputs",)
    promise: ClassVar[Promise] = APPROXIMATE

    sparsity: Fraction = 0.5
    criterion: Literal["l1_norm", "l2_norm", "bn_scale", "taylor", "cosine", "random"] = "l1_norm"
    units: Literal["auto", "blocks", "layers"] = "auto"
    remove: tuple[str, ...] | None = None
    include_layers: tuple[Layer, ...] | None = None
    exclude_layers: tuple[Layer, ...] = ()
    seed: Seed = 0

    def candidates(self, model: fx.GraphModule, context: Context) -> dict[str, tuple[str, Block]]:
        """What can go: name → its region and the part. Raises ConfigError with the reasons where there is nothing."""
        selection = Selection(self.include_layers, self.exclude_layers).on(model)
        return candidates(model, self.units, selection, context)

    def importance(self, model: fx.GraphModule, found: dict[str, tuple[str, Block]], context: Context) -> dict[str, float]:
        """Name → score; the smallest go first."""
        return importance(model, found, self.criterion, context, self.seed)

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        found = self.candidates(model, context)
        names = (
            self._checked(found) if self.remove is not None else least(self.importance(model, found, context), self.sparsity)
        )
        graphs = regions(model)
        for region, graph in graphs.items():
            cut(graph, [found[name][1] for name in names if found[name][0] == region])
        for name in names:
            context.note(name, "left out")
        if not names:
            context.note("", f"{self.sparsity:g} of {len(found)} removable parts is less than one")

    def _checked(self, found: dict[str, Any]) -> list[str]:
        wrong = [f"{name!r}.{did_you_mean(name, found)}" for name in self.remove or () if name not in found]
        if wrong:
            raise ConfigError(f"there is no removable part {' '.join(wrong)} Known: {', '.join(found)}.")
        return list(self.remove or ())
