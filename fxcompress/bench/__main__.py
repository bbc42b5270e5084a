"""Compressed torchvision models, measured beside the originals in one run (also python -m fxcompress.bench).

Works offline: weights are drawn from a seed (or downloaded with --weights), inputs are seeded noise, batch normalisation has
lived on it. Latencies are taken in turns with eager fp32, the speed-up is the ratio of medians.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from fxcompress.bench import interleaved, models, presets
from fxcompress.errors import DataError
from fxcompress.exit_status import exit_status
from fxcompress.graph.cost import cost
from fxcompress.graph.coverage import coverage
from fxcompress.graph.inputs import Arguments
from fxcompress.html import write
from fxcompress.manager import PassManager
from fxcompress.observe import output_snr
from fxcompress.plan import Plan
from fxcompress.report import Case, bench_page, gather, report_path

__all__ = ["main", "measure", "positive"]

_COLUMNS = ("model", "plan", "MB", "parameters", "MMACs", "median ms", "p90 ms", "speed-up", "SNR dB", "int8 MACs")


def measure(name: str, plans: dict[str, Plan], options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Case]]:
    """A row per plan, all plans and the eager model timed in turns; for a report, what it says about each."""
    model = models.build(name, weights=options.weights, seed=options.seed)
    size = tuple(options.shape) if options.shape else None
    batches = [models.example_inputs(name, batch=4, size=size, seed=seed) for seed in range(1, 5)]
    _try(model, batches[0])
    if not options.weights:
        models.live_in(model, batches[:2])
    example = models.example_inputs(name, batch=options.batch, size=size, seed=99)
    data = [batch[0] if len(batch) == 1 else batch for batch in batches]
    built: dict[str, nn.Module] = {}
    for plan_name, plan in plans.items():
        manager = PassManager(plan, progress=options.progress, reproducer=False)
        built[plan_name] = manager.run(model, example, data) if plan.steps else model
    candidates = {plan_name: _caller(built[plan_name], example) for plan_name in built}
    candidates["eager"] = _caller(model, example)
    with tqdm(total=options.runs + 3, desc=name, leave=False, disable=_hidden(options.progress)) as bar:
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


def _try(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """One forward pass, so that a shape the model refuses is said before any work."""
    try:
        with torch.no_grad():
            model(*inputs)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise DataError(f"the model refuses inputs of this shape: {str(error).splitlines()[0]}") from error


def _caller(model: nn.Module, example: tuple[Any, ...]) -> Any:
    return lambda: model(*example)


def _hidden(progress: bool | None) -> bool | None:
    return None if progress is None else not progress


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


def _shown(row: dict[str, Any]) -> list[str]:
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


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="fxcompress bench",
        description=__doc__,
        epilog="example:\n  fxcompress bench --models resnet18 mobilenet_v2 --plans fp32 int8 --report page.html",
        formatter_class=_Formatter,
    )
    made.add_argument("--models", nargs="+", default=["resnet18"], help="torchvision names")
    made.add_argument(
        "--plans", nargs="+", default=["fp32", "int8"], help=f"presets ({', '.join(presets.PRESETS)}) or files"
    )
    made.add_argument("--batch", type=positive, default=1)
    made.add_argument("--threads", type=positive, default=1)
    made.add_argument("--shape", type=positive, nargs="+", metavar="N", help="height and width (and frames first)")
    made.add_argument("--runs", type=positive, default=30, help="timed rounds at most")
    made.add_argument("--seconds", type=float, default=20.0, help="stop timing a model after this long")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--weights", action="store_true", help="download torchvision's default weights")
    made.add_argument("--json", action="store_true", help="print JSON instead of a table")
    made.add_argument("--report", metavar="PAGE.html", help="write one self-contained HTML page that shows all of it")
    made.add_argument("--progress", action=argparse.BooleanOptionalAction, default=None)
    return made


def _quantities(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    plots = {("Latency, median", "ms"): "median ms", ("Stored size", "MB"): "MB", ("SNR of the results", "dB"): "SNR dB"}
    labels = [f"{row['model']}, {row['plan']}" for row in rows]
    found = {
        title: {label: row[key] for label, row in zip(labels, rows, strict=True) if row[key] is not None}
        for title, key in plots.items()
    }
    return {title: values for title, values in found.items() if values}


def _conditions(options: argparse.Namespace) -> str:
    weights = "torchvision's weights" if options.weights else f"weights drawn from seed {options.seed}"
    return f"Latency: medians of at most {options.runs} calls in turns with eager fp32, batch {options.batch}; {weights}. "


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def positive(text: str) -> int:
    """A whole number from 1 on, as an argument."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 for success, 1 where a result was refused, 2 for something the caller can mend."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    report = report_path(options.report)
    plans = {name: presets.find(name) for name in options.plans}
    found = [measure(name, plans, options) for name in options.models]
    rows = [row for of_model, _ in found for row in of_model]
    if report is not None:
        cases = [case for _, of_model in found for case in of_model]
        title = f"{' and '.join(options.plans)} on {', '.join(options.models)}"
        measured = _COLUMNS, [_shown(row) for row in rows]
        write(report, bench_page(title, measured, _quantities(rows), cases, _conditions(options)))
    if options.json:
        print(json.dumps({"torch": str(torch.__version__), "threads": options.threads, "rows": rows}, indent=1))
    else:
        print(tabulate([_shown(row) for row in rows], _COLUMNS, disable_numparse=True, stralign="right"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
