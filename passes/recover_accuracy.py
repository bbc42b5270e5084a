"""recover-accuracy: find the layers that quantization hurts most, and mend them as cheaply as possible."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx
from tqdm import tqdm

from fxcompress import backends
from fxcompress.graph import edit, ops
from fxcompress.graph.cost import macs
from fxcompress.graph.module import shared_copy
from fxcompress.graph.tree import evaluating
from fxcompress.options import Count
from fxcompress.pass_base import APPROXIMATE, Context, Pass, Promise, hidden
from fxcompress.passes.adaround import AdaRound
from fxcompress.passes.correct_bias import CorrectBias, in_one_graph
from fxcompress.passes.equalize_layers import EqualizeLayers
from fxcompress.passes.fold_quantization import quantized_copy
from fxcompress.passes.gptq import GPTQ
from fxcompress.passes.lower import become
from fxcompress.quantization.evidence import Evidence
from fxcompress.quantization.fake_quant import fake_quantizers
from fxcompress.quantization.placement import leave_stranded
from fxcompress.quantization.sensitivity import Judge, Metric, SweepFile, Verdict, fingerprint, sweep

__all__ = ["RecoverAccuracy"]

_ENOUGH = 4
"""Samples that tell in which order layers cost most."""


@dataclass(frozen=True)
class RecoverAccuracy(Pass):
    """Apply the cheapest remedies until quantization costs no more than ``max_drop``, and say what was done.

    In this order, each on a trial copy that is kept only where it helps: cross-layer equalization of the chains of layers
    that it serves (then once more with ReLU6 replaced by ReLU), bias correction, rounding by second-order information
    (``gptq``), adaptive rounding of the layers that cost most, and last of all float for as few layers as will do, those
    first that give most for their multiplications. What a layer costs is measured once: the noise of the model with this
    layer alone quantized.

    It is judged on samples that nothing was fitted to: batches that follow the calibrated ones where the data has more, else
    a quarter of the batches, kept apart from what it is mended with. What counts is what the model loses on other samples of
    the kind at most, with ``confidence``, so that few samples are not trusted too far; 0.5 takes their word for it.

    Options: ``max_drop``, in points of ``metric``: ``accuracy`` (batches hold targets), ``agreement`` of the largest output
    with the float model's, ``fidelity`` (100 less the noise's share of the output power, in percent), or ``auto``;
    ``time_budget`` in seconds, after which nothing more is begun; ``num_batches`` of the data to mend with, and as many to
    judge on; ``cache``, a file that keeps the sweep, so that an interrupted one resumes; ``gptq``, whether to round by
    second-order information; ``adaround_layers``, how many of the worst to round adaptively (0: none), and
    ``adaround_iterations``; ``allow_float``, whether layers may go back to float.
    """

    name: ClassVar[str] = "recover-accuracy"
    takes: ClassVar[tuple[str, ...]] = ("observed",)
    needs: ClassVar[tuple[str, ...]] = ("data",)
    promise: ClassVar[Promise] = APPROXIMATE

    max_drop: Annotated[float, Field(ge=0.0)] = 1.0
    metric: Metric = "auto"
    time_budget: Annotated[float, Field(gt=0.0)] | None = None
    num_batches: Count = 8
    confidence: Annotated[float, Field(ge=0.5, lt=1.0)] = 0.95
    cache: str | None = None
    gptq: bool = True
    adaround_layers: Annotated[int, Field(ge=0)] = 4
    adaround_iterations: Count = 500
    allow_float: bool = True

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        if in_one_graph(model, context):
            evidence = Evidence.of(context.require_data(self.name), model, self.num_batches)
            with evaluating(model), torch.no_grad():
                _Recovery(self, model, context, evidence).run()


class _Recovery:
    """One run: the model as it stands, how far it is from float, and how long that took."""

    def __init__(self, options: RecoverAccuracy, model: fx.GraphModule, context: Context, evidence: Evidence) -> None:
        self.options, self.model, self.context, self.evidence = options, model, context, evidence
        self.judge = Judge(evidence.judging, evidence.targets, options.metric, options.confidence)
        self.started = time.monotonic()
        self.biases: dict[str, Tensor | None] = {}

    def run(self) -> None:
        self.judge.listen(self.model)
        self.verdict = self.judge.drop(quantized_copy(self.model))
        on = f"on {self.judge.samples} samples {self.evidence.where}"
        self.context.note("", f"quantization costs {self._points(on)}; {self.options.max_drop:g} may be lost")
        if self._goes_on("equalize-layers"):
            self._try("equalize-layers", self._equalize)
        replacing = "equalize-layers, ReLU6 replaced"
        if _has_relu6(self.model) and self._goes_on(replacing):
            self._try(replacing, lambda trial: self._equalize(trial, "replace"))
        if self._goes_on("correct-bias"):
            self._try("correct-bias", self._correct_bias)
        if self.options.gptq and self._goes_on("gptq"):
            self._try("gptq", self._second_order)
        costs: dict[str, float] = {}
        if (self.options.adaround_layers or self.options.allow_float) and self._goes_on("the sensitivity sweep"):
            costs = self._costs()
        if self.options.adaround_layers and self._goes_on("adaround"):
            chosen = sorted(costs, key=lambda name: -costs[name])[: self.options.adaround_layers]
            self._try("adaround", lambda trial: self._adaround(trial, chosen))
        if self.options.allow_float and self._goes_on("float"):
            self._back_to_float(costs)
        left = "" if self._kept(self.verdict) else f", more than the {self.options.max_drop:g} asked for"
        self.context.note("", f"quantization now costs {self._points('there')}{left}")

    def _points(self, on: str) -> str:
        found, confidence = self.verdict, self.options.confidence
        on_others = f"at most {found.at_most:.3g} on others with {100 * confidence:g} % confidence"
        return f"{found.drop:.3g} points of {self.judge.metric} {on}, {on_others}"

    def _kept(self, verdict: Verdict) -> bool:
        return verdict.at_most <= self.options.max_drop

    def _out_of_time(self) -> bool:
        budget = self.options.time_budget
        return budget is not None and time.monotonic() - self.started > budget

    def _goes_on(self, what: str) -> bool:
        if self._kept(self.verdict):
            return False
        if self._out_of_time():
            self.context.note("", f"the time budget of {self.options.time_budget:g} s is spent: {what} was not tried")
            return False
        return True

    def _try(self, name: str, remedy: Callable[[fx.GraphModule], str | None]) -> bool:
        """Apply a remedy to a copy, and keep it where there is less noise; returns whether it was kept."""
        trial, saved = shared_copy(self.model), self.biases
        reason = remedy(trial)
        if reason is not None:
            self.context.note("", f"{name} was not tried: {reason}")
            return False
        edit.finish(trial)
        found = self.judge.drop(quantized_copy(trial))
        kept = found.noise < self.verdict.noise
        undone = "" if kept else ", no better: undone"
        before, after = f"{self.verdict.at_most:.3g} points of {self.judge.metric}", f"{found.at_most:.3g}"
        self.context.note("", f"{name}: at most {before} became at most {after}{undone}")
        if kept:
            self.verdict = found
            become(self.model, trial)
        else:
            self.biases = saved
        return kept

    def _equalize(self, trial: fx.GraphModule, relu6: Literal["bound", "replace"] = "bound") -> str | None:
        if fake_quantizers(trial):
            return "its scales were trained"
        EqualizeLayers(relu6=relu6, num_batches=len(self.evidence.mending)).run(trial, self._quiet())
        return None

    def _correct_bias(self, trial: fx.GraphModule) -> str | None:
        before = {name: _tensor(trial, call["bias"]) for name, call in self._layers(trial).items()}
        CorrectBias(num_batches=len(self.evidence.mending)).run_model(trial, self._quiet())
        self.biases = before
        return None

    def _adaround(self, trial: fx.GraphModule, chosen: list[str]) -> str | None:
        layers = self._layers(trial)
        known = tuple(owner for name in chosen if (owner := ops.owner_name(layers[name].node)))
        if not known:
            return "the costliest layers have no names"
        iterations = self.options.adaround_iterations
        rounding = AdaRound(iterations=iterations, num_batches=len(self.evidence.mending), include_layers=known)
        self._round(trial, rounding)
        return None

    def _second_order(self, trial: fx.GraphModule) -> None:
        self._round(trial, GPTQ(num_batches=len(self.evidence.mending)))

    def _round(self, trial: fx.GraphModule, rounding: Pass) -> None:
        """Round weights anew; biases that were corrected are corrected for the new weights."""
        with self._biases_anew(trial):
            rounding.run_model(trial, self._quiet(self.context.progress))

    @contextmanager
    def _biases_anew(self, module: fx.GraphModule) -> Iterator[None]:
        """Give ``module`` the biases it had before they were corrected, and correct them after what is done inside."""
        self._restore_biases(module)
        yield
        if self.biases:
            CorrectBias(num_batches=len(self.evidence.mending)).run_model(module, self._quiet())

    def _quiet(self, progress: bool | None = False) -> Context:
        """A context whose remarks nobody reads: what a remedy leaves alone is not what this pass left alone."""
        context = self.context
        return Context(inputs=context.inputs, data=self.evidence.mending, seed=context.seed, progress=progress)

    def _costs(self) -> dict[str, float]:
        """The noise of the model where one layer alone is quantized, by layer."""
        module, layers = self.model, self._layers(self.model)
        file = SweepFile(self.options.cache, fingerprint(module, self.judge.calls, module.meta["quantization"]))
        if file.resumed:
            self.context.note("", f"{file.resumed} of {len(layers)} layers were measured before, in {self.options.cache!r}")
        bar = tqdm(layers, "sensitivity", disable=hidden(self.context.progress), leave=False, unit="layer")

        def noise_of(name: str) -> float:
            return self.judge.noise(quantized_copy(module, lambda trial: self._isolate(trial, name)), _ENOUGH)

        costs = sweep(bar, noise_of, file, self._out_of_time)
        if len(costs) < len(layers):
            self.context.note("", f"the time budget is spent: {len(layers) - len(costs)} layers were not measured")
        shares = {ops.owner_name(layers[name].node) or name: 100 * cost for name, cost in costs.items()}
        self.context.measured("Noise of the results with one layer alone quantized", "%", shares)
        return costs

    def _back_to_float(self, costs: dict[str, float]) -> None:
        """Put back as few layers as will do; where time runs out first, what left the least noise."""
        weighed = {node.name: macs(node) for node in self.model.graph.nodes if node.name in costs}
        ranked = sorted(weighed, key=lambda name: -costs[name] / max(weighed[name], 1))
        tried = {0: self.verdict}
        bar = tqdm(desc="float", disable=hidden(self.context.progress), leave=False, unit="trial")

        def verdict_on(names: Sequence[str]) -> Verdict:
            bar.update()
            return self.judge.drop(quantized_copy(self.model, lambda trial: self._put_back(trial, names)))

        def suffices(count: int) -> bool:
            tried[count] = verdict_on(ranked[:count])
            return self._kept(tried[count])

        found = _fewest(len(ranked), suffices, lambda: self._goes_on("another number of layers in float"))
        number = found or min(tried, key=lambda count: tried[count].noise)
        chosen, self.verdict = ranked[:number], tried[number]
        for name in sorted(ranked[: found - 1] if found else (), key=lambda name: -weighed[name]):
            without = [other for other in chosen if other != name]
            if self._out_of_time() or not self._kept(verdict := verdict_on(without)):
                continue
            chosen, self.verdict = without, verdict  # the last one, without which it did not do, made up for it
        bar.close()
        place = {name: number for number, name in enumerate(ranked)}
        nodes = self._put_back(self.model, chosen)
        for node in sorted(nodes, key=lambda node: place.get(node.name, len(ranked))):
            alone = f"{100 * costs[node.name]:.3g} % noise" if node.name in costs else "it shares a weight"
            self.context.note(ops.owner_name(node) or node, f"back to float: quantized alone, {alone}")

    def _layers(self, module: fx.GraphModule) -> dict[str, ops.Call]:
        """Layers that will be quantized, by node name."""
        rules = backends.find(module.meta["quantization"]["backend"]).rules
        found = {}
        for node in module.graph.nodes:
            call = ops.read(node) if node.meta.get("integer") else None
            if call is not None and rules[call.kind].weighted:
                found[node.name] = call
        return found

    def _demote(self, module: fx.GraphModule, names: Sequence[str]) -> list[fx.Node]:
        """Leave layers in float, and whatever else reads their weights."""
        layers = self._layers(module)
        weights = {id(edit.get_tensor(module, layers[name]["weight"].name)) for name in names}
        found = [c for c in layers.values() if id(edit.get_tensor(module, c["weight"].name)) in weights]
        for call in found:
            call.node.meta |= {"integer": False, "float": "quantizing it costs too much"}
        leave_stranded(module, backends.find(module.meta["quantization"]["backend"]))
        return [call.node for call in found]

    def _put_back(self, module: fx.GraphModule, names: Sequence[str]) -> list[fx.Node]:
        """Leave layers in float; biases that were corrected are corrected for what is left. Returns the layers' nodes."""
        if not names:
            return []
        with self._biases_anew(module):
            return self._demote(module, names)

    def _isolate(self, module: fx.GraphModule, name: str) -> None:
        """Leave every layer in float but one (and those that share its weight)."""
        layers = self._layers(module)
        weight = edit.get_tensor(module, layers[name]["weight"].name)
        others = [n for n, call in layers.items() if edit.get_tensor(module, call["weight"].name) is not weight]
        self._demote(module, others)
        self._restore_biases(module)

    def _restore_biases(self, module: fx.GraphModule) -> None:
        for node in module.graph.nodes:
            call = ops.read(node) if node.name in self.biases else None
            now = _tensor(module, call["bias"]) if call is not None else None
            if call is not None and now is not None:
                before = self.biases[node.name]
                edit.set_tensor(module, call["bias"].name, torch.zeros_like(now) if before is None else before)


def _tensor(module: fx.GraphModule, value: ops.Attr | None) -> Tensor | None:
    return edit.get_tensor(module, value.name) if value is not None else None


def _fewest(most: int, suffices: Callable[[int], bool], goes_on: Callable[[], bool]) -> int:
    """The least number that suffices, if more suffice where fewer do: 1, 2, 4, … and then by halves. 0: none was found."""
    short = enough = 0
    while short < (enough - 1 if enough else most) and goes_on():
        number = (short + enough) // 2 if enough else min(max(2 * short, 1), most)
        if suffices(number):
            enough = number
        else:
            short = number
    return enough


def _has_relu6(module: fx.GraphModule) -> bool:
    calls = (ops.read(node) for node in module.graph.nodes if node.op.startswith("call"))
    return any(call is not None and "relu6" in (call.kind, call["activation"]) for call in calls)
