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
    single = [_reference(name) for registry in ORDER.values() for name in registry]
    stages = _object({name: {"anyOf": [_reference(known) for known in registry]} for name, registry in ORDER.items()})
    listed = {"type": "array", "minItems": 1, "items": {"anyOf": [*single, _reference("pass")]}}
    pipeline = _object({"pipeline": {"anyOf": [listed, stages]}}, required=["pipeline"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "fxcompress configuration",
        "type": "object",
        "properties": {
            "compression": {"anyOf": [*single, pipeline, stages]},
            "model": _reference("model"),
            "data": _reference("data"),
            "validation": _reference("data"),
        },
        "required": ["compression"],
        "$defs": _definitions(),
    }


def _definitions() -> dict[str, Any]:
    """What the schema refers to by name: every component, and what they have in common."""
    training, models = _training(), {"teacher": _reference("model"), "student": _reference("model")}
    pruning = {
        "finetune_epochs": {"type": "integer", "minimum": 0, "description": "epochs of training after pruning"},
        "finetune": _reference("training"),
        "scheduler": {"anyOf": [_reference(name) for name in SCHEDULERS]},
    }
    return {
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
    options = options_of(cls)
    properties = {**{key: extras[key] for key in sorted(extras)}, **_properties(cls)}
    own = {"type": {"const": name}, **{key: properties[key] for key in (*options, *sorted(set(extras) - set(options)))}}
    made = _object(own, ["type", *(key for key, option in options.items() if option.required)])
    return {"description": (inspect.getdoc(cls) or name).splitlines()[0], **made}


def _properties(cls: Any) -> dict[str, Any]:
    """Every option of a class: its type, its default, and what the docstring says about it."""
    documented = _descriptions(cls)
    found: dict[str, Any] = {}
    for key, option in options_of(cls).items():
        found[key] = {**_choices(key, _resolved(option.checker.json_schema())), **documented.get(key, {})}
        if isinstance(option.default, (bool, int, float, str)):
            found[key]["default"] = option.default
    return found


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
    properties = _properties(Train)
    made = {name: properties[name] for name in sorted(TRAINING)}
    return {**made, "scheduler": {**made["scheduler"], "examples": list(LR_SCHEDULES)}}
