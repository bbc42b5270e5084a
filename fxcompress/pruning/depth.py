"""Which parts of a model can be left out whole, and how much each matters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.data import batches
from fxcompress.errors import ConfigError, DataError
from fxcompress.graph.inputs import Arguments, record_calls
from fxcompress.graph.island import regions
from fxcompress.graph.recorder import Recorder
from fxcompress.graph.select import Selection
from fxcompress.pass_base import Context
from fxcompress.pruning import criteria
from fxcompress.pruning.blocks import Block, Skip, find_blocks, find_layers
from fxcompress.pruning.gradients import gradients

__all__ = ["Parts", "candidates", "importance", "least"]

Parts = dict[str, tuple[str, Block]]
"""Name → the region a part is in, and the part."""

Find = Callable[[fx.GraphModule, Skip], list[Block]]


def candidates(model: fx.GraphModule, units: str, selection: Selection, context: Context) -> Parts:
    """The chosen parts that can go. Raises ConfigError with the reasons where there are none."""
    before = len(context.remarks)
    for kind, find in (("blocks", find_blocks), ("layers", find_layers)):
        found = _chosen(model, find, selection, context) if units in (kind, "auto") else {}
        if found:
            return found
    said = {remark.node: remark.reason for remark in context.remarks[before:]}
    reasons = [f"{name}: {reason}" for name, reason in said.items()]
    listed = (
        f" ({'; '.join(reasons[:6])}{'; …' if len(reasons) > 6 else ''})." if reasons else ": it has no weighted layers."
    )
    raise ConfigError(f"no {'part' if units == 'auto' else units[:-1]} of the model can be left out{listed}")


def _chosen(model: fx.GraphModule, find: Find, selection: Selection, context: Context) -> Parts:
    """The parts that ``find`` sees in every region, those that are not chosen left alone."""
    found: Parts = {}
    for region, graph in regions(model).items():
        with context.in_region(region):
            for block in find(graph, context.skip):
                name = f"{region}.{block.name}" if region else block.name
                if name in selection:
                    found[name] = (region, block)
                else:
                    context.skip(block.name, "it is not chosen")
    return found


def least(scores: dict[str, float], sparsity: float) -> list[str]:
    """``round(sparsity · n)`` names with the smallest scores, in graph order; among equal ones the first go."""
    ranked = sorted(scores, key=lambda name: scores[name])[: round(sparsity * len(scores))]
    return [name for name in scores if name in set(ranked)]


def importance(model: fx.GraphModule, parts: Parts, criterion: str, context: Context, seed: int = 0) -> dict[str, float]:
    """Part → score by a criterion of ``prune-layers``."""
    if criterion == "random":
        drawn = criteria.random(len(parts), torch.Generator().manual_seed(seed))
        return dict(zip(parts, drawn.tolist(), strict=True))
    if criterion == "cosine":
        return _cosines(model, parts, context.require_data("the criterion 'cosine'"))
    if criterion == "taylor":
        return _taylor(model, parts, context)
    if criterion == "bn_scale":
        scales = {name: block.norm_scale() for name, (_, block) in parts.items()}
        bare = [name for name, scale in scales.items() if scale is None]
        if not bare:
            return {name: float(criteria.bn_scale(s[1], s[0]).mean()) for name, s in scales.items() if s is not None}
        for name in bare:
            context.note(name, "it has no batch normalisation: l1_norm ranks all parts")
    order = 2 if criterion == "l2_norm" else 1
    return {name: _mean_norm(block.weights(), order) for name, (_, block) in parts.items()}


def _mean_norm(weights: dict[str, Tensor], order: int) -> float:
    """(mean |w|^order)^(1/order) over all weights together."""
    norm = criteria.l1_norm if order == 1 else criteria.l2_norm
    total = sum(float(norm(w.detach().reshape(1, -1), name)) ** order for name, w in weights.items())
    return float((total / max(1, sum(w.numel() for w in weights.values()))) ** (1 / order))


def _taylor(model: fx.GraphModule, parts: Parts, context: Context) -> dict[str, float]:
    found = gradients(model, context.require_data("the criterion 'taylor'"))
    by_tensor = {id(p): found[name] for name, p in model.named_parameters() if name in found}
    scores = {}
    for name, (_, block) in parts.items():
        weights = [w for w in block.weights().values() if id(w) in by_tensor]
        together = (
            torch.cat([w.detach().flatten() for w in weights])
            if weights
            else torch.zeros(1, dtype=torch.float32, device="cpu")
        )
        slopes = (
            torch.cat([by_tensor[id(w)].flatten() for w in weights])
            if weights
            else torch.zeros(1, dtype=torch.float32, device="cpu")
        )
        scores[name] = float(criteria.taylor(together[None], slopes[None], name))
    return scores


def _cosines(model: fx.GraphModule, parts: Parts, data: Iterable[Any]) -> dict[str, float]:
    """1 − the cosine between what enters a part and what leaves it, mean over samples (Men et al. 2024)."""
    names = set(regions(model))
    totals, samples = dict.fromkeys(parts, 0.0), dict.fromkeys(parts, 0)
    seen = False
    for call in batches(data, model):
        seen = True
        inputs = {"": call} if "" in names else {n: c for n, (c, _) in record_calls(model, call, names).items()}
        for region, arguments in inputs.items():
            inside = {block.node: (name, block.source) for name, (where, block) in parts.items() if where == region}
            for name, cosines in _Cosines(regions(model)[region], inside).measure(arguments).items():
                totals[name] += float((1 - cosines).sum())
                samples[name] += cosines.numel()
    if not seen:
        raise DataError("the dataloader is empty: there is nothing to compare blocks on.")
    return {name: totals[name] / max(1, samples[name]) for name in parts}


class _Cosines(Recorder):
    """Runs a graph and compares, sample by sample, what leaves certain nodes with what entered their part."""

    def __init__(self, module: fx.GraphModule, parts: dict[fx.Node, tuple[str, fx.Node]]) -> None:
        super().__init__(module)
        self.parts, self.entering, self.cosines = parts, dict[fx.Node, Tensor](), dict[str, Tensor]()

    def measure(self, call: Arguments) -> dict[str, Tensor]:
        self.record(call)
        return self.cosines

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if any(n is source for _, source in self.parts.values()):
            self.entering[n] = value
        if n in self.parts:
            name, source = self.parts[n]
            before, after = (t.detach().double().flatten(1) for t in (self.entering[source], value))
            self.cosines[name] = torch.nn.functional.cosine_similarity(before, after, dim=1)
        return value
