"""What may watch a run: the verifier, the promise check, the ledger, graph diffs.

An observer sees the run before and after every pass. The manager knows none of them by name, so it stays a loop.
"""

from __future__ import annotations

import difflib
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxcompress.backends.agreement import first_samples, wanted
from fxcompress.errors import PromiseError, VerificationError
from fxcompress.graph import verify
from fxcompress.graph.cost import cost
from fxcompress.graph.inputs import Arguments, frozen_state, tensors_in
from fxcompress.graph.island import regions
from fxcompress.graph.results import UNSTEADY, largest_difference, output_snr, same_structure
from fxcompress.graph.sparsity import sparsity
from fxcompress.graph.trace import trace
from fxcompress.ledger import Ledger, Row
from fxcompress.pass_base import Context, Pass, Promise

__all__ = ["Diffs", "LedgerKeeper", "Observer", "Promises", "Run", "Verifier"]


@dataclass
class Run:
    """The state of one run that observers share.

    ``model``     the graph as it stands
    ``given``     the model as it came in, which nothing changes
    ``call``      one call of it, or None where neither example inputs nor data were given
    ``original``  results of the model as it came, per region
    ``outputs``   results of the graph as it stands, per region; refreshed by the verifier
    ``previous``  the same before the pass at hand
    """

    model: fx.GraphModule
    context: Context
    given: nn.Module
    call: Arguments | None = None
    original: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    previous: dict[str, Any] = field(default_factory=dict)
    step: Pass | None = None


class Observer:
    """Watches a run. Every method may be left out."""

    def begin(self, run: Run) -> None:
        """The model is traced; nothing has run."""

    def taken_up(self, run: Run) -> None:
        """``run.model`` is now what an earlier run had kept."""

    def before(self, run: Run) -> None:
        """``run.step`` is about to run."""

    def after(self, run: Run) -> None:
        """``run.step`` has run; raise to refuse its result."""

    def end(self, run: Run) -> None:
        """Every pass has run."""


class Verifier(Observer):
    """Holds every region against the graph contract after every pass, and runs it on the example inputs.

    The graph as it was traced is not run where the first pass that changes it keeps its promise towards the model itself;
    where it does not, a run of what is traced once more tells whose fault that is.
    """

    def begin(self, run: Run) -> None:
        graphs = regions(run.model)
        for module in graphs.values():
            verify.check(module)
        self.traced_only = run.call is not None and "" in graphs
        known = {"": _own_result(run)} if self.traced_only else {}
        run.original = run.outputs = self._outputs(run, known)

    def taken_up(self, run: Run) -> None:
        self.traced_only = False
        run.outputs = self._outputs(run, {})

    def before(self, run: Run) -> None:
        assert run.step is not None
        if run.step.promise.kind == "approximate":
            self.end(run)
        graphs = regions(run.model)
        self.snapshots = {name: verify.snapshot(module) for name, module in graphs.items()}
        self.contents = {name: verify.fingerprint(module, through=True) for name, module in graphs.items()}

    def after(self, run: Run) -> None:
        same = {}
        for name, module in regions(run.model).items():
            verify.check(module, self.snapshots.get(name))
            if name in run.outputs and verify.fingerprint(module, through=True) == self.contents.get(name):
                same[name] = run.outputs[name]
        run.previous, run.outputs = run.outputs, self._outputs(run, same)
        if self.traced_only and "" not in same:
            self.traced_only = False
            self._check_first(run)

    def _check_first(self, run: Run) -> None:
        """Find what the traced graph gave before the first change, where that is not near enough to the model's own."""
        assert run.step is not None
        own, now = run.original[""], run.outputs.get("")
        if not _same_numbers(own, now) or not largest_difference(own, now) <= _allowed(run.step.promise, own):
            run.previous = run.previous | {"": _checked(run, trace(run.given, run.call, shared=True))}

    def end(self, run: Run) -> None:
        if self.traced_only:
            self.traced_only = False
            run.outputs = run.outputs | {"": _checked(run, run.model)}

    def _outputs(self, run: Run, known: dict[str, Any]) -> dict[str, Any]:
        """Results on the example inputs, per region; a region that is what it was is not run again."""
        graphs = {name: module for name, module in regions(run.model).items() if name in run.context.inputs}
        return {name: known[name] if name in known else _looked(run, name, graphs[name]) for name in graphs}


def _own_result(run: Run) -> Any:
    """What the model itself gives for the example inputs."""
    assert run.call is not None
    with frozen_state(run.given):
        result = run.call.fresh()(run.given)
    _check_finite(run.given, result)
    return result


def _checked(run: Run, traced: fx.GraphModule) -> Any:
    """The result of a traced graph, held against the model's own.

    Raises VerificationError where the model's code takes another path while it is traced.
    """
    assert run.call is not None
    found = verify.run(traced, run.call)
    if not _same_numbers(run.original[""], found):
        raise VerificationError(
            "the traced graph does not compute what the model computes on the example inputs: its code takes another "
            "path while it is traced. Give example_inputs of the shapes you will use, or make the branch a module."
        )
    return found


def _same_numbers(own: Any, found: Any) -> bool:
    return same_structure(own, found) and output_snr(own, found) >= _SAME


_SAME = 80.0
"""dB to which a traced graph and the model agree."""


def _looked(run: Run, region: str, module: fx.GraphModule) -> Any:
    """The result of a region; what lowering will hold kernels against is kept on the way."""
    call = run.context.inputs[region]
    if module.meta.get("stage") != "qdq" or first_samples(call) is not None:
        return verify.run(module, call)
    look = run.context.looks[region] = verify.look(module, call, wanted(module))
    return look.result


_ROUNDED_WORST = 10.0


class Promises(Observer):
    """Compares results before and after a pass with what it promised. Needs the verifier before it.

    Fake quantization turns an error of the last bit into one of a whole level, which grows from layer to layer: where that
    breaks a promise, it has to hold without the rounding of activations, and the results to agree to 10 dB with it.
    """

    def before(self, run: Run) -> None:
        self.unrounded = self._unrounded(run)

    def after(self, run: Run) -> None:
        assert run.step is not None
        for region, now in run.outputs.items():
            before = run.previous.get(region)
            if before is None:
                continue
            try:
                self._compare(run.step, region, before, now)
            except PromiseError as error:
                if region not in self.unrounded:
                    raise PromiseError(f"{error}{_unsteady(run, region)}") from None
                if not output_snr(before, now) > _ROUNDED_WORST:
                    raise
                self._compare(run.step, region, self.unrounded[region], self._unrounded(run)[region])

    def _unrounded(self, run: Run) -> dict[str, Any]:
        """Results of the regions that round activations, which they do not do meanwhile."""
        assert run.step is not None
        if run.step.promise.kind == "approximate":
            return {}
        found = {}
        for name, module in regions(run.model).items():
            rounding = _roundings(module)
            if not rounding or name not in run.context.inputs:
                continue
            for layer in rounding:
                layer.enabled = False
            try:
                found[name] = verify.run(module, run.context.inputs[name])
            finally:
                for layer in rounding:
                    layer.enabled = True
        return found

    def _compare(self, step: Pass, region: str, before: Any, now: Any) -> None:
        if not same_structure(before, now):
            raise PromiseError(f"{step.name!r} changed the structure of the output of {region or 'the model'}.")
        if step.promise.kind == "approximate":
            return
        gap, allowed = largest_difference(before, now), _allowed(step.promise, before)
        if not gap <= allowed:
            raise PromiseError(
                f"{step.name!r} promised outputs {step.promise.kind} (within {allowed:.3g}) and moved those of "
                f"{region or 'the model'} by {gap:.3g}."
            )


def _allowed(promise: Promise, before: Any) -> float:
    """How far a promise lets results move."""
    finite = (t.detach().nan_to_num(0.0, 0.0, 0.0) for t in tensors_in(before) if t.numel())
    magnitude = max((t.abs().max().item() for t in finite), default=0.0)
    return promise.atol + max(promise.rtol, _rounding(before) if promise.rtol else 0.0) * magnitude


def _unsteady(run: Run, region: str) -> str:
    """What to say where a rounding of the inputs moves the results further than the pass may; else nothing."""
    assert run.step is not None
    nudged = verify.run(regions(run.model)[region], run.context.inputs[region].nudged())
    moved = largest_difference(run.outputs[region], nudged)
    if run.step.promise.kind == "exact" or not moved > _allowed(run.step.promise, run.previous[region]):
        return ""
    return f" One rounding of its inputs moves them by {moved:.3g} already. {UNSTEADY}"


def _roundings(module: fx.GraphModule) -> list[Any]:
    """The layers that round activations."""
    calls = [node for node in module.graph.nodes if node.op == "call_module" and node.args]
    names = {str(node.target) for node in calls if getattr(node.args[0], "op", "") != "get_attr"}
    layers: list[Any] = [module.get_submodule(name) for name in sorted(names)]
    return [layer for layer in layers if hasattr(layer, "look") and getattr(layer, "enabled", False)]


def _rounding(result: Any) -> float:
    """What a few roundings in the coarsest floating type of a result come to, relative to its magnitude."""
    return max((4 * torch.finfo(t.dtype).eps for t in tensors_in(result) if t.is_floating_point()), default=0.0)


class LedgerKeeper(Observer):
    """Writes a row per pass."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.content: list[verify.Content] | None = None
        self.held: list[Any] | None = None

    def begin(self, run: Run) -> None:
        self.started = time.perf_counter()
        self._write(run, "trace")

    def before(self, run: Run) -> None:
        run.context.remarks.clear()
        run.context.figures.clear()
        self.started = time.perf_counter()

    def after(self, run: Run) -> None:
        assert run.step is not None
        self._write(run, run.step.name)

    def _write(self, run: Run, step: str) -> None:
        seconds = time.perf_counter() - self.started
        content = [verify.fingerprint(module) for module in regions(run.model).values()]
        held = [found.held for found in content]
        if held != self.held:
            self.held, self.zeros = held, sparsity(run.model)
        if content != self.content:
            self.content, self.totals = content, cost(run.model)
        totals = self.totals
        self.ledger.add(
            Row(
                step,
                totals.nodes,
                totals.parameters,
                totals.macs,
                totals.bytes,
                self.zeros,
                _run_snr(run),
                seconds,
                tuple(run.context.remarks),
                tuple(run.context.figures),
                totals.counted,
            )
        )


class Diffs(Observer):
    """Keeps, and optionally prints, what each pass changed in the graph; passes that change nothing say nothing."""

    def __init__(self, echo: bool = True) -> None:
        self.echo = echo
        self.texts: dict[str, str] = {}

    def before(self, run: Run) -> None:
        self.was = _listing(run.model)

    def after(self, run: Run) -> None:
        assert run.step is not None
        lines = difflib.unified_diff(self.was, _listing(run.model), "before", "after", lineterm="", n=1)
        text = "\n".join(lines)
        if text:
            self.texts[run.step.name] = text
            if self.echo:
                print(f"--- {run.step.name}\n{text}")


def _listing(model: fx.GraphModule) -> list[str]:
    lines = []
    for region, module in regions(model).items():
        prefix = f"{region}: " if region else ""
        lines += [prefix + (node.format_node() or node.name) for node in module.graph.nodes]
    return lines


def _run_snr(run: Run) -> float | None:
    pairs = [(run.original[name], run.outputs[name]) for name in run.outputs if name in run.original]
    found = [output_snr(before, now) for before, now in pairs]
    return min(found) if found else None


def _check_finite(model: torch.nn.Module, result: Any) -> None:
    """Raise VerificationError naming the first parameter that holds no number, where results do not either."""
    if all(bool(t.isfinite().all()) for t in tensors_in(result) if t.is_floating_point()):
        return
    wrong = [name for name, parameter in model.named_parameters() if not bool(parameter.isfinite().all())]
    if wrong:
        raise VerificationError(
            f"parameter {wrong[0]!r} holds NaN or infinite values, and so does the model's output: there is nothing to "
            "compress. Train or load the model again."
        )
