"""The whole page: of one compressed model, or of several measured beside one another."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import torch
from torch import nn

from fxcompress.graph.inputs import Arguments
from fxcompress.html import bars, page, table, tag, write
from fxcompress.html.markup import Child
from fxcompress.manager import example_call
from fxcompress.pruning.sensitivity_analyzer import SensitivityAnalyzer
from fxcompress.pruning.sensitivity_report import Summary
from fxcompress.quantization.quantizer import in_eval_mode
from fxcompress.report.facts import Case, gather
from fxcompress.report.sections import case_sections
from fxcompress.timing import Timing, interleaved
from fxcompress.training import evaluate

__all__ = ["bench_page", "write_report"]


def write_report(
    path: str | os.PathLike[str],
    model: nn.Module,
    original: nn.Module | None = None,
    *,
    data: Iterable[Any] | None = None,
    example_inputs: Any = None,
    validation: Iterable[Any] | None = None,
    metrics: Mapping[str, Sequence[float]] | None = None,
    sensitivity: SensitivityAnalyzer | Summary | None = None,
    latency: bool = True,
    title: str | None = None,
) -> Path:
    """One self-contained HTML page about a compressed model: no network, no script, nothing beside it.

    It shows the ledger; sizes, latency and metrics before and after; signal to noise, zeros and parameters by layer; the
    graph before and after with what changed in colour; what passes measured of layers, and curves of sensitivity; what was
    left alone and why; the plan.

    ``model``           what a run of passes, a quantizer, a pruner or :func:`fxcompress.load` returned
    ``original``        the model it was made from; without it there is nothing to compare with, and the page says less
    ``data``            batches, or ``example_inputs``: one call, on which layers are compared and latency is measured
    ``validation``      labelled batches: accuracy before and after
    ``metrics``         what was measured already: name → (before, after)
    ``sensitivity``     an analysis whose curves go on the page: an analyzer's, or one that :func:`read_analysis` read
    ``latency``         whether to time both models, in turns, for a few seconds
    """
    call = example_call(example_inputs, data, model)
    measured = {**_evaluated(original, model, validation), **(metrics or {})}
    timings = _timed(original, model, call) if latency and original is not None and call is not None else None
    case = gather(
        title or type(original or model).__name__,
        model,
        original,
        call=call,
        metrics=measured,
        timings=timings,
        sensitivity=sensitivity.summary() if isinstance(sensitivity, SensitivityAnalyzer) else sensitivity,
    )
    return write(path, case_page(case, _conditions(call, timings)))


def _evaluated(original: nn.Module | None, model: nn.Module, validation: Iterable[Any] | None) -> dict[str, list[float]]:
    if validation is None or original is None:
        return {}
    batches = list(validation) if iter(validation) is validation else validation
    pairs = evaluate(original, batches), evaluate(model, batches)
    return {name: [pairs[0][name], pairs[1][name]] for name in pairs[0]}


def _timed(original: nn.Module, model: nn.Module, call: Arguments) -> tuple[Timing, Timing]:
    before = in_eval_mode(original)
    turns = {"before": lambda: call(before), "after": lambda: call(model)}
    found = interleaved(turns, runs=20, warmup=2, seconds=5.0)
    return found["before"], found["after"]


def _conditions(call: Arguments | None, timings: tuple[Timing, Timing] | None) -> str:
    if call is None or timings is None:
        return ""
    return f"Latency: both models in turns, median of {timings[0].runs} calls on {_inputs(call)}. "


def _inputs(call: Arguments) -> str:
    shapes = [
        "×".join(map(str, t.shape)) for t in torch.utils._pytree.tree_leaves(tuple(call)) if isinstance(t, torch.Tensor)
    ]
    return f"inputs of {', '.join(shapes[:3])}{'…' if len(shapes) > 3 else ''}"


def case_page(case: Case, conditions: str = "") -> str:
    """The page of one compressed model."""
    title = f"{case.title}: before and after" if case.compared else case.title
    return page(title, case_sections(case, "part"), _footer(conditions))


def bench_page(
    title: str,
    measured: tuple[Sequence[str], Sequence[Sequence[str]]],
    quantities: Mapping[tuple[str, str], Mapping[str, float]],
    cases: Sequence[Case],
    conditions: str,
) -> str:
    """The page of several compressed models: a table of all, what it says as bars, and then each of them.

    ``measured`` are a header and rows; ``quantities`` title and unit of a plot → label → value.
    """
    listing = table("Measured in one run, in turns", *measured, left=(0, 1))
    plots = [bars(what, _extremes(values, unit), unit, values) for (what, unit), values in quantities.items()]
    folded = [
        tag(
            "details",
            tag("summary", case.title),
            case_sections(case, f"case-{n}", level=3),
            class_="case",
            open="" if len(cases) == 1 else None,
        )
        for n, case in enumerate(cases)
    ]
    one_by_one: Child = [tag("h2", "One by one"), *folded] if folded else None
    return page(
        title, tag("h2", "Side by side"), listing, tag("div", plots, class_="plots"), one_by_one, _footer(conditions)
    )


def _extremes(values: Mapping[str, float], unit: str) -> str:
    least, most = min(values, key=lambda label: values[label]), max(values, key=lambda label: values[label])
    return f"Least: {least}, {values[least]:.4g} {unit}. Most: {most}, {values[most]:.4g} {unit}."


def _footer(conditions: str) -> Element:
    from fxcompress import __version__

    machine = f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return tag("footer", f"{conditions}Written by fxcompress {__version__} on {when}; {machine}.")
