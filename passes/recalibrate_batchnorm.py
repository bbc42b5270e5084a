"""recalibrate-batchnorm: running statistics of batch normalisation, estimated anew over data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from fxcompress.data import batches
from fxcompress.errors import DataError
from fxcompress.graph import ops
from fxcompress.graph.inputs import Arguments
from fxcompress.graph.island import regions
from fxcompress.graph.tree import evaluating
from fxcompress.options import Count
from fxcompress.pass_base import APPROXIMATE, Context, Pass, Promise

__all__ = ["RecalibrateBatchNorm"]


@dataclass(frozen=True)
class RecalibrateBatchNorm(Pass):
    """Estimate the running statistics of batch normalisation anew over data, as after pruning or averaging weights.

    The statistics are forgotten and become the mean over up to ``num_batches`` batches (None: all) of every batch's mean and
    unbiased variance, while those layers, and no others, run in training mode. Weights stay as they are.

    Left alone, with the reason: layers without running statistics, and normalisation that is not a layer of its own.
    """

    name: ClassVar[str] = "recalibrate-batchnorm"
    needs: ClassVar[tuple[str, ...]] = ("data",)
    promise: ClassVar[Promise] = APPROXIMATE

    num_batches: Count | None = None

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        norms = _norms(model, context)
        if not norms:
            context.note("", "there is no batch normalisation with running statistics")
            return
        seen = 0
        with torch.no_grad(), _estimating(model, norms):
            feed = batches(context.require_data(f"{self.name!r}"), model, self.num_batches)
            hidden = None if context.progress is None else not context.progress
            for call in tqdm(feed, self.name, disable=hidden, leave=False, unit="batch"):
                _run(model, call, seen)
                seen += 1
        if not seen:
            raise DataError("the dataloader is empty: there is nothing to estimate statistics from.")
        if self.num_batches is not None and seen < self.num_batches:
            context.note("", f"{self.num_batches} batches were asked for and the data has {seen}")


def _norms(model: fx.GraphModule, context: Context) -> list[_BatchNorm]:
    """The layers to estimate; the others are named."""
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        if module.running_mean is None:
            context.skip(name, "it keeps no running statistics")
        elif isinstance(module, nn.SyncBatchNorm) and module.running_mean.device.type == "cpu":
            context.skip(name, "synchronised normalisation runs in training mode on a GPU only")
        else:
            found.append(module)
    for region, graph in regions(model).items():
        for node in graph.graph.nodes:
            if ops.kind(node) == "batch_norm" and not isinstance(_called(graph, node), _BatchNorm):
                context.skip(f"{region}.{node.name}" if region else node, "its statistics are constants of the graph")
    return found


def _called(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


@contextmanager
def _estimating(model: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
    """Only ``norms`` in training mode, from zero, every batch counting alike; flags and momentum come back."""
    momenta = {norm: norm.momentum for norm in norms}
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.training, norm.momentum = True, None  # torch: no momentum is a cumulative average
        try:
            yield
        finally:
            for norm, momentum in momenta.items():
                norm.momentum = momentum


def _run(model: nn.Module, call: Arguments, number: int) -> None:
    try:
        call(model)
    except (RuntimeError, ValueError, IndexError) as error:
        raise DataError(f"batch {number} does not run through the model: {str(error).splitlines()[0]}") from error
