"""sensitivity: what pruning every part of a model costs."""

from __future__ import annotations

import argparse

from tabulate import tabulate

from fxcompress.commands.arguments import modelled
from fxcompress.commands.command import Command
from fxcompress.commands.given import inline, model_of, print_json
from fxcompress.commands.values import number, text, whole
from fxcompress.distributed import is_main
from fxcompress.files import target_file
from fxcompress.models import build_data
from fxcompress.pruning import SensitivityAnalyzer
from fxcompress.pruning.sensitivity_report import ENDINGS

__all__ = ["SENSITIVITY"]


def arguments(parser: argparse.ArgumentParser) -> None:
    modelled(parser, required=True)
    parser.add_argument("--data", type=text, required=True, help="labelled data: a data set's name, or a mapping")
    parser.add_argument("--type", type=text, default="structured", help="structured, unstructured or semi_structured")
    parser.add_argument("--metric", type=text, default="accuracy")
    parser.add_argument("--range", type=number, nargs=2, default=[0.1, 0.9], metavar=("LOW", "HIGH"))
    parser.add_argument("--steps", type=whole(1, 1000), default=9, help="sparsities tried")
    parser.add_argument("--target", type=number, help="recommend the largest sparsities that keep this metric")
    parser.add_argument(
        "--cache", type=text, metavar="FILE", help="keep measurements there; an interrupted analysis goes on"
    )
    parser.add_argument("--output", "-o", type=text, metavar="FILE", help="write the report: .html, .md, .json or .csv")


def run(options: argparse.Namespace) -> int:
    """Measure, recommend, report."""
    output = None if options.output is None else target_file(options.output, "--output", ENDINGS)
    cache = None if options.cache is None else target_file(options.cache, "--cache", made=True)
    progress = False if options.json else None
    analyzer = SensitivityAnalyzer(
        options.range, options.steps, options.metric, options.type, cache=cache, progress=progress
    )
    analyzer.analyze(model_of(options), build_data(inline(options.data), ("--data",)))
    try:
        shares = analyzer.get_optimal_sparsity(options.target) if options.target is not None else {}
    finally:  # a target that cannot be had takes nothing from what was measured
        if output is not None and is_main():
            analyzer.export_report(output)
    if is_main():
        _show(analyzer, shares, options)
    return 0


def _show(analyzer: SensitivityAnalyzer, shares: dict[str, float], options: argparse.Namespace) -> None:
    scores = analyzer.get_sensitivity_scores()
    if options.json:
        curves = {name: {str(step): value for step, value in curve.items()} for name, curve in analyzer.curves.items()}
        print_json({"baseline": analyzer.baseline, "scores": scores, "curves": curves, "recommended": shares})
        return
    steps = sorted({step for curve in analyzer.curves.values() for step in curve})
    order = sorted(scores, key=lambda name: -scores[name])
    rows = [(n, scores[n], *(analyzer.curves[n].get(step, "") for step in steps), shares.get(n, "")) for n in order]
    headers = ("part", "score", *(f"{step:.0%}" for step in steps), "recommended")
    print(f"{options.metric} of the dense model: {analyzer.baseline:.4g}")
    print(tabulate(rows, headers, floatfmt=".4g"))


SENSITIVITY = Command(
    "sensitivity",
    "measure what pruning each part of a model costs",
    "fxcompress sensitivity --model resnet18 --data '{type: image-folder, root: val}' --target 0.6 -o report.html",
    run,
    arguments,
)
