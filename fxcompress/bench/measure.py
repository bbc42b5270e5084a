"""Compressed models measured in turns with the originals: a row per model and plan."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fxcompress.bench import models
from fxcompress.errors import ConfigError, DataError, brief
from fxcompress.graph.cost import cost
from fxcompress.graph.coverage import coverage
from fxcompress.graph.inputs import Arguments
from fxcompress.graph.results import output_snr
from fxcompress.manager import PassManager
from fxcompress.pass_base import hidden
from fxcompress.plan import Plan
from fxcompress.report import Case, gather
from fxcompress.timing import interleaved

__all__ = ["COLUMNS", "measure", "shown"]

COLUMNS = ("model", "plan", "MB", "parameters", "MMACs", "median ms", "p90 ms", "speed-up", "SNR dB", "int8 MACs")


def measure(name: str, plans: dict[str, Plan], options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Case]]:
    """A row per plan, all plans and the eager model timed in turns; for a report, what it says about each."""
    model = models.build(name, weights=options.weights, seed=options.seed)
    size = tuple(options.shape) if options.shape else None
    batches = [_inputs(name, 4, size, seed) for seed in range(1, 5)]
    _try(model, batches[0])
    if not options.weights:
        models.live_in(model, batches[:2])
    example = _inputs(name, options.batch, size, 99)
    data = [batch[0] if len(batch) == 1 else batch for batch in batches]
    built: dict[str, nn.Module] = {}
    for plan_name, plan in plans.items():
        manager = PassManager(plan, progress=options.progress, reproducer=False)
        built[plan_name] = manager.run(model, example, data) if plan.steps else model
    candidates = {plan_name: _caller(built[plan_name], example) for plan_name in built}
    candidates["eager"] = _caller(model, example)
    with tqdm(total=options.runs + 3, desc=name, leave=False, disable=hidden(options.progress)) as bar:
        timings = interleaved(candidates, runs=options.runs, seconds=options.seconds, tick=bar.update)
    with torch.no_grad():
        expected = model(*example)
        rows = [
            _row(
                name, plan_name, built[plan_name], timings, output_snr(expected, built[plan_name](*example)), model, example
            )
            for plan_name in plans
        ]
    if options.report is None:
        return rows, []
    call = Arguments(example, {})
    made = {plan_name: found for plan_name, found in built.items() if found is not model}
    times = {plan_name: (timings["eager"], timings[plan_name]) for plan_name in made}
    return rows, [gather(f"{name}, {n}", found, model, call=call, timings=times[n]) for n, found in made.items()]


def _inputs(name: str, batch: int, size: tuple[int, ...] | None, seed: int) -> tuple[Any, ...]:
    try:
        return models.example_inputs(name, batch=batch, size=size, seed=seed)
    except (RuntimeError, MemoryError, OverflowError) as error:
        raise ConfigError(f"a batch of {batch} inputs of this --shape does not fit into memory: {brief(error)}.") from error


def _try(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """One forward pass, so that a shape the model refuses is said before any work."""
    try:
        with torch.no_grad():
            model(*inputs)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise DataError(f"the model refuses inputs of this shape: {str(error).splitlines()[0]}") from error


def _caller(model: nn.Module, example: tuple[Any, ...]) -> Any:
    return lambda: model(*example)


def _row(
    name: str, plan: str, model: nn.Module, timings: Any, snr: float, original: nn.Module, example: tuple[Any, ...]
) -> dict[str, Any]:
    traced = model if model is not original else PassManager([], reproducer=False).run(original, example)
    totals, timing = cost(traced), timings[plan]
    return {
        "model": name,
        "plan": plan,
        "MB": totals.bytes / 1e6,
        "parameters": totals.parameters,
        "MMACs": totals.macs / 1e6,
        "median ms": timing.median * 1e3,
        "p90 ms": timing.p90 * 1e3,
        "speed-up": timings["eager"].median / timing.median,
        "SNR dB": None if math.isinf(snr) else snr,
        "int8 MACs": coverage(traced).mac_share,
    }


def shown(row: dict[str, Any]) -> list[str]:
    """A row as the table prints it."""
    return [
        row["model"],
        row["plan"],
        f"{row['MB']:.2f}",
        f"{row['parameters']:,}",
        f"{row['MMACs']:,.0f}",
        f"{row['median ms']:.2f}",
        f"{row['p90 ms']:.2f}",
        f"{row['speed-up']:.2f}x",
        "exact" if row["SNR dB"] is None else f"{row['SNR dB']:.1f}",
        f"{row['int8 MACs']:.1%}",
    ]
