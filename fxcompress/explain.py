"""What a pipeline does to every layer of a model, and why it leaves some alone: a dry run without training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from fxcompress.graph import ops
from fxcompress.graph.island import regions
from fxcompress.ledger import Ledger
from fxcompress.manager import PassManager
from fxcompress.observe import Observer, Run
from fxcompress.pass_base import Pass
from fxcompress.passes.train import Train
from fxcompress.pipeline import CompressionPipeline
from fxcompress.plan import Plan, build_pass
from fxcompress.quantization.quantizer import in_eval_mode

__all__ = ["HEADERS", "Explanation", "explain", "placed"]

HEADERS = ("layer", "kind", "parameters", "zeros", "runs in", "left alone")


class Explanation(NamedTuple):
    """One layer: its parameters before and after, its share of zeros, where it runs, and what was said about it."""

    layer: str
    kind: str
    parameters: str
    zeros: str
    runs_in: str
    left_alone: str


def explain(pipeline: CompressionPipeline, data: Iterable[Any] | None, example_inputs: Any = None) -> list[Explanation]:
    """A row per layer with parameters, from a run that trains nothing and calibrates on two batches.

    Without data, ``example_inputs`` serve; what the ranges would be is not part of the explanation.
    """
    assert pipeline.model is not None
    model = in_eval_mode(pipeline.model)
    layers = {name: module for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
    watched = _Watched(layers)
    plan = Plan(tuple(_dry(pipeline.plan)))
    manager = PassManager(plan, verify=False, progress=False, reproducer=False, observers=[watched])
    feed = data if data is not None or example_inputs is None else [example_inputs]
    result = manager.run(model, example_inputs, feed, teacher=pipeline.teacher)
    where, said = placed(result), _said(manager.ledger)
    kept = {name for name, _ in result.named_modules()}
    gone = {name: _FOLDED for name in layers if name not in kept}
    return [_row(name, module, watched, {**gone, **where}.get(name, ""), said) for name, module in layers.items()]


_FOLDED = "folded"
"""Where a layer runs that is no longer there: in the one before it."""


class _Watched(Observer):
    """The parameters of every layer, and its share of zeros, before layers were folded or quantized."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.folding = False
        self.sizes = {name: _size(module) for name, module in layers.items()}
        self.zeros = {name: _zeros(module) for name, module in layers.items()}

    def after(self, run: Run) -> None:
        assert run.step is not None
        self.folding = self.folding or run.step.name == "fold-batchnorm"
        if self.folding or run.model.meta["stage"] != "float":
            return
        for name, module in run.model.named_modules():
            if name in self.sizes:
                self.sizes[name], self.zeros[name] = _size(module), _zeros(module)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _zeros(module: nn.Module) -> float:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.numel():
        return 0.0
    return 1 - int(weight.count_nonzero()) / weight.numel()


def _dry(plan: Plan) -> Iterator[Pass]:
    """The steps that decide: all but lowering, and none after fake-quantizers, whose ranges only training finds."""
    for step in plan:
        if step.name != "lower":
            yield _cheap(step)
        if step.name == "insert-fake-quant":
            return


_CHOOSING = ("criterion", "exclude_layers", "include_layers")


def _cheap(step: Pass) -> Pass:
    """The step without its training, and with two batches of calibration."""
    if isinstance(step, Train) and step.schedule:
        chosen = {key: value for key, value in step.mask.items() if key in _CHOOSING}
        return build_pass("mask-weights", {"sparsity": step.schedule["target_sparsity"], **chosen})
    for name, least in (("epochs", 0), ("num_batches", 2)):
        if hasattr(step, name):
            return dataclasses.replace(step, **{name: least})  # type: ignore[type-var]
    return step


def placed(model: fx.GraphModule) -> dict[str, str]:
    """Layer → ``int8``, or why it stays in float; nothing where the graph was not quantized."""
    found = {}
    for region, module in regions(model).items():
        for node in module.graph.nodes:
            owner = ops.owner_name(node) if ops.is_layer(node) else ""
            if owner and ("integer" in node.meta or "float" in node.meta):
                name = f"{region}.{owner}" if region else owner
                found[name] = "int8" if node.meta.get("integer") else str(node.meta["float"])
    return found


def _said(ledger: Ledger) -> dict[str, list[str]]:
    """Node or layer → the remarks of every pass about it."""
    found: dict[str, list[str]] = {}
    for row in ledger.rows[1:]:
        for remark in row.remarks:
            found.setdefault(remark.node, []).append(f"{row.step}: {remark.reason}")
    return found


def _row(name: str, module: nn.Module, watched: _Watched, where: str, said: Mapping[str, list[str]]) -> Explanation:
    before, after = _size(module), watched.sizes[name]
    reasons = said.get(name, [])
    if where not in ("", "int8", _FOLDED) and not any(where in reason for reason in reasons):
        reasons = [*reasons, where]
    return Explanation(
        name or "model",
        type(module).__name__,
        f"{before:,}" if after == before else f"{before:,} → {after:,}",
        f"{watched.zeros[name]:.1%}",
        where if where in ("int8", _FOLDED) else "float",
        "; ".join(dict.fromkeys(reasons)),
    )
