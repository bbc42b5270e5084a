"""bench: compressed torchvision models, measured beside the originals in one run (also python -m fxcompress.bench)."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tabulate import tabulate

from fxcompress.bench import presets
from fxcompress.bench.measure import COLUMNS, measure, shown
from fxcompress.commands.arguments import reported
from fxcompress.commands.command import Command
from fxcompress.commands.given import page_of, print_json
from fxcompress.commands.values import positive, seconds, seed, text, whole
from fxcompress.html import write
from fxcompress.report import bench_page

__all__ = ["BENCH"]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", type=text, nargs="+", default=["resnet18"], help="torchvision names (resnet18)")
    parser.add_argument(
        "--plans", type=text, nargs="+", default=["fp32", "int8"],
        help=f"presets ({', '.join(presets.PRESETS)}) or files (fp32 int8)",
    )  # fmt: skip
    parser.add_argument("--batch", type=positive, default=1, help="samples per call (1)")
    parser.add_argument("--threads", type=whole(1, 1024), default=1, help="of the CPU (1)")
    parser.add_argument("--shape", type=positive, nargs="+", metavar="N", help="height and width (and frames first)")
    parser.add_argument("--runs", type=positive, default=30, help="timed rounds at most (30)")
    parser.add_argument("--seconds", type=seconds, default=20.0, help="stop timing a model after this long (20)")
    parser.add_argument("--seed", type=seed, default=0, help="of weights and inputs (0)")
    parser.add_argument("--weights", action="store_true", help="download torchvision's default weights")
    reported(parser)
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=None)


def run(options: argparse.Namespace) -> int:
    """Measure every model with every plan.

    Works offline: weights are drawn from a seed (or downloaded with --weights), inputs are seeded noise, batch normalisation
    has lived on it. Latencies are taken in turns with eager fp32, the speed-up is the ratio of medians.
    """
    report = page_of(options)
    torch.set_num_threads(options.threads)
    plans = {name: presets.find(name) for name in options.plans}
    found = [measure(name, plans, options) for name in options.models]
    rows = [row for of_model, _ in found for row in of_model]
    if report is not None:
        cases = [case for _, of_model in found for case in of_model]
        title = f"{' and '.join(options.plans)} on {', '.join(options.models)}"
        measured = COLUMNS, [shown(row) for row in rows]
        write(report, bench_page(title, measured, _quantities(rows), cases, _conditions(options)))
    if options.json:
        print_json({"torch": str(torch.__version__), "threads": options.threads, "rows": rows})
    else:
        print(tabulate([shown(row) for row in rows], COLUMNS, disable_numparse=True, stralign="right"))
    return 0


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


BENCH = Command(
    "bench",
    "measure compressed torchvision models beside the originals",
    "fxcompress bench --models resnet18 mobilenet_v2 --plans fp32 int8 --report page.html",
    run,
    arguments,
)
