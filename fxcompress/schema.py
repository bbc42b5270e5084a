"""The JSON Schema of a configuration, made from the types of the components, so that editors complete and check YAML."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from fxcompress import backends, library
from fxcompress.components import DISTILLERS, ORDER, PRUNERS, QUANTIZERS, TRAINING
from fxcompress.models import DATASETS, MODELS
from fxcompress.options import options_of
from fxcompress.passes.train import Train
from fxcompress.pruning.pruning_scheduler import SCHEDULERS
from fxcompress.quantization.calibrator import CALIBRATORS
from fxcompress.training import LOSSES, LR_SCHEDULES, OPTIMIZERS

__all__ = ["schema"]

_CHOICES: dict[str, Mapping[str, Any]] = {
    "calibration_method": CALIBRATORS,
    "observer": CALIBRATORS,
    "optimizer": OPTIMIZERS,
    "loss": LOSSES,
}


def schema() -> dict[str, Any]:
    """The schema of a configuration file: ``compression``, ``model``, ``data``; other sections are the framework's own."""
    training, models = _training(), {"teacher": _reference("model"), "student": _reference("model")}
    pruning = {
        "finetune_epochs": {"type": "integer", "minimum": 0, "description": "epochs of training after pruning"},
        "finetune": _reference("training"),
        "scheduler": {"anyOf": [_reference(name) for name in SCHEDULERS]},
    }
    definitions = {
        **{name: _component(name, cls, {}) for name, cls in SCHEDULERS.items()},
        **{
            name: _component(name, cls, training if getattr(cls, "trains", False) else {})
            for name, cls in QUANTIZERS.items()
        },
        **{name: _component(name, cls, pruning) for name, cls in PRUNERS.items()},
        **{name: _component(name, cls, {**training, **models}) for name, cls in DISTILLERS.items()},
        "training": _object(training),
        "pass": {"anyOf": [{"enum": list(library.passes())}, {"type": "object", "minProperties": 1, "maxProperties": 1}]},
        "model": _named("a model", MODELS, {"pretrained": {"type": "string", "description": "a weights file"}}),
        "data": _named("data", DATASETS, {"batch_size": {"type": "integer", "minimum": 1}, "shuffle": {"type": "boolean"}}),
    }
    stages = {name: {"anyOf": [_reference(known) for known in registry]} for name, registry in ORDER.items() if registry}
    listed = {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [*(_reference(name) for registry in ORDER.values() for name in registry), _reference("pass")]},
    }
    pipeline = _object({"pipeline": {"anyOf": [listed, _object(stages)]}}, required=["pipeline"])
    single = [_reference(name) for registry in ORDER.values() for name in registry]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "fxcompress configuration",
        "type": "object",
        "properties": {
            "compression": {"anyOf": [*single, pipeline, _object(stages)]},
            "model": _reference("model"),
            "data": _reference("data"),
            "validation": _reference("data"),
        },
        "required": ["compression"],
        "$defs": definitions,
    }


def _reference(name: str) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{name}"}


def _object(properties: Mapping[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    made = {"type": "object", "properties": dict(properties), "additionalProperties": False}
    return {**made, "required": required} if required else made


def _named(what: str, registry: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """A name, or a mapping with a ``type``; names beside the registered ones are torchvision's or a user's own."""
    options = {"type": {"type": "string", "examples": list(registry)}, **more}
    return {
        "description": f"{what}, by name",
        "anyOf": [{"type": "string"}, {"type": "object", "properties": options, "required": ["type"]}],
    }


def _component(name: str, cls: Any, extras: Mapping[str, Any]) -> dict[str, Any]:
    documented = _descriptions(cls)
    properties: dict[str, Any] = {"type": {"const": name}}
    required = ["type"]
    for key, option in options_of(cls).items():
        properties[key] = {**_choices(key, _resolved(option.checker.json_schema())), **documented.get(key, {})}
        if option.required:
            required.append(key)
        elif isinstance(option.default, (bool, int, float, str)):
            properties[key]["default"] = option.default
    for key in sorted(extras):
        properties.setdefault(key, extras[key])
    made = _object(properties, required)
    return {"description": (inspect.getdoc(cls) or name).splitlines()[0], **made}


def _resolved(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "title"}


def _choices(key: str, found: dict[str, Any]) -> dict[str, Any]:
    if key == "backend":
        return {**found, "examples": list(backends.BACKENDS)}
    return {**found, "examples": list(_CHOICES[key])} if key in _CHOICES else found


def _descriptions(cls: type) -> dict[str, dict[str, str]]:
    """What a class's docstring, and its bases', say about single options: lines that begin with the option's name."""
    found: dict[str, dict[str, str]] = {}
    for base in reversed(cls.__mro__):
        for names, text in re.findall(r"^ *((?:``\w+``(?:, )?)+) {2,}(.+)$", base.__doc__ or "", re.M):
            found |= {name: {"description": text.strip()} for name in re.findall(r"\w+", names)}
    return found


def _training() -> dict[str, Any]:
    documented = _descriptions(Train)
    options = options_of(Train)
    made = {}
    for name in sorted(TRAINING):
        option = options[name]
        made[name] = {**_choices(name, _resolved(option.checker.json_schema())), **documented.get(name, {})}
        if isinstance(option.default, (bool, int, float, str)):
            made[name]["default"] = option.default
    made["scheduler"] = {**made["scheduler"], "examples": list(LR_SCHEDULES)}
    return made
