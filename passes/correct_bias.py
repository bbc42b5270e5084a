"""correct-bias: quantization shifts the mean of a layer's result; its bias takes the shift back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from tqdm import tqdm

from fxcompress.data import batches
from fxcompress.errors import DataError
from fxcompress.graph import edit
from fxcompress.graph.inputs import Arguments
from fxcompress.graph.island import regions
from fxcompress.graph.tree import evaluating
from fxcompress.options import Count
from fxcompress.pass_base import APPROXIMATE, Context, Pass, Promise, hidden
from fxcompress.passes.fold_quantization import quantized_copy
from fxcompress.quantization.lockstep import Step, Twins, sample_means, vouched_mean

__all__ = ["CorrectBias", "in_one_graph", "twins_of", "walkable"]


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Correct the bias of every quantized layer by the shift that quantization gives the mean of its result.

    Bias correction by data (Nagel et al. 2019): layer by layer, ``b ← b + E[W·x] − E[Ŵ·x̂]`` per output channel,
    before the activation; Ŵ and x̂ are what the quantized network has there, earlier layers already corrected. A shift that
    few samples show is corrected only as far as they vouch for it: what may be chance would be an error on other samples.

    Options: ``num_batches``, how much of the data to use. The results of one layer over all of it are held at once.
    """

    name: ClassVar[str] = "correct-bias"
    takes: ClassVar[tuple[str, ...]] = ("observed",)
    needs: ClassVar[tuple[str, ...]] = ("data",)
    promise: ClassVar[Promise] = APPROXIMATE

    num_batches: Count = 8

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        calls = walkable(self.name, model, context, self.num_batches)
        if not calls:
            return
        with evaluating(model), torch.no_grad():
            twins = twins_of(model, calls)
            layers = twins.layers(context.skip)
            for name in tqdm(layers, self.name, disable=hidden(context.progress), leave=False, unit="layer"):
                correct(twins, twins.reach(name))


def walkable(who: str, model: fx.GraphModule, context: Context, num_batches: int) -> list[Arguments]:
    """The batches a layer-wise pass walks the model with; none, and a remark, where it is not one graph."""
    if not in_one_graph(model, context):
        return []
    calls = list(batches(context.require_data(f"{who!r}"), model, num_batches))
    if not calls:
        raise DataError(f"the dataloader is empty: {who!r} has nothing to work with.")
    return calls


def in_one_graph(model: fx.GraphModule, context: Context) -> bool:
    """Whether batches say what every layer receives; a remark where they do not."""
    if list(regions(model)) == [""]:
        return True
    context.note("", "it is not one graph, and batches do not say what its parts receive")
    return False


def twins_of(module: fx.GraphModule, calls: Sequence[Arguments]) -> Twins:
    """``module`` beside its quantized copy."""
    return Twins(module, quantized_copy(module), calls)


def correct(twins: Twins, step: Step) -> None:
    """Shift the bias of one layer, and go on."""
    kind, expected = step.call.kind, step.expected(twins.module)
    found = [step.apply(input, step.weight, step.bias) for input in step.quantized]
    shift = vouched_mean(sample_means(expected, kind) - sample_means(found, kind))
    bias = shift if step.bias is None else step.bias.to(torch.float64) + shift
    shape = [-1] if kind == "linear" else [-1] + [1] * (found[0].dim() - 2)
    twins.leave(step, expected, [part + shift.reshape(shape).to(part.dtype) for part in found])
    edit.set_bias(twins.module, step.call, bias.to(step.weight.dtype))
