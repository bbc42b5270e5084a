"""Saved models: graph and metadata as JSON, tensors as safetensors, the plan and the ledger beside them. No code.

A saved model is a folder:

    graph.json          every compiled region: nodes, layers with their plain attributes, metadata, stage
    tensors.safetensors parameters, buffers and calibration state
    history.json        the plan and the ledger of every run that made it
    digests.json        the SHA-256 of each of these, so that damage is an error and not another model

Operators and layer classes are resolved from an allow-list when the model is read back; nothing in the files is executed. A
lowered model is saved in its portable form and lowered again when loaded. Islands are code: their tensors are saved, and the
modules are handed to :func:`load`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from fxcompress import serial
from fxcompress.errors import ArtifactError, BackendError, ConfigError, brief, shown
from fxcompress.files import make_folder, path_of, read_json, writing
from fxcompress.graph import edit
from fxcompress.graph.island import regions
from fxcompress.graph.trace import Rung, is_traced
from fxcompress.ledger import Ledger
from fxcompress.pass_base import STAGES, Context
from fxcompress.plan import build_pass

__all__ = ["check_target", "load", "reduced", "save"]

FORMAT = 1
_GRAPH, _TENSORS, _HISTORY = "graph.json", "tensors.safetensors", "history.json"
_DIGESTS = "digests.json"


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a traced model of any stage as a folder at ``path``; it appears whole or not at all.

    Raises ArtifactError where the model was not traced, holds something that has no code-free form, or ``path`` is a file;
    ConfigError where it cannot be written.
    """
    if not is_traced(model):
        raise ArtifactError(f"save() takes a traced model, got a {type(model).__name__}; trace() it first.")
    assert isinstance(model, fx.GraphModule)
    target = path_of(path, "save()")
    with writing(target):
        check_target(target)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=make_folder(target.parent)))
        try:
            _write(partial, model)
            _replace(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def check_target(target: Path) -> None:
    """Raise ArtifactError where something stands at ``target`` that is no saved model."""
    if target.exists() and not (target / _GRAPH).is_file():
        raise ArtifactError(f"{str(target)!r} exists and is not a saved model; choose another path.")


def _replace(partial: Path, target: Path) -> None:
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        os.replace(target, old / "old")
        os.replace(partial, target)
        shutil.rmtree(old)
    else:
        os.replace(partial, target)


def _write(folder: Path, model: fx.GraphModule) -> None:
    tensors = serial.Tensors()
    (folder / _GRAPH).write_text(json.dumps(_describe(model, tensors)), encoding="utf-8")
    (folder / _HISTORY).write_text(json.dumps(model.meta.get("history", []), indent=1), encoding="utf-8")
    save_file(tensors.stored(), folder / _TENSORS)
    (folder / _DIGESTS).write_text(json.dumps({name: _digest(folder / name) for name in _FILES}), encoding="utf-8")


_FILES = (_GRAPH, _TENSORS, _HISTORY)


def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _describe(model: fx.GraphModule, tensors: serial.Tensors) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "torch": str(torch.__version__),
        "stage": model.meta["stage"],
        "classes": model.meta.get("classes", {}),
        "rungs": [[rung.module, rung.rung, rung.reason] for rung in model.meta["rungs"]],
        "module": serial.module_data(model, tensors),
    }


def load(path: str | os.PathLike[str], *, modules: Mapping[str, nn.Module] | None = None) -> fx.GraphModule:
    """Read a saved model back, at the stage it was saved in; lowered ones are lowered for this machine.

    ``modules``: for a model with islands, the module for each island by name (``""`` for a model that is one as a whole),
    freshly built; they are given the saved tensors. Raises ArtifactError where files are missing or damaged, an operator
    or class is not in the allow-list, or an island's module is not supplied (naming each).
    """
    folder = path_of(path, "load()")
    if not isinstance(modules, Mapping | None):
        raise ConfigError(f"modules maps the names of islands to modules; it is {shown(modules)}.")
    _check_files(folder)
    document = _read_json(folder, _GRAPH)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else None
        raise ArtifactError(f"{str(folder)!r} has format {found!r}; this version reads format {FORMAT}.")
    tensors = _read_tensors(folder)
    model = _build(document, tensors, modules or {}, f"{str(folder)!r} is damaged")
    model.meta["history"] = _read_history(folder)
    return model


def _build(
    document: dict[str, Any], tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module], failure: str
) -> fx.GraphModule:
    try:
        return _assemble(document, tensors, modules)
    except (ArtifactError, BackendError):
        raise
    except Exception as error:  # whatever a tampered description breaks means the same
        raise ArtifactError(f"{failure}: {type(error).__name__}: {error}.") from error


def _assemble(document: dict[str, Any], tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> fx.GraphModule:
    model = serial.build_module(document["module"], serial.Tensors(tensors), modules)
    stage = document["stage"]
    if stage not in STAGES:
        raise ArtifactError(f"the saved model has stage {stage!r}, which is none of {', '.join(STAGES)}.")
    model.meta.update(rungs=tuple(Rung(*rung) for rung in document["rungs"]), stage=stage)
    model.meta["classes"] = {name: tuple(known) for name, known in document.get("classes", {}).items()}
    for region in regions(model).values():
        region.graph.output_node()
        region.graph.lint()
    if stage == "lowered":
        model.meta["stage"] = "qdq"
        build_pass("lower", {}).run_model(model, Context())
        for region in regions(model).values():
            edit.finish(region)
    assert isinstance(model, fx.GraphModule)
    return model


def reduced(model: fx.GraphModule) -> tuple[Any, ...] | None:
    """What ``pickle`` stores for a traced model, or None where it holds something without a plain form."""
    tensors = serial.Tensors()
    try:
        document = _describe(model, tensors)
        json.dumps(document)
    except (ArtifactError, KeyError, TypeError):
        return None
    return _restored, (document, tensors.stored(), model.meta.get("history", []))


def _restored(document: dict[str, Any], tensors: dict[str, Tensor], history: list[Any]) -> fx.GraphModule:
    model = _build(document, tensors, {}, "the pickled model is damaged")
    model.meta["history"] = history
    return model


_UNSIGNED = (
    " Copy the whole folder; where it comes from a version of fxcompress that wrote no digests, "
    "compress the model again and save it."
)


def _check_files(folder: Path) -> None:
    """Raise ArtifactError where ``folder`` is no saved model, or one of its files is not what was written."""
    if os.path.isfile(folder):
        raise ArtifactError(
            f"there is no saved model: {shown(str(folder))} is a file; load() reads folders that fxcompress.save() writes. "
            "A weights file goes into a freshly built model, by its load_state_dict."
        )
    for name in (*_FILES, _DIGESTS):
        if not os.path.isfile(folder / name):
            hint = _UNSIGNED if name == _DIGESTS else ""
            raise ArtifactError(f"there is no saved model at {shown(str(folder))}: {name} is missing.{hint}")
    written = _read_json(folder, _DIGESTS)
    try:
        damaged = [name for name in _FILES if written[name] != _digest(folder / name)]
    except (OSError, KeyError, TypeError) as error:
        raise ArtifactError(f"{str(folder / _DIGESTS)!r} is damaged: {brief(error)}.") from error
    if damaged:
        raise ArtifactError(
            f"{str(folder)!r} is damaged: {' and '.join(damaged)} is not what was written. Save or copy the model again."
        )


def _read_json(folder: Path, name: str) -> Any:
    try:
        return read_json(folder / name)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{str(folder / name)!r} is damaged: {brief(error)}.") from error


def _read_history(folder: Path) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = _read_json(folder, _HISTORY)
    try:
        for entry in history:
            if not Ledger.from_data(entry["ledger"]).rows or not isinstance(entry["plan"], str):
                raise ValueError("a run has a plan, and a ledger of its steps")
    except (LookupError, TypeError, ValueError) as error:
        raise ArtifactError(f"{str(folder / _HISTORY)!r} is damaged: {brief(error)}.") from error
    return history


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(folder / _TENSORS))
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{str(folder / _TENSORS)!r} is missing or damaged: {error}.") from error
