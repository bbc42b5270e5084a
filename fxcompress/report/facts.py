"""What a report says about one compressed model, as plain data: gathered here, drawn elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxcompress.errors import ConfigError, FxCompressError
from fxcompress.explain import placed
from fxcompress.graph import ops
from fxcompress.graph.cost import Cost, cost, layer_parameters
from fxcompress.graph.coverage import Coverage, coverage
from fxcompress.graph.inputs import Arguments, tensors_in
from fxcompress.graph.island import regions
from fxcompress.graph.recorder import Values
from fxcompress.graph.results import output_snr
from fxcompress.graph.shapes import example_of, tensor_meta
from fxcompress.graph.sparsity import weights_of
from fxcompress.graph.trace import is_traced, trace
from fxcompress.graph.tree import device_of
from fxcompress.ledger import Ledger, Row
from fxcompress.pruning.sensitivity_report import Summary
from fxcompress.quantization.compare import compare_activations, compare_weights
from fxcompress.quantization.quantizer import in_eval_mode
from fxcompress.report.changes import Line, alone, compare, operators
from fxcompress.timing import Timing
from fxcompress.training import METRICS

__all__ = ["Case", "Layer", "Measure", "gather"]


@dataclass(frozen=True)
class Measure:
    """A number before and after; None where it was not measured. ``less`` tells that less of it is better."""

    title: str
    before: float | None
    after: float
    unit: str = ""
    less: bool = True


@dataclass(frozen=True)
class Layer:
    """A layer before and after; None where it is not, or has no such number. SNRs in dB, ``own_snr`` of its error alone."""

    name: str
    before: int | None
    after: int | None
    zeros: float | None
    place: str
    weight_snr: float | None = None
    output_snr: float | None = None
    own_snr: float | None = None


@dataclass(frozen=True)
class Case:
    """One compressed model beside its original, or alone.

    ``lines``    its graph, beside the original's where it is ``compared`` with one
    ``unknown``  what could not be measured, and why
    """

    title: str
    measures: Sequence[Measure]
    runs: Sequence[tuple[str, Ledger]]
    layers: Sequence[Layer]
    lines: Sequence[Line]
    after: Coverage
    unknown: Sequence[str] = field(default_factory=tuple)
    sensitivity: Summary | None = None
    compared: bool = True


def gather(
    title: str,
    model: nn.Module,
    original: nn.Module | None = None,
    *,
    call: Arguments | None = None,
    metrics: Mapping[str, Sequence[float]] | None = None,
    timings: tuple[Timing, Timing] | None = None,
    sensitivity: Summary | None = None,
) -> Case:
    """Everything about ``model``, beside ``original`` where that is given.

    ``call``     one call of both, to compare what their layers compute
    ``metrics``  name → the number before and after
    ``timings``  of one call, before and after
    ``sensitivity``  an analysis of the original
    """
    if not is_traced(model):
        raise ConfigError(f"a report is about a traced model, not a {type(model).__name__}: give what a run returned.")
    assert isinstance(model, fx.GraphModule)
    unknown: list[str] = []
    before = None if original is None else in_eval_mode(original)
    traced = None if before is None else _traced(before, model, call)
    return Case(
        title,
        [*_costs(traced, model), *_timed(timings), *_judged(metrics or {}), *_agreement(before, model, call, unknown)],
        [(entry["plan"], Ledger.from_data(entry["ledger"])) for entry in model.meta.get("history", [])],
        _layers(traced, model, _compared(before, model, call, unknown)),
        alone(operators(model)) if traced is None else compare(operators(traced), operators(model)),
        coverage(model),
        unknown,
        sensitivity,
        original is not None,
    )


def _traced(original: nn.Module, model: fx.GraphModule, call: Arguments | None) -> fx.GraphModule:
    """The original's graph, its shapes those of the inputs that the compressed one was traced with."""
    example = example_of(model)
    inputs = [tensor_meta(node) for node in model.graph.nodes if node.op == "placeholder"]
    fits = call is not None and [t.shape for t in tensors_in(tuple(call))] == [meta.shape for meta in inputs if meta]
    return trace(original, call if fits or example is None else example)


def _costs(before: fx.GraphModule | None, after: fx.GraphModule) -> list[Measure]:
    was, now, share = _first(before, after), cost(after), coverage(after)
    found = [
        Measure("Stored size", was.bytes / 1e6 if was else None, now.bytes / 1e6, "MB"),
        Measure("Parameters", was.parameters / 1e6 if was else None, now.parameters / 1e6, "M"),
    ]
    if now.counted:
        found.append(Measure("MACs", was.macs / 1e6 if was and was.counted else None, now.macs / 1e6, "M"))
    if share.integer_nodes and share.counted:
        found.append(Measure("MACs in integers", None, share.mac_share * 100, "%", less=False))
    return found


def _first(before: fx.GraphModule | None, after: fx.GraphModule) -> Cost | Row | None:
    """The totals of the original: its own, or those that the ledger begins with."""
    if before is not None:
        return cost(before)
    history = after.meta.get("history", [])
    return Ledger.from_data(history[0]["ledger"]).rows[0] if history else None


def _timed(timings: tuple[Timing, Timing] | None) -> list[Measure]:
    if timings is None:
        return []
    return [Measure("Latency (median)", timings[0].median * 1e3, timings[1].median * 1e3, "ms")]


def _judged(metrics: Mapping[str, Sequence[float]]) -> list[Measure]:
    return [
        Measure(name.capitalize().replace("_", " "), before, after, "", METRICS.lower_is_better(name))
        for name, (before, after) in metrics.items()
    ]


def _agreement(before: nn.Module | None, after: nn.Module, call: Arguments | None, unknown: list[str]) -> list[Measure]:
    if before is None:
        return []
    if call is None:
        unknown.append("how far results moved: neither data nor example inputs were given.")
        return []
    with torch.no_grad():
        found = output_snr(_run(before, call), _run(after, call))
    return [Measure("SNR of the results", None, found, "dB", less=False)]


def _run(model: nn.Module, call: Arguments) -> Any:
    return call.to(device_of(model))(model)


Rows = Mapping[str, tuple[float | None, float | None, float | None]]


def _compared(before: nn.Module | None, after: fx.GraphModule, call: Arguments | None, unknown: list[str]) -> Rows:
    """Layer → SNR of its weight, of its result, and of its own error alone."""
    if before is None or call is None:
        return {}
    if after.meta["stage"] == "float":
        return _still_there(before, after, call)
    if _narrowed(before, after, call):
        unknown.append("how far layers moved: channels are gone, and results of other shapes have no SNR.")
        return {}
    try:
        weights = {row.name: row.snr_db for row in compare_weights(before, after, call)}
        values = {row.name: row for row in compare_activations(before, after, [call])}
    except FxCompressError as error:
        unknown.append(f"how far layers moved: {error}")
        return {}
    rows: dict[str, tuple[float | None, float | None, float | None]] = {n: (snr, None, None) for n, snr in weights.items()}
    for name, row in values.items():
        rows[name] = (weights.get(name), row.snr_db, row.local_snr_db)
    return rows


def _narrowed(before: nn.Module, after: fx.GraphModule, call: Arguments) -> bool:
    """Whether layers have fewer channels than they had, so that their results are of another shape."""
    was, now = ({op.name: op.shape for op in operators(model)} for model in (_traced(before, after, call), after))
    return any(name in now and now[name] and was[name] and now[name] != was[name] for name in was)


def _still_there(before: nn.Module, after: fx.GraphModule, call: Arguments) -> Rows:
    """The same for a model in float: results of one shape that both graphs have, read by the same operators."""
    graphs = [found[""] for found in (regions(trace(before, call)), regions(after)) if "" in found]
    if len(graphs) < 2:
        return {}
    readers = [{node.name: {user.name for user in node.users} for node in graph.graph.nodes} for graph in graphs]
    shared = {name for name, users in readers[0].items() if readers[1].get(name) == users}
    values = []
    for graph in graphs:
        kept = Values(graph, shared)
        kept.record(call.to(device_of(graph)))
        values.append({name: value for name, value in kept.values.items() if isinstance(value, torch.Tensor)})
    names = {node.name: ops.owner_name(node) or node.name for node in graphs[1].graph.nodes if node.op.startswith("call")}
    same = [n for n in names if n in values[0] and n in values[1] and values[0][n].shape == values[1][n].shape]
    return {names[name]: (None, output_snr(values[0][name], values[1][name]), None) for name in same}


def _layers(traced: fx.GraphModule | None, after: fx.GraphModule, compared: Rows) -> list[Layer]:
    """A row per layer with parameters, and per further result that was compared, from input to output."""
    was, now = layer_parameters(traced) if traced is not None else {}, layer_parameters(after)
    zeros = {name: 1 - int(t.count_nonzero()) / max(1, t.numel()) for name, t in weights_of(after).items()}
    where = placed(after)
    found = {*was, *now, *compared}
    names = dict.fromkeys(name for name in [*_in_order(traced), *_in_order(after), *was, *now, *compared] if name in found)
    rows = []
    for name in names:
        place = _GONE if name in was and name not in now else where.get(name, "")
        place = place if place in ("", "int8", _GONE) else "float"
        rows.append(Layer(name or "model", was.get(name), now.get(name), zeros.get(name), place, *compared.get(name, ())))
    return rows


def _in_order(model: fx.GraphModule | None) -> Iterator[str]:
    """The names of layers and results, as a run meets them."""
    for region, graph in {} if model is None else regions(model).items():
        for node in graph.graph.nodes:
            call = ops.read(node) if node.op.startswith("call") else None
            weight = call["weight"] if call is not None else None
            owner = weight.name.rpartition(".")[0] if isinstance(weight, ops.Attr) else ops.owner_name(node)
            yield from (f"{region}.{name}" if region and name else name or region for name in (owner, node.name))


_GONE = "gone"
"""Where a layer is that has parameters no more: folded into another one, or removed."""
