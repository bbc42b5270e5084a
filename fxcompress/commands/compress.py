"""compress: model and configuration → saved model, ledger, report."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import fx, nn

from fxcompress import artifact
from fxcompress.commands.arguments import configured, reported
from fxcompress.commands.command import Command
from fxcompress.commands.given import data_of, example, page_of, pipeline_of, print_json
from fxcompress.commands.values import device, seed, text
from fxcompress.distributed import is_main
from fxcompress.errors import ConfigError
from fxcompress.files import target_folder
from fxcompress.graph.cost import cost
from fxcompress.pipeline import CompressionPipeline
from fxcompress.pruning import read_analysis
from fxcompress.pruning.sensitivity_report import Summary
from fxcompress.report import write_report
from fxcompress.training import evaluate

__all__ = ["COMPRESS"]


def arguments(parser: argparse.ArgumentParser) -> None:
    configured(parser)
    parser.add_argument("--validation", type=text, metavar="DATA", help="data to judge the model on, before and after")
    parser.add_argument("--output", "-o", type=text, required=True, metavar="FOLDER", help="where the saved model goes")
    reported(parser)
    parser.add_argument(
        "--sensitivity", type=text, metavar="FILE.json",
        help="what 'sensitivity -o FILE.json' or '--cache' saved: curves for the page",
    )  # fmt: skip
    parser.add_argument(
        "--keep", type=text, metavar="FOLDER", help="keep every costly stage there, so that the run can be resumed"
    )
    parser.add_argument("--resume", action="store_true", help="go on from what --keep holds")
    parser.add_argument(
        "--device",
        type=device,
        help="cpu, cuda or cuda:N: where training and calibration run; everything else is on the CPU",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of every random choice (0)")


def run(options: argparse.Namespace) -> int:
    """Compress as a configuration says; save the model; tell what happened."""
    config, pipeline = pipeline_of(options)
    target, report = _targets(options)
    data, validation = data_of(options.data, config, "data"), data_of(options.validation, config, "validation")
    call, analysis = example(options.shape), _analysis(options, pipeline.model)
    _check_data(pipeline, data)
    assert pipeline.model is not None
    before = {} if validation is None else evaluate(pipeline.model, validation)
    progress = False if options.json else None
    how = {name: getattr(options, name) for name in ("keep", "resume", "seed", "device")}
    model = pipeline.run(None, data, call, validation=validation, progress=progress, **how)
    found = _found(model, before, validation)
    if not is_main():
        return 0
    artifact.save(model, target)
    pipeline.ledger.save(target / "ledger.json")
    if report is not None:
        title, metrics = Path(options.config).stem, found.get("metrics")
        about = {"data": data, "example_inputs": call, "metrics": metrics, "sensitivity": analysis, "title": title}
        write_report(report, model, pipeline.model, **about)
    if options.json:
        print_json({"output": str(target), **found, "ledger": pipeline.ledger.as_data()})
    else:
        print(pipeline.ledger)
        print(_summary(target, found))
    return 0


def _targets(options: argparse.Namespace) -> tuple[Path, Path | None]:
    """Where the model and the page go; ConfigError where they cannot go there, or would be in each other's way."""
    target = target_folder(options.output, "--output")
    artifact.check_target(target)
    report = page_of(options)
    if options.resume and options.keep is None:
        raise ConfigError("--resume goes on from what --keep FOLDER holds: give --keep as well.")
    if options.keep is not None:
        kept = target_folder(options.keep, "--keep", made=True).resolve()
        if kept == target.resolve() or target.resolve() in kept.parents:
            raise ConfigError(f"--keep {options.keep!r} is inside --output {options.output!r}; choose another folder.")
    return target, report


def _check_data(pipeline: CompressionPipeline, data: Any) -> None:
    needy = [step.name for step in pipeline.plan if "data" in step.needs]
    if needy and data is None:
        raise ConfigError(f"{needy[0]!r} needs data: give --data, or a 'data' section in the configuration.")


def _analysis(options: argparse.Namespace, model: nn.Module | None) -> Summary | None:
    """The analysis of ``--sensitivity``, which must be one of this model."""
    if options.sensitivity is None:
        return None
    if options.report is None:
        raise ConfigError("--sensitivity goes on the page of --report: give --report PAGE.html as well.")
    found, known = read_analysis(options.sensitivity), dict(model.named_modules() if model is not None else ())
    strange = [part for part in found.curves if part not in known]
    if len(strange) == len(found.curves):
        raise ConfigError(f"--sensitivity {options.sensitivity!r} is of another model: this one has no {strange[0]!r}.")
    return found


def _found(model: fx.GraphModule, before: dict[str, float], validation: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"bytes": cost(model).bytes, "parameters": cost(model).parameters}
    if validation is not None:
        found["metrics"] = {name: [before[name], value] for name, value in evaluate(model, validation).items()}
    return found


def _summary(target: Path, found: Mapping[str, Any]) -> str:
    lines = [f"\nsaved: {target} ({found['bytes'] / 1e6:.2f} MB)"]
    lines += [f"{name}: {was:.4g} before, {now:.4g} after" for name, (was, now) in found.get("metrics", {}).items()]
    return "\n".join(lines)


COMPRESS = Command(
    "compress",
    "compress a model as a configuration says, and save it",
    "fxcompress compress ptq.yaml --model resnet18 --data '{type: random, samples: 64}' --output small",
    run,
    arguments,
)
