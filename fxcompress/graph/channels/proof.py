"""Two oracles that ask the model itself whether an analysis and a cut are right.

*Permutation*: the dense model computes the same when channels of one kind change places. *Silence*: the smaller model
computes what the dense one does when the removed channels take no part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxcompress.errors import DataError
from fxcompress.graph.channels.analysis import Channels
from fxcompress.graph.channels.atoms import Ints
from fxcompress.graph.channels.permutation import permuted
from fxcompress.graph.channels.silence import silenced
from fxcompress.graph.inputs import Arguments
from fxcompress.graph.recorder import Recorder
from fxcompress.graph.shapes import tensor_meta
from fxcompress.graph.tree import evaluating

__all__ = ["Proof", "relative_error", "tolerance"]


def relative_error(expected: Any, found: Any) -> float:
    """The largest difference between two results over the largest magnitude of the first; inf where shapes differ."""
    worst = 0.0
    for a, b in zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True):
        if not isinstance(a, torch.Tensor) or not a.numel():
            continue
        if a.shape != b.shape:
            return float("inf")
        a, b = a.to(torch.float64), b.to(torch.float64)
        gap = torch.where(a == b, torch.zeros_like(a), (a - b).abs()).max().item()
        size = a.abs().nan_to_num(posinf=0.0).max().item()
        worst = max(worst, gap / size if size else gap) if gap == gap else float("inf")
    return worst


def _is_known(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or not bool(value.isnan().any())


class Proof:
    """Both oracles for one cut: built before it, asked after it. Everything runs in eval mode; four forward passes.

    ``moved``  after :meth:`errors`: by how much the cut changed the outputs, relative to them
    """

    def __init__(self, channels: Channels, removed: Ints, call: Arguments, seed: int = 0) -> None:
        self.channels, self.removed, self.call, self.seed, self.moved = channels, removed, call, seed, 0.0
        dense = channels.walk.module
        with evaluating(dense):
            self.plain = Recorder(dense).record(call)
            if not all(_is_known(x) for x in pytree.tree_leaves(self.plain)):
                raise DataError(
                    "the model itself computes NaN for the example inputs, so nothing about its channels can be proved: "
                    "give inputs it was made for, or prune without proof."
                )
            with permuted(channels, seed):
                self.permutation = relative_error(self.plain, Recorder(dense).record(call))
            self.expected = silenced(channels, removed, call)

    def errors(self) -> dict[str, float]:
        """Oracle → relative error, once the graph has been cut."""
        small = self.channels.walk.module
        with evaluating(small):
            try:
                found = Recorder(small).record(self.call)
            except DataError:  # the dense model ran: what is wrong is the cut
                return {"permutation": self.permutation, "silence": float("inf")}
        self.moved = relative_error(self.plain, found)
        return {"permutation": self.permutation, "silence": relative_error(self.expected, found)}

    def unsteadiness(self) -> float:
        """By how much a rounding of the inputs moves the outputs of the dense model, relative to them."""
        dense = self.channels.walk.module
        with evaluating(dense):
            return relative_error(self.plain, Recorder(dense).record(self.call.nudged()))


def tolerance(module: fx.GraphModule) -> float:
    """The relative error that rounding may cause, by the coarsest precision among the parameters and the values."""
    kinds = {p.dtype for p in module.parameters()}
    kinds |= {meta.dtype for node in module.graph.nodes if (meta := tensor_meta(node)) is not None}
    kinds = {kind for kind in kinds if kind.is_floating_point}
    coarsest = max(kinds, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
    return {torch.float64: 1e-10, torch.float32: 1e-3}.get(coarsest, 5e-2)
