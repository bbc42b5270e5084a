"""insert-taps: named values of a graph become further outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxcompress.graph import addresses, taps
from fxcompress.graph.island import regions
from fxcompress.pass_base import EXACT, Context, Pass, Promise

__all__ = ["InsertTaps"]


@dataclass(frozen=True)
class InsertTaps(Pass):
    """Tap values of the graph, so that ``features(model)`` returns them beside the output.

    ``layers`` are addresses: ``layer1`` is what the module returns, ``layer1:input`` what it is given, and
    ``layer1:preactivation`` what enters the activation it ends in (of a normalisation or an addition, its result);
    ``relu@1`` is the second call of a module that is called several times. Glob patterns take the outermost modules they
    match; names of graph nodes are addresses too.

    A tapped value is safe: it is a copy where a later operator overwrites it. A tap holds through every later pass; one that
    would take the value away leaves it, and says so.
    """

    name: ClassVar[str] = "insert-taps"
    takes: ClassVar[tuple[str, ...]] = ("float", "observed", "qdq")
    promise: ClassVar[Promise] = EXACT

    layers: tuple[str, ...] = ()

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        module = regions(model).get("", model)
        taps.insert(module, addresses.expand(module, self.layers))
