"""bake-masks: masks become zeros in the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxcompress.pass_base import EXACT, Context, Pass, Promise
from fxcompress.pruning.prunable import bake_masks

__all__ = ["BakeMasks"]


@dataclass(frozen=True)
class BakeMasks(Pass):
    """Multiply every mask into its weight and take it off; the zeros stay, the dense weights are gone."""

    name: ClassVar[str] = "bake-masks"
    promise: ClassVar[Promise] = EXACT
    costly: ClassVar[bool] = True

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        if not bake_masks(model):
            context.note("", "there are no masks")
