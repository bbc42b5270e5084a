"""export: a saved model in another format."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import fx

from fxcompress.commands.arguments import saved, shaped
from fxcompress.commands.command import Command
from fxcompress.commands.given import example, print_json, saved_model
from fxcompress.commands.values import text
from fxcompress.errors import ConfigError
from fxcompress.export import export_onnx, export_tensorrt
from fxcompress.files import target_file, whole
from fxcompress.graph.inputs import Arguments
from fxcompress.graph.recorder import Recorder
from fxcompress.graph.shapes import example_of

__all__ = ["EXPORT"]


def arguments(parser: argparse.ArgumentParser) -> None:
    saved(parser)
    parser.add_argument(
        "--format", choices=tuple(_FORMATS), default="onnx",
        help="torch: a torch.export program; tensorrt: an engine for this GPU",
    )  # fmt: skip
    parser.add_argument("--output", "-o", type=text, required=True, metavar="FILE")
    shaped(parser)


def run(options: argparse.Namespace) -> int:
    """Write a saved model in another format."""
    form = _FORMATS[options.format]
    target = target_file(options.output, "--output", form.endings)
    model, call = saved_model(options), example(options.shape)
    if call is not None:
        Recorder(model).record(call)
    form.write(model, target, call)
    if options.json:
        print_json({"output": str(target), "format": options.format, "bytes": target.stat().st_size})
    else:
        print(f"{options.format}: {target} ({target.stat().st_size / 1e6:.2f} MB)")
    return 0


def _export_program(model: fx.GraphModule, target: Path, call: Arguments | None) -> None:
    model = copy.deepcopy(model.meta.get("portable", model))
    given = call if call is not None else example_of(model)
    if given is None:
        raise ConfigError("the saved model does not say which inputs it takes: give --shape.")
    for node in model.graph.nodes:
        node.meta.pop("nn_module_stack", None)  # ours names owners only, and torch.export wants classes
    program = torch.export.export(model, given.args, given.kwargs)
    with whole(target) as draft:
        torch.export.save(program, draft)


class _Format(NamedTuple):
    """A format: what writes it, and how its files end."""

    write: Callable[[fx.GraphModule, Path, Arguments | None], object]
    endings: tuple[str, ...]


_FORMATS = {
    "onnx": _Format(export_onnx, (".onnx",)),
    "torch": _Format(_export_program, (".pt2",)),
    "tensorrt": _Format(export_tensorrt, (".engine", ".plan", ".trt")),
}

EXPORT = Command(
    "export",
    "write a saved model in another format",
    "fxcompress export small --format onnx --output small.onnx",
    run,
    arguments,
)
