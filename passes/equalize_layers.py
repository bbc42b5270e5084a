"""equalize-layers: the channels of neighbouring layers get ranges alike, so that one scale fits them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import fx

from fxcompress.graph import edit, ops
from fxcompress.graph.shapes import module_of
from fxcompress.pass_base import APPROXIMATE, Context, Pass, Promise
from fxcompress.quantization.equalization import Pair, equalize, pairs

__all__ = ["EqualizeLayers"]


@dataclass(frozen=True)
class EqualizeLayers(Pass):
    """Equalize the weight ranges of layers that follow one another, channel by channel, without changing what they compute.

    Cross-layer equalization (Nagel et al. 2019), depthwise convolutions included. It reaches through ReLU, pooling and a
    flatten; a value that goes several ways, as at a residual connection, stays as it is. Fold batch normalisation first.

    ReLU6 clips at 6 for every channel, which a rescaling would move. Options: ``relu6``, ``replace`` it by ReLU between
    equalized layers, as the paper does (what it clipped is no longer clipped), or ``keep`` it and leave its layers alone;
    ``sweeps``, at most so many over all pairs.
    """

    name: ClassVar[str] = "equalize-layers"
    promise: ClassVar[Promise] = APPROXIMATE

    relu6: Literal["replace", "keep"] = "replace"
    sweeps: Annotated[int, Field(ge=1)] = 20

    def run(self, module: fx.GraphModule, context: Context) -> None:
        chosen: list[Pair] = []
        for pair in pairs(module, context.skip):
            if pair.clipped and self.relu6 == "keep":
                context.skip(pair.first.node, "ReLU6 stands between it and the next layer")
            else:
                chosen.append(pair)
        equalize(module, chosen, sweeps=self.sweeps)
        for node in dict.fromkeys(node for pair in chosen for node in pair.clipped):
            _unclip(node)
            context.note(node, "ReLU6 became ReLU")


def _unclip(node: fx.Node) -> None:
    """Turn ReLU6, alone or joined to a layer, into ReLU."""
    call = ops.read(node)
    assert call is not None
    if call["activation"] is None:
        edit.replace(node, edit.insert_before(node, torch.relu, (node.all_input_nodes[0],)))
    elif node.op == "call_module":
        module_of(node).activation = "relu"  # type: ignore[assignment]
    else:
        node.update_kwarg("activation", "relu")
