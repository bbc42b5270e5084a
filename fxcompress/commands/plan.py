"""plan: what a configuration compiles to, and what that does to every layer."""

from __future__ import annotations

import argparse

from tabulate import tabulate

from fxcompress import explain
from fxcompress.commands.arguments import configured
from fxcompress.commands.command import Command
from fxcompress.commands.given import data_of, example, pipeline_of, print_json

__all__ = ["PLAN"]


def arguments(parser: argparse.ArgumentParser) -> None:
    configured(parser)
    parser.add_argument("--explain", action="store_true", help="say for every layer what would be done, or why not")


def run(options: argparse.Namespace) -> int:
    """Print what a configuration compiles to; explain what it does to every layer."""
    config, pipeline = pipeline_of(options, needs_model=options.explain)
    if not options.explain:
        steps = [{"component": stage.title, "steps": [str(step.name) for step in stage.steps]} for stage in pipeline.stages]
        if options.json:
            print_json({"stages": steps, "plan": pipeline.plan.as_data()})
        else:
            print(pipeline)
        return 0
    rows = explain.explain(pipeline, data_of(options.data, config, "data"), example(options.shape))
    if options.json:
        print_json({"plan": pipeline.plan.as_data(), "layers": [row._asdict() for row in rows]})
    else:
        print(pipeline)
        print()
        print(tabulate(rows, explain.HEADERS, disable_numparse=True, maxcolwidths=[None, None, None, None, None, 60]))
    return 0


PLAN = Command(
    "plan",
    "check a configuration and print the passes it compiles to",
    "fxcompress plan ptq.yaml --model resnet18 --shape 1 3 224 224 --explain",
    run,
    arguments,
)
