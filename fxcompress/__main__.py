"""The ``fxcompress`` command (also ``python -m fxcompress``).

Exit status: 0, done; 1, it ran and the result was refused (a check, a floor, a loss that is not finite); 2, something in
what was given must be mended. The message then says what and where; there is no traceback.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

import torch

from fxcompress import __version__, commands
from fxcompress.bench import __main__ as bench
from fxcompress.exit_status import exit_status

__all__ = ["main"]

Run = Callable[[argparse.Namespace], int]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="fxcompress", description="A compiler for model compression.")
    made.add_argument("--version", action="version", version=f"fxcompress {__version__}")
    sub = made.add_subparsers(required=True, metavar="command")
    compress = _command(
        sub, "compress", commands.compress, "compress a model as a configuration says, and save it",
        "fxcompress compress ptq.yaml --model resnet18 --data '{type: random, samples: 64}' --output small",
    )  # fmt: skip
    _configured(compress)
    compress.add_argument("--validation", metavar="DATA", help="data to judge the model on, before and after")
    compress.add_argument("--output", "-o", required=True, metavar="FOLDER", help="where the saved model goes")
    _report(compress)
    compress.add_argument(
        "--sensitivity", metavar="FILE.json", help="what 'sensitivity -o FILE.json' or '--cache' saved: curves for the page"
    )
    compress.add_argument("--keep", metavar="FOLDER", help="keep every costly stage there, so that the run can be resumed")
    compress.add_argument("--resume", action="store_true", help="go on from what --keep holds")
    compress.add_argument("--seed", type=int, default=0)
    plan = _command(
        sub, "plan", commands.plan, "check a configuration and print the passes it compiles to",
        "fxcompress plan ptq.yaml --model resnet18 --shape 1 3 224 224 --explain",
    )  # fmt: skip
    _configured(plan)
    plan.add_argument("--explain", action="store_true", help="say for every layer what would be done, or why not")
    inspect = _command(
        sub, "inspect", commands.inspect_model, "show a saved model: graph, sizes, stage, history",
        "fxcompress inspect small",
    )  # fmt: skip
    inspect.add_argument("model", help="the folder of a saved model")
    _report(inspect)
    export = _command(
        sub, "export", commands.export, "write a saved model in another format",
        "fxcompress export small --format onnx --output small.onnx",
    )  # fmt: skip
    export.add_argument("model", help="the folder of a saved model")
    export.add_argument(
        "--format", choices=("onnx", "torch", "tensorrt"), default="onnx",
        help="torch: a torch.export program; tensorrt: an engine for this GPU",
    )  # fmt: skip
    export.add_argument("--output", "-o", required=True, metavar="FILE")
    _shape(export)
    sensitivity = _command(
        sub, "sensitivity", commands.sensitivity, "measure what pruning each part of a model costs",
        "fxcompress sensitivity --model resnet18 --data '{type: image-folder, root: val}' --target 0.6 -o report.html",
    )  # fmt: skip
    sensitivity.add_argument("--model", required=True, help="a name, a mapping, or a saved model's folder")
    sensitivity.add_argument("--weights", metavar="FILE", help="weights for the model")
    sensitivity.add_argument("--data", required=True, help="labelled data: a data set's name, or a mapping")
    sensitivity.add_argument("--type", default="structured", help="structured, unstructured or semi_structured")
    sensitivity.add_argument("--metric", default="accuracy")
    sensitivity.add_argument("--range", type=float, nargs=2, default=[0.1, 0.9], metavar=("LOW", "HIGH"))
    sensitivity.add_argument("--steps", type=int, default=9, help="sparsities tried")
    sensitivity.add_argument("--target", type=float, help="recommend the largest sparsities that keep this metric")
    sensitivity.add_argument("--cache", metavar="FILE", help="keep measurements there; an interrupted analysis goes on")
    sensitivity.add_argument("--output", "-o", metavar="FILE", help="write the report: .html, .md, .json or .csv")
    sub.add_parser("bench", help="measure compressed models (fxcompress bench --help)", add_help=False)
    _command(sub, "passes", commands.passes, "list the library of passes", "fxcompress passes")
    _command(
        sub, "schema", commands.print_schema, "print the JSON Schema of configurations",
        "fxcompress schema > compression.schema.json",
    )  # fmt: skip
    replay = _command(
        sub, "replay", commands.replay, "run the plan of a reproducer folder again", "fxcompress replay failure --changes"
    )
    replay.add_argument("folder")
    replay.add_argument("--changes", action="store_true", help="print what every pass changes")
    return made


def _command(sub: argparse._SubParsersAction, name: str, run: Run, about: str, example: str) -> argparse.ArgumentParser:  # type: ignore[type-arg]
    made: argparse.ArgumentParser = sub.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--json", action="store_true", help="print JSON")
    made.add_argument(
        "--import", dest="imports", action="append", default=[], metavar="MODULE",
        help="a module of yours that registers models, data or components",
    )  # fmt: skip
    made.set_defaults(run=run)
    return made


def _configured(made: argparse.ArgumentParser) -> None:
    made.add_argument("config", help="a YAML file with a 'compression' section")
    made.add_argument("--model", help="a name, a mapping ({type: ResNet, depth: 18}), or a saved model's folder")
    made.add_argument("--weights", metavar="FILE", help="weights for the model")
    made.add_argument("--data", help="a data set's name, or a mapping ({type: digits, batch_size: 64})")
    _shape(made)


def _report(made: argparse.ArgumentParser) -> None:
    made.add_argument("--report", metavar="PAGE.html", help="write one self-contained HTML page that shows all of it")


def _shape(made: argparse.ArgumentParser) -> None:
    made.add_argument("--shape", type=bench.positive, nargs="+", metavar="N", help="of an example input, batch first")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 for success, 1 where the result was refused, 2 for something the caller can mend."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["bench"]:
        return bench.main(arguments[1:])
    options = parser().parse_args(arguments)
    torch._logging.set_logs(all=logging.CRITICAL)  # type: ignore[attr-defined]  # a model that torch.export refuses is an error of ours, or none
    return exit_status(lambda: int(options.run(options)))


if __name__ == "__main__":
    sys.exit(main())
