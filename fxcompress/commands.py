"""What the ``fxcompress`` command does: a function per sub-command, from its options to its exit status."""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import fx, nn

from fxcompress import artifact, explain, library, reproducer
from fxcompress.builder import build_compression_pipeline
from fxcompress.config import Config, read_config
from fxcompress.distributed import is_main
from fxcompress.errors import ConfigError, PlanError
from fxcompress.export import export_onnx, export_tensorrt
from fxcompress.files import whole
from fxcompress.graph.cost import cost, node_costs
from fxcompress.graph.coverage import coverage
from fxcompress.graph.inputs import Arguments
from fxcompress.graph.shapes import Recorder, example_of
from fxcompress.manager import PassManager
from fxcompress.models import build_data, build_model
from fxcompress.pipeline import CompressionPipeline
from fxcompress.pruning import SensitivityAnalyzer, read_analysis
from fxcompress.pruning.sensitivity_report import Summary
from fxcompress.report import report_path, write_report
from fxcompress.schema import schema
from fxcompress.training import evaluate
from fxcompress.weights import load_weights
from fxcompress.yaml_text import read_yaml

__all__ = ["compress", "export", "inspect_model", "passes", "plan", "print_schema", "replay", "sensitivity"]


def compress(options: argparse.Namespace) -> int:
    """Model and configuration → saved model, ledger."""
    config, pipeline = _pipeline(options)
    target, report = _output(options.output), report_path(options.report)
    data = _data(options.data, config, "data")
    validation = _data(options.validation, config, "validation")
    call = _example(options.shape)
    analysis = _analysis(options, pipeline.model)
    _check_start(options, pipeline, data, target)
    assert pipeline.model is not None
    before = {} if validation is None else evaluate(pipeline.model, validation)
    model = pipeline.run(
        None,
        data,
        call,
        keep=options.keep,
        resume=options.resume,
        validation=validation,
        seed=options.seed,
        progress=False if options.json else None,
    )
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
        _print({"output": str(target), **found, "ledger": pipeline.ledger.as_data()})
    else:
        print(pipeline.ledger)
        print(f"\nsaved: {target} ({found['bytes'] / 1e6:.2f} MB)")
        for name, (before, after) in found.get("metrics", {}).items():
            print(f"{name}: {before:.4g} before, {after:.4g} after")
    return 0


def _check_start(options: argparse.Namespace, pipeline: CompressionPipeline, data: Any, target: Path) -> None:
    """Refuse before any work what would be refused after it."""
    artifact.check_target(target)
    if options.resume and options.keep is None:
        raise ConfigError("--resume goes on from what --keep FOLDER holds: give --keep as well.")
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


def plan(options: argparse.Namespace) -> int:
    """Print what a configuration compiles to; explain what it does to every layer."""
    config, pipeline = _pipeline(options, needs_model=options.explain)
    if not options.explain:
        steps = [{"component": stage.title, "steps": [str(step.name) for step in stage.steps]} for stage in pipeline.stages]
        if options.json:
            _print({"stages": steps, "plan": pipeline.plan.as_data()})
        else:
            print(pipeline)
        return 0
    assert pipeline.model is not None
    rows = explain.explain(pipeline, _data(options.data, config, "data"), _example(options.shape))
    if options.json:
        _print({"plan": pipeline.plan.as_data(), "layers": [row._asdict() for row in rows]})
    else:
        print(pipeline)
        print()
        print(tabulate(rows, explain.HEADERS, disable_numparse=True, maxcolwidths=[None, None, None, None, None, 60]))
    return 0


def inspect_model(options: argparse.Namespace) -> int:
    """A saved model: its graph as a table, what it costs, how it came to be."""
    report = report_path(options.report)
    model = _saved(options.model, options)
    if report is not None:
        write_report(report, model, title=Path(options.model).name)
    totals, share = cost(model), coverage(model)
    rows = [(row.node, row.kind, f"{row.parameters:,}", f"{row.macs:,}", f"{row.bytes:,}") for row in node_costs(model)]
    history = model.meta.get("history", [])
    if options.json:
        summary = {"stage": model.meta["stage"], "nodes": totals.nodes, "parameters": totals.parameters, "macs": totals.macs}
        summary |= {"bytes": totals.bytes, "int8_macs": share.mac_share}
        _print({**summary, "graph": [row.__dict__ for row in node_costs(model)], "history": history})
        return 0
    print(tabulate(rows, ("node", "kind", "parameters", "MACs", "bytes"), disable_numparse=True))
    print(f"\nstage: {model.meta['stage']}; {totals.parameters:,} parameters, {totals.macs / 1e6:,.1f}M MACs")
    print(f"stored: {totals.bytes / 1e6:.2f} MB; {share.mac_share:.1%} of MACs in integers")
    for number, entry in enumerate(history, 1):
        print(f"\nrun {number}:\n{entry['plan'].rstrip()}")
    return 0


def export(options: argparse.Namespace) -> int:
    """A saved model in another format."""
    model = _saved(options.model, options)
    target = _output(options.output)
    call = _example(options.shape)
    if call is not None:
        Recorder(model).record(call)
    _FORMATS[options.format](model, target, call)
    if options.json:
        _print({"output": str(target), "format": options.format, "bytes": target.stat().st_size})
    else:
        print(f"{options.format}: {target} ({target.stat().st_size / 1e6:.2f} MB)")
    return 0


def _export_program(model: fx.GraphModule, target: Path, call: Arguments | None) -> None:
    model = copy.deepcopy(model.meta.get("portable", model))
    if target.suffix != ".pt2":
        raise ConfigError(f"a torch.export program is a .pt2 file, not {target.name!r}.")
    example = call if call is not None else example_of(model)
    if example is None:
        raise ConfigError("the saved model does not say which inputs it takes: give --shape.")
    for node in model.graph.nodes:
        node.meta.pop("nn_module_stack", None)  # ours names owners only, and torch.export wants classes
    program = torch.export.export(model, example.args, example.kwargs)
    with whole(target) as draft:
        torch.export.save(program, draft)


_FORMATS: dict[str, Callable[[fx.GraphModule, Path, Arguments | None], object]] = {
    "onnx": export_onnx,
    "torch": _export_program,
    "tensorrt": export_tensorrt,
}


def sensitivity(options: argparse.Namespace) -> int:
    """What pruning every part of a model costs."""
    for name in options.imports:
        _import(name)
    analyzer = SensitivityAnalyzer(
        options.range,
        options.steps,
        options.metric,
        options.type,
        cache=options.cache,
        progress=False if options.json else None,
    )
    analyzer.analyze(_model(options.model, options.weights), build_data(_inline(options.data), ("--data",)))
    shares = analyzer.get_optimal_sparsity(options.target) if options.target is not None else {}
    if not is_main():
        return 0
    if options.output is not None:
        analyzer.export_report(_output(options.output))
    scores = analyzer.get_sensitivity_scores()
    if options.json:
        curves = {name: {str(step): value for step, value in curve.items()} for name, curve in analyzer.curves.items()}
        _print({"baseline": analyzer.baseline, "scores": scores, "curves": curves, "recommended": shares})
        return 0
    steps = sorted({step for curve in analyzer.curves.values() for step in curve})
    order = sorted(scores, key=lambda name: -scores[name])
    rows = [(n, scores[n], *(analyzer.curves[n].get(step, "") for step in steps), shares.get(n, "")) for n in order]
    headers = ("part", "score", *(f"{step:.0%}" for step in steps), "recommended")
    print(f"{options.metric} of the dense model: {analyzer.baseline:.4g}")
    print(tabulate(rows, headers, floatfmt=".4g"))
    return 0


def passes(options: argparse.Namespace) -> int:
    """The library of passes."""
    rows = {name: (inspect.getdoc(cls) or "").splitlines()[0] for name, cls in library.passes().items()}
    if options.json:
        _print(rows)
    else:
        for name, line in rows.items():
            print(f"{name:22} {line}")
    return 0


def print_schema(options: argparse.Namespace) -> int:
    """The JSON Schema of configurations."""
    _print(schema())
    return 0


def replay(options: argparse.Namespace) -> int:
    """Run the plan of a reproducer folder again."""
    model, steps, call = reproducer.read(options.folder)
    data = [call] if call is not None else None
    manager = PassManager(steps, show="changes" if options.changes else None, reproducer=False)
    manager.run(model, call, data)
    if options.json:
        _print(manager.ledger.as_data())
    else:
        print(manager.ledger)
    return 0


# what the options name


def _print(data: Any) -> None:
    print(json.dumps(data, indent=1, ensure_ascii=False))


def _pipeline(options: argparse.Namespace, needs_model: bool = True) -> tuple[Config, CompressionPipeline]:
    for name in options.imports:
        _import(name)
    config = read_config(Path(options.config))
    if options.weights is not None and options.model is None:
        raise ConfigError("--weights are those of --model: give --model, or 'pretrained' in the configuration's model.")
    model = None if options.model is None else _model(options.model, options.weights)
    pipeline = build_compression_pipeline(config, model)
    if needs_model and pipeline.model is None:
        raise ConfigError("there is no model: give --model, or a 'model' in the configuration.")
    return config, pipeline


def _import(name: str) -> None:
    """Import a module of the user's, which registers models, data and components."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        importlib.import_module(name)
    except Exception as error:  # it is somebody's code: whatever it raises is theirs to mend
        raise ConfigError(f"--import {name}: {type(error).__name__}: {error}.") from error


def _model(text: str, weights: str | None) -> nn.Module:
    """A saved model's folder, a registered or torchvision name, or a mapping as a configuration writes it."""
    if (Path(text) / "graph.json").is_file():
        model: nn.Module = artifact.load(text)
    else:
        model = build_model(_inline(text), ("--model",))
    if weights is not None:
        load_weights(model, weights)
    return model


def _saved(path: str, options: argparse.Namespace) -> fx.GraphModule:
    for name in options.imports:
        _import(name)
    return artifact.load(path)


def _data(text: str | None, config: Config, key: str) -> Any:
    """Data by ``--data`` or the configuration; None where neither names any."""
    if text is not None:
        return build_data(_inline(text), (f"--{key}",))
    return build_data(config.data[key], (key,)) if key in config.data else None


def _inline(text: str) -> Any:
    """A name, or a mapping in YAML's flow style."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return read_yaml(text)
    except PlanError as error:
        raise ConfigError(f"{text!r} is neither a name nor a mapping: {error}") from error


def _example(shape: list[int] | None) -> Arguments | None:
    """Seeded noise of a shape, as one call."""
    if shape is None:
        return None
    return Arguments((torch.randn(*shape, generator=torch.Generator().manual_seed(0)),), {})


def _output(path: str) -> Path:
    target = Path(path)
    if not target.resolve().parent.is_dir():
        raise ConfigError(f"{path!r} cannot be written: there is no folder {str(target.resolve().parent)!r}.")
    return target
