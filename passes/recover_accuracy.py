"""recover-accuracy: find the layers that quantization hurts most, and mend them as cheaply as possible."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx
from tqdm import tqdm

from fxcompress import backends
from fxcompress.data import split_batch
from fxcompress.graph import edit, ops
from fxcompress.graph.module import shared_copy
from fxcompress.pass_base import APPROXIMATE, Context, Pass, Promise, Remark, hidden
from fxcompress.passes.adaround import AdaRound
from fxcompress.passes.correct_bias import CorrectBias, walkable
from fxcompress.passes.equalize_layers import EqualizeLayers
from fxcompress.passes.fold_quantization import FoldQuantization
from fxcompress.passes.lower import become
from fxcompress.quantization.fake_quant import fake_quantizers
from fxcompress.quantization.lockstep import evaluating
from fxcompress.quantization.observer import observers
from fxcompress.quantization.placement import operands
from fxcompress.quantization.sensitivity import Judge, Metric, SweepFile, fingerprint, sweep

__all__ = ["RecoverAccuracy"]


@dataclass(frozen=True)
class RecoverAccuracy(Pass):
    """Apply the cheapest remedies until quantization costs no more than ``max_drop``, and say what was done.

    In this order, each on a trial copy that is kept only where it helps: cross-layer equalization (ranges are then observed
    again; where replacing ReLU6 harms, once more around it), bias correction, adaptive rounding of the layers that cost
    most, and last of all float for one layer after the other, costliest first. What a layer costs is measured once: the
    noise of the quantized model less that with the layer in float.

    Options: ``max_drop``, in points of ``metric``: ``accuracy`` (batches hold targets), ``agreement`` of the largest output
    with the float model's, ``fidelity`` (100 less the noise's share of the output power, in percent), or ``auto``;
    ``time_budget`` in seconds, after which nothing more is begun; ``num_batches`` of the data to judge and mend with;
    ``cache``, a file that keeps the sweep, so that an interrupted one resumes; ``adaround_layers``, how many of the worst
    to round adaptively (0: none), and ``adaround_iterations``; ``allow_float``, whether layers may go back to float.
    """

    name: ClassVar[str] = "recover-accuracy"
    takes: ClassVar[tuple[str, ...]] = ("observed",)
    needs: ClassVar[tuple[str, ...]] = ("data",)
    promise: ClassVar[Promise] = APPROXIMATE

    max_drop: Annotated[float, Field(ge=0.0)] = 1.0
    metric: Metric = "auto"
    time_budget: Annotated[float, Field(gt=0.0)] | None = None
    num_batches: Annotated[int, Field(ge=1)] = 8
    cache: str | None = None
    adaround_layers: Annotated[int, Field(ge=0)] = 4
    adaround_iterations: Annotated[int, Field(ge=1)] = 500
    allow_float: bool = True

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        calls = walkable(self.name, model, context, self.num_batches)
        if calls:
            pairs = zip(calls, context.require_data(self.name), strict=False)
            targets = [split_batch(batch)[1] for _, batch in pairs]
            with evaluating(model):
                _Recovery(self, model, context, Judge(calls, targets, self.metric)).run()


class _Recovery:
    """One run: the model as it stands, how far it is from float, and how long that took."""

    def __init__(self, options: RecoverAccuracy, model: fx.GraphModule, context: Context, judge: Judge) -> None:
        self.options, self.model, self.context, self.judge = options, model, context, judge
        self.started = time.monotonic()
        self.heard: list[Remark] = []
        self.weights: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor | None] = {}

    def run(self) -> None:
        self.judge.listen(self.model)
        self.drop, self.noise = self.judge.drop(_quantized(self.model))
        self.context.note("", f"quantization costs {self._points(self.drop)}; {self.options.max_drop:g} may be lost")
        if self._goes_on("equalize-layers") and not self._try("equalize-layers", self._equalize):
            kept = "equalize-layers, ReLU6 kept"
            if any("ReLU6" in remark.reason for remark in self.heard) and self._goes_on(kept):
                self._try(kept, lambda trial: self._equalize(trial, "keep"))
        if self._goes_on("correct-bias"):
            self._try("correct-bias", self._correct_bias)
        ranked: list[str] = []
        if self.options.adaround_layers and self._goes_on("the sensitivity sweep"):
            ranked = self._rank()
        if self.options.adaround_layers and self._goes_on("adaround"):
            chosen = ranked[: self.options.adaround_layers]
            self._try("adaround", lambda trial: self._round(trial, chosen))
        if self.options.allow_float and self._goes_on("float"):
            self._back_to_float(ranked or self._rank())
        left = "" if self.drop <= self.options.max_drop else f", more than the {self.options.max_drop:g} asked for"
        self.context.note("", f"quantization now costs {self._points(self.drop)}{left}")

    def _points(self, drop: float) -> str:
        return f"{drop:.3g} points of {self.judge.metric}"

    def _out_of_time(self) -> bool:
        budget = self.options.time_budget
        return budget is not None and time.monotonic() - self.started > budget

    def _goes_on(self, what: str) -> bool:
        if self.drop <= self.options.max_drop:
            return False
        if self._out_of_time():
            self.context.note("", f"the time budget of {self.options.time_budget:g} s is spent: {what} was not tried")
            return False
        return True

    def _try(self, name: str, remedy: Callable[[fx.GraphModule], str | None]) -> bool:
        """Apply a remedy to a copy, and keep it where there is less noise; returns whether it was kept."""
        trial, before = shared_copy(self.model), (self.weights, self.biases)
        reason = remedy(trial)
        if reason is not None:
            self.context.note("", f"{name} was not tried: {reason}")
            return False
        edit.finish(trial)
        drop, noise = self.judge.drop(_quantized(trial))
        kept = noise < self.noise
        verdict = "" if kept else ", no better: undone"
        self.context.note("", f"{name}: {self._points(self.drop)} became {drop:.3g}{verdict}")
        if kept:
            self.drop, self.noise = drop, noise
            become(self.model, trial)
        else:
            self.weights, self.biases = before
        return kept

    def _equalize(self, trial: fx.GraphModule, relu6: Literal["replace", "keep"] = "replace") -> str | None:
        if fake_quantizers(trial):
            return "its scales were trained"
        quiet = self._quiet()
        EqualizeLayers(relu6=relu6).run(trial, quiet)
        self.heard = quiet.remarks
        watching = observers(trial).values()
        for observer in watching:
            observer.calibrator.reset()
            observer.enabled = True
        for call in self.judge.calls:
            call(trial)
        for observer in watching:
            observer.enabled = False
        return None

    def _correct_bias(self, trial: fx.GraphModule) -> str | None:
        before = {name: _tensor(trial, call["bias"]) for name, call in self._layers(trial).items()}
        CorrectBias(num_batches=self.options.num_batches).run_model(trial, self._quiet())
        self.biases = before
        return None

    def _round(self, trial: fx.GraphModule, chosen: list[str]) -> str | None:
        layers = self._layers(trial)
        known = tuple(owner for name in chosen if (owner := ops.owner_name(layers[name].node)))
        if not known:
            return "the costliest layers have no names"
        self.weights = {name: edit.get_tensor(trial, layers[name]["weight"].name) for name in chosen}
        rounding = AdaRound(
            iterations=self.options.adaround_iterations, num_batches=self.options.num_batches, include_layers=known
        )
        rounding.run_model(trial, self._quiet(self.context.progress))
        return None

    def _quiet(self, progress: bool | None = False) -> Context:
        """A context whose remarks nobody reads: what a remedy leaves alone is not what this pass left alone."""
        context = self.context
        return Context(inputs=context.inputs, data=context.data, seed=context.seed, progress=progress)

    def _rank(self) -> list[str]:
        """Quantized layers, costliest first."""
        module, layers = self.model, list(self._layers(self.model))
        file = SweepFile(self.options.cache, fingerprint(module, self.judge.calls, module.meta["quantization"]))
        if file.resumed:
            self.context.note("", f"{file.resumed} of {len(layers)} layers were measured before, in {self.options.cache!r}")
        bar = tqdm(layers, "sensitivity", disable=hidden(self.context.progress), leave=False, unit="layer")

        def noise_without(name: str) -> float:
            return self.judge.drop(_quantized(module, lambda trial: self._put_back(trial, name)))[1]

        costs = sweep(bar, noise_without, self.noise, file, self._out_of_time)
        if len(costs) < len(layers):
            self.context.note("", f"the time budget is spent: {len(layers) - len(costs)} layers were not measured")
        return sorted(costs, key=lambda name: -costs[name])

    def _back_to_float(self, ranked: list[str]) -> None:
        for name in ranked:
            if not self._goes_on(f"float for {name!r}"):
                return
            if name not in self._layers(self.model):  # it went back with another that reads its weight
                continue
            before = self.drop
            node = self._put_back(self.model, name)
            self.drop, self.noise = self.judge.drop(_quantized(self.model))
            self.context.note(node, f"back to float: {self._points(before)} became {self.drop:.3g}")

    def _layers(self, module: fx.GraphModule) -> dict[str, ops.Call]:
        """Layers that will be quantized, by node name."""
        rules = backends.find(module.meta["quantization"]["backend"]).rules
        found = {}
        for node in module.graph.nodes:
            call = ops.read(node) if node.meta.get("integer") else None
            if call is not None and rules[call.kind].weighted:
                found[node.name] = call
        return found

    def _put_back(self, module: fx.GraphModule, name: str) -> fx.Node:
        """Leave a layer in float, with the weight it had; biases that were corrected are corrected for what is left.

        Whatever else reads the weight goes back with it.
        """
        layers = self._layers(module)
        call = layers[name]
        weight = edit.get_tensor(module, call["weight"].name)
        for other in layers.values():
            if edit.get_tensor(module, other["weight"].name) is weight:
                other.node.meta |= {"integer": False, "float": "quantizing it costs too much"}
        if name in self.weights:
            edit.set_tensor(module, call["weight"].name, self.weights[name])
        _follow(module)
        if self.biases:
            self._restore_biases(module)
            CorrectBias(num_batches=self.options.num_batches).run_model(module, self._quiet())
        return call.node

    def _restore_biases(self, module: fx.GraphModule) -> None:
        for node in module.graph.nodes:
            call = ops.read(node) if node.name in self.biases else None
            now = _tensor(module, call["bias"]) if call is not None else None
            if call is not None and now is not None:
                before = self.biases[node.name]
                edit.set_tensor(module, call["bias"].name, torch.zeros_like(now) if before is None else before)


def _follow(module: fx.GraphModule) -> None:
    """Leave in float what would run in integers between float operators, as placement does.

    What hands its input's range on to integer operators, as pooling does, stays: nothing else observes what these read.
    """
    rules = backends.find(module.meta["quantization"]["backend"]).rules

    def keeps_range(node: fx.Node) -> bool:
        return rules[ops.kind(node)].output == "input"

    def hands_on(node: fx.Node) -> bool:
        """Whether an integer operator reads the range that ``node`` has of its input."""
        readers = [user for user in node.users if user.meta.get("integer")] if keeps_range(node) else []
        return any(not keeps_range(reader) or hands_on(reader) for reader in readers)

    for node in module.graph.nodes:
        call = ops.read(node) if node.meta.get("integer") else None
        if call is None or rules[call.kind].weighted:
            continue
        observed = {s for s in operands(call, rules[call.kind]) if s.meta.get("observer")}
        needed = [s for s in operands(call, rules[call.kind]) if s not in observed]
        needed += [] if hands_on(node) else [s.all_input_nodes[0] for s in observed]
        alone = [s for s in needed if not s.meta.get("integer") and s.op != "placeholder"]
        if alone:
            node.meta |= {"integer": False, "float": f"its input {alone[0].name!r} is in float"}


def _tensor(module: fx.GraphModule, value: ops.Attr | None) -> Tensor | None:
    return edit.get_tensor(module, value.name) if value is not None else None


def _quantized(module: fx.GraphModule, change: Callable[[fx.GraphModule], Any] = lambda trial: None) -> fx.GraphModule:
    """The quantize/dequantize graph of an observed one, after a change."""
    trial = shared_copy(module)
    change(trial)
    FoldQuantization().run(trial, Context())
    edit.finish(trial)
    return trial
