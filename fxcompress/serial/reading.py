"""A module from plain data. Nothing here executes what it reads: names resolve in allow-lists."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from fxcompress.errors import ArtifactError
from fxcompress.graph.island import around_island
from fxcompress.graph.module import TracedModule
from fxcompress.serial.classes import CONSTRUCTED, resolve_class
from fxcompress.serial.nodes import build_graph
from fxcompress.serial.tensors import Tensors
from fxcompress.serial.values import decode

__all__ = ["build_module"]


def build_module(data: dict[str, Any], tensors: Tensors, modules: Mapping[str, nn.Module], prefix: str = "") -> Any:
    """The module that :func:`module_data` described; ``modules`` supplies islands by name."""
    missing = sorted(_missing(data, modules, prefix))
    if missing:
        names = ", ".join(f"{name!r} ({cls})" for name, cls in missing)
        raise ArtifactError(f"the model has islands, whose code is not saved: supply modules={{name: module}} for {names}.")
    return _build(data, tensors, modules, prefix)


def _missing(data: dict[str, Any], modules: Mapping[str, nn.Module], prefix: str) -> list[tuple[str, str]]:
    name = prefix.rstrip(".")
    if "island" in data:
        return [] if name in modules else [(name, data["island"])]
    children = data.get("children", {}).items()
    return [item for leaf, child in children for item in _missing(child, modules, f"{prefix}{leaf}.")]


def _build(data: dict[str, Any], tensors: Tensors, modules: Mapping[str, nn.Module], prefix: str) -> nn.Module:
    if "island" in data:
        return _build_island(data, tensors, modules, prefix)
    if data["class"] == "GraphModule":
        return _build_graph_module(data, tensors, modules, prefix)
    if data["class"] == "Module":
        module: nn.Module = nn.Module()
    else:
        module = _instantiate(data, tensors)
    if "saved_state" not in data:
        _restore(module, data, tensors, modules, prefix)
    module.training = data["training"]
    return module


def _instantiate(data: dict[str, Any], tensors: Tensors) -> nn.Module:
    cls = resolve_class(data["class"])
    if "saved_state" in data:
        state = {key: _decode_state(value, tensors) for key, value in data["saved_state"].items()}
        return cls.from_saved_state(state)  # type: ignore[attr-defined]
    attributes = {key: decode(value) for key, value in data["attributes"].items()}
    if cls in CONSTRUCTED:
        return cls(**attributes)
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    module.__dict__.update(attributes)
    return module


def _decode_state(data: Any, tensors: Tensors) -> Any:
    if "tensor" in data:
        return tensors.buffer(data["tensor"])
    if "dict" in data:
        return {key: _decode_state(item, tensors) for key, item in data["dict"].items()}
    return decode(data["plain"])


def _restore(
    module: nn.Module, data: dict[str, Any], tensors: Tensors, modules: Mapping[str, nn.Module], prefix: str
) -> None:
    for leaf, entry in data["parameters"].items():
        parameter = None if entry is None else tensors.parameter(entry)
        if leaf in module._parameters and parameter is not None:
            setattr(module, leaf, parameter)
        else:
            module.register_parameter(leaf, parameter)
    for leaf, entry in data["buffers"].items():
        value = None if entry is None else tensors.buffer(entry)
        module.register_buffer(leaf, value, persistent=entry is None or not entry["volatile"])
    for leaf, child in data["children"].items():
        module.add_module(leaf, _build(child, tensors, modules, f"{prefix}{leaf}."))
    _parametrize(module, data.get("parametrized", {}), tensors)


def _parametrize(module: nn.Module, entries: dict[str, Any], tensors: Tensors) -> None:
    for leaf, entry in entries.items():
        module.register_parameter(leaf, tensors.parameter(entry["original"]))
        for part in entry["parts"]:
            parametrize.register_parametrization(module, leaf, _build(part, tensors, {}, ""))


def _build_island(data: dict[str, Any], tensors: Tensors, modules: Mapping[str, nn.Module], prefix: str) -> nn.Module:
    name = prefix.rstrip(".")
    module = copy.deepcopy(modules[name])
    parts = {part for part, _ in module.named_modules()}
    for region, described in data["regions"].items():
        if region not in parts:
            raise ArtifactError(f"the module supplied for {name!r} has no part {region!r}; it was a {data['island']}.")
        module.set_submodule(region, _build(described, tensors, {}, f"{prefix}{region}."))
    for part, entries in data["parametrized"].items():
        if part not in parts:
            raise ArtifactError(f"the module supplied for {name!r} has no part {part!r}; it was a {data['island']}.")
        _parametrize(module.get_submodule(part), entries, tensors)
    state = dict([*module.named_parameters(), *module.named_buffers()])
    for key, entry in data["tensors"].items():
        if key not in state or list(state[key].shape) != entry["shape"]:
            raise ArtifactError(f"the module supplied for {name!r} has no tensor {key!r} of shape {entry['shape']}.")
        with torch.no_grad():
            state[key].copy_(tensors.buffer(entry))
    module.train(data["training"])
    return around_island(module, []) if data.get("top") else module


def _build_graph_module(
    data: dict[str, Any], tensors: Tensors, modules: Mapping[str, nn.Module], prefix: str
) -> fx.GraphModule:
    root = nn.Module()
    _restore(root, data, tensors, modules, prefix)
    module = TracedModule(root, build_graph(data), str(data["name"]))
    for table in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        setattr(module, table, getattr(root, table))  # fx makes holders of tensors anew
    module.meta.update(stage=data["stage"], rungs=())
    for key in ("quantization", "pruning"):
        if data.get(key) is not None:
            module.meta[key] = data[key]
    module.training = data["training"]
    return module
