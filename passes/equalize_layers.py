"""equalize-layers: the channels of neighbouring layers get ranges alike, so that one scale fits them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from fxcompress.data import batches
from fxcompress.graph import edit, ops
from fxcompress.graph.inputs import Arguments
from fxcompress.graph.module import shared_copy
from fxcompress.graph.shapes import module_of
from fxcompress.graph.tree import evaluating
from fxcompress.options import Count
from fxcompress.pass_base import APPROXIMATE, Context, Pass, Promise
from fxcompress.passes.fold_quantization import quantized_copy
from fxcompress.quantization.equalization import Bounds, Pair, chains, equalize, pairs
from fxcompress.quantization.fake_quant import fake_quantizers
from fxcompress.quantization.local_error import channel_maxima, errors_between
from fxcompress.quantization.observer import ActivationObserver
from fxcompress.quantization.placement import weight_axis

__all__ = ["EqualizeLayers"]

_CEILING = 6.0


@dataclass(frozen=True)
class EqualizeLayers(Pass):
    """Equalize the weight ranges of layers that follow one another, channel by channel, without changing what they compute.

    Cross-layer equalization (Nagel et al. 2019), depthwise convolutions included. It reaches through ReLU, pooling and a
    flatten; a value that goes several ways, as at a residual connection, stays as it is. Fold batch normalisation first.
    On a calibrated graph every chain of layers is measured: it is equalized where that brings what the quantized chain
    computes nearer to the float one, and its ranges are observed anew; a float graph is equalized throughout.

    ReLU6 clips at 6 for every channel, which a rescaling would move. Options: ``relu6``: ``bound`` (channels that reach 6 on
    the data stay, the others are scaled so that they never do: on the data nothing changes), ``replace`` it by ReLU between
    equalized layers, as the paper does (what it clipped is no longer clipped), or ``keep`` its layers as they are;
    ``sweeps``, at most so many over all pairs; ``num_batches`` of the data, or the example inputs where there is none.
    """

    name: ClassVar[str] = "equalize-layers"
    takes: ClassVar[tuple[str, ...]] = ("float", "observed")
    promise: ClassVar[Promise] = APPROXIMATE

    relu6: Literal["bound", "replace", "keep"] = "bound"
    sweeps: Count = 20
    num_batches: Count = 8

    def run(self, module: fx.GraphModule, context: Context) -> None:
        if fake_quantizers(module):
            context.note("", "its scales were trained with the ranges that its channels have")
            return
        with evaluating(module), torch.no_grad():
            calls = _calls(module, context, self.num_batches)
            chosen = self._allowed(module, calls, context)
            watched = [observer for pair in chosen for observer in _observers(pair)]
            measured = any(observer.calibrator.count for observer in watched)
            if measured and calls:
                chosen = self._helpful(module, chosen, calls, context)
            elif measured:
                context.note("", "nothing was equalized: there are no batches to observe the new ranges on")
                return
            self._apply(module, chosen, calls, context)

    def _allowed(self, module: fx.GraphModule, calls: Sequence[Arguments], context: Context) -> list[Pair]:
        found = []
        for pair in pairs(module, context.skip):
            if pair.clipped and self.relu6 == "keep":
                context.skip(pair.first.node, "ReLU6 stands between it and the next layer")
            elif pair.clipped and self.relu6 == "bound" and not calls:
                context.skip(pair.first.node, "no data tells which of its channels ReLU6 clips")
            else:
                found.append(pair)
        return found

    def _helpful(
        self, module: fx.GraphModule, allowed: list[Pair], calls: Sequence[Arguments], context: Context
    ) -> list[Pair]:
        """The pairs of those chains that are nearer to the float network when they are equalized."""
        trial = shared_copy(module)
        wanted = {pair.first.node.name for pair in allowed}
        matching = [pair for pair in pairs(trial, lambda node, reason: None) if pair.first.node.name in wanted]
        self._apply(trial, matching, calls, Context())
        edit.finish(trial)
        found = chains(allowed)
        ends = [(_source(chain[0].first), chain[-1].second.node) for chain in found]
        errors = errors_between(module, calls, ends, [quantized_copy(module), quantized_copy(trial)])
        kept = []
        for chain, (before, after) in zip(found, errors, strict=True):
            if after < before:
                kept += chain
            else:
                context.skip(chain[0].first.node, "equalizing it with the layers after it brings nothing on the data")
        return kept

    def _apply(self, module: fx.GraphModule, chosen: list[Pair], calls: Sequence[Arguments], context: Context) -> None:
        if not chosen:
            return
        equalize(module, chosen, self._bounds(module, chosen, calls), sweeps=self.sweeps)
        for node in dict.fromkeys(node for pair in chosen for node in pair.clipped):
            if self.relu6 == "replace":
                _unclip(node)
                context.note(node, "ReLU6 became ReLU")
        _observe_anew(module, [observer for pair in chosen for observer in _observers(pair)], calls)

    def _bounds(self, module: fx.GraphModule, chosen: list[Pair], calls: Sequence[Arguments]) -> list[Bounds | None]:
        """Factors that keep a channel which does not reach the ceiling below it, and leave one that does as it is."""
        if self.relu6 != "bound":
            return [None] * len(chosen)
        asked = {node: _channels(module, pair.first) for pair in chosen for node in pair.clipped}
        largest = channel_maxima(module, calls, asked) if asked else {}
        return [_bounds([largest[node] for node in pair.clipped]) for pair in chosen]


def _calls(module: fx.GraphModule, context: Context, count: int) -> list[Arguments]:
    """Batches that this graph takes: of the data, or the example inputs, or none."""
    data, example = context.data, context.example()
    if context.region == "" and data is not None and iter(data) is not data:  # an iterator's batches are needed later
        return list(batches(data, module, count))
    return [example] if example is not None else []


def _channels(module: fx.GraphModule, call: ops.Call) -> tuple[int, int]:
    """The axis along which a layer's result has its channels, and how many there are."""
    weight = edit.get_tensor(module, call["weight"].name)
    return -1 if call.kind == "linear" else 1, weight.shape[weight_axis(call)]


def _bounds(maxima: list[Tensor]) -> Bounds | None:
    if not maxima:
        return None
    largest = torch.stack(maxima).amax(0)
    reaches = largest >= _CEILING
    return torch.where(reaches, 1.0, largest / _CEILING), torch.where(reaches, 1.0, torch.inf)


def _source(call: ops.Call) -> fx.Node:
    """The value a layer reads, before its observer."""
    source: fx.Node = call["input"]
    while source.meta.get("observer"):
        source = source.all_input_nodes[0]
    return source


def _observers(pair: Pair) -> list[ActivationObserver]:
    return [module for node in pair.watched if isinstance(module := module_of(node), ActivationObserver)]


def _observe_anew(module: fx.GraphModule, watching: list[ActivationObserver], calls: Sequence[Arguments]) -> None:
    """Let calibrated observers forget what they saw, and see the batches."""
    watching = [observer for observer in watching if observer.calibrator.count]
    if not watching:
        return
    edit.finish(module)
    for observer in watching:
        observer.calibrator.reset()
        observer.enabled = True
    for call in calls:
        call(module)
    for observer in watching:
        observer.enabled = False


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
