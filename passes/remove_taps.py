"""remove-taps: a graph without its taps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxcompress.graph import taps
from fxcompress.pass_base import EXACT, STAGES, Context, Pass, Promise

__all__ = ["RemoveTaps"]


@dataclass(frozen=True)
class RemoveTaps(Pass):
    """Take every tap out, so that later passes may fuse what was tapped."""

    name: ClassVar[str] = "remove-taps"
    takes: ClassVar[tuple[str, ...]] = STAGES
    promise: ClassVar[Promise] = EXACT

    def run(self, module: fx.GraphModule, context: Context) -> None:
        taps.remove(module)
