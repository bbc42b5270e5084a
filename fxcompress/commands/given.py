"""What the arguments of a command name: models, data, inputs, places to write to."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxcompress import artifact
from fxcompress.builder import build_compression_pipeline
from fxcompress.config import Config, read_config
from fxcompress.errors import ConfigError, PlanError, brief, shown
from fxcompress.files import target_file
from fxcompress.graph.inputs import Arguments
from fxcompress.models import build_data, build_model
from fxcompress.pipeline import CompressionPipeline
from fxcompress.weights import load_weights
from fxcompress.yaml_text import read_yaml

__all__ = ["data_of", "example", "inline", "model_of", "page_of", "pipeline_of", "print_json", "saved_model"]


def page_of(options: argparse.Namespace) -> Path | None:
    """Where the page of ``--report`` goes, if one was asked for; ConfigError where it cannot go there."""
    return None if options.report is None else target_file(options.report, "--report", (".html", ".htm"))


def pipeline_of(options: argparse.Namespace, needs_model: bool = True) -> tuple[Config, CompressionPipeline]:
    """The configuration, and what it compiles to over the model that is named."""
    _import(options.imports)
    config = read_config(Path(options.config))
    if options.weights is not None and options.model is None:
        raise ConfigError("--weights are those of --model: give --model, or 'pretrained' in the configuration's model.")
    model = None if options.model is None else _model(options)
    pipeline = build_compression_pipeline(config, model)
    if needs_model and pipeline.model is None:
        raise ConfigError("there is no model: give --model, or a 'model' in the configuration.")
    return config, pipeline


def model_of(options: argparse.Namespace) -> nn.Module:
    """A saved model's folder, a registered or torchvision name, or a mapping as a configuration writes it."""
    _import(options.imports)
    return _model(options)


def _model(options: argparse.Namespace) -> nn.Module:
    if os.path.isfile(os.path.join(options.model, "graph.json")):  # unlike Path.is_file, it takes a mapping of any length
        model: nn.Module = artifact.load(options.model)
    else:
        model = build_model(inline(options.model), ("--model",))
    if options.weights is not None:
        load_weights(model, options.weights)
    return model


def saved_model(options: argparse.Namespace) -> fx.GraphModule:
    """The saved model of a folder."""
    _import(options.imports)
    return artifact.load(options.model)


def _import(names: list[str]) -> None:
    """Import modules of the user's, which register models, data and components."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # it is somebody's code: whatever it raises is theirs to mend
            raise ConfigError(f"--import {name}: {type(error).__name__}: {error}.") from error


def data_of(given: str | None, config: Config, key: str) -> Any:
    """Data by ``--data`` or the configuration; None where neither names any."""
    if given is not None:
        return build_data(inline(given), (f"--{key}",))
    return build_data(config.data[key], (key,)) if key in config.data else None


def inline(given: str) -> Any:
    """A name, or a mapping in YAML's flow style."""
    if not given.lstrip().startswith("{"):
        return given
    try:
        return read_yaml(given)
    except PlanError as error:
        raise ConfigError(f"{shown(given)} is neither a name nor a mapping: {error}") from error


def example(shape: list[int] | None) -> Arguments | None:
    """Seeded noise of a shape, as one call."""
    if shape is None:
        return None
    try:
        return Arguments((torch.randn(*shape, generator=torch.Generator().manual_seed(0), device="cpu"),), {})
    except (RuntimeError, MemoryError, OverflowError) as error:
        raise ConfigError(f"--shape {' '.join(map(str, shape))} does not fit into memory: {brief(error)}.") from error


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=1, ensure_ascii=False))
