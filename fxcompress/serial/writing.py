"""A module as plain data."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from fxcompress.errors import ArtifactError
from fxcompress.graph import spellings
from fxcompress.graph.island import TOP, Island
from fxcompress.serial.classes import CONSTRUCTED, is_masked, known_classes, plain_class
from fxcompress.serial.nodes import graph_data
from fxcompress.serial.tensors import Tensors, tensor_data
from fxcompress.serial.values import encode

__all__ = ["module_data"]

_BASE = set(nn.Module().__dict__) - {"training"}


def module_data(module: nn.Module, tensors: Tensors, prefix: str = "") -> dict[str, Any]:
    """``module`` as plain data; its tensors go to ``tensors``. Raises ArtifactError naming what has no plain form."""
    if isinstance(module, fx.GraphModule):
        module = module.meta.get("portable", module)
        assert isinstance(module, fx.GraphModule)
        if TOP in module._modules:
            island = module._modules[TOP]
            assert isinstance(island, Island)
            return {"top": True, **_island_data(island.model, tensors, prefix)}
        return {"class": "GraphModule", **_state(module, tensors, prefix), **graph_data(module)}
    cls = plain_class(module)
    name = f"{cls.__module__}.{cls.__qualname__}"
    if cls is nn.Module:
        return {"class": "Module", **_state(module, tensors, prefix)}
    if name not in known_classes() and name not in spellings.known_class_names():
        return _island_data(module, tensors, prefix)
    if hasattr(module, "saved_state"):
        state = module.saved_state()  # type: ignore[operator]
        extra = {key: _encode_state(value, tensors, f"{prefix}{key}") for key, value in state.items()}
        return {"class": name, "training": module.training, "saved_state": extra}
    return {"class": name, **_state(module, tensors, prefix), "attributes": _attributes(module, prefix)}


def _state(module: nn.Module, tensors: Tensors, prefix: str) -> dict[str, Any]:
    volatile = module._non_persistent_buffers_set
    return {
        "training": module.training,
        "parameters": {
            leaf: None if p is None else tensor_data(prefix + leaf, p, tensors) for leaf, p in module._parameters.items()
        },
        "buffers": {
            leaf: None if b is None else {**tensor_data(prefix + leaf, b, tensors), "volatile": leaf in volatile}
            for leaf, b in module._buffers.items()
        },
        "children": {
            leaf: module_data(child, tensors, f"{prefix}{leaf}.")
            for leaf, child in module._modules.items()
            if child is not None and not (leaf == "parametrizations" and is_masked(module))
        },
        **_parametrized(module, tensors, prefix),
    }


def _parametrized(module: nn.Module, tensors: Tensors, prefix: str) -> dict[str, Any]:
    if not is_masked(module):
        return {}
    entries = {}
    lists: Any = module.parametrizations
    for leaf, held in lists.items():
        inner = f"{prefix}parametrizations.{leaf}."
        parts = [module_data(part, tensors, f"{inner}{index}.") for index, part in enumerate(held)]
        entries[leaf] = {"original": tensor_data(f"{inner}original", held.original, tensors), "parts": parts}
    return {"parametrized": entries}


def _attributes(module: nn.Module, prefix: str) -> dict[str, Any]:
    names = CONSTRUCTED.get(plain_class(module))
    if names is not None:
        return {name: encode(getattr(module, name)) for name in names}
    kept = {key: value for key, value in module.__dict__.items() if key not in _BASE and key != "training"}
    try:
        return {key: encode(value) for key, value in kept.items()}
    except ArtifactError as error:
        raise ArtifactError(f"layer {prefix.rstrip('.')!r} ({type(module).__name__}): {error}") from error


def _island_data(module: nn.Module, tensors: Tensors, prefix: str) -> dict[str, Any]:
    compiled = {name: m for name, m in module.named_modules() if isinstance(m, fx.GraphModule)}
    outer = {n: m for n, m in compiled.items() if not any(n.startswith(f"{o}.") for o in compiled if o != n)}
    state = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    own = {n: t for n, t in state if not any(n.startswith(f"{region}.") for region in outer)}
    return {
        "island": f"{type(module).__module__}.{type(module).__qualname__}",
        "training": module.training,
        "regions": {name: module_data(m, tensors, f"{prefix}{name}.") for name, m in outer.items()},
        "tensors": {name: tensor_data(prefix + name, tensor, tensors) for name, tensor in own.items()},
        "parametrized": {
            n: _parametrized(m, tensors, f"{prefix}{n}.")["parametrized"]
            for n, m in module.named_modules()
            if is_masked(m) and not any(n.startswith(f"{region}.") for region in outer)
        },
    }


def _encode_state(value: Any, tensors: Tensors, name: str) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": tensor_data(name, value, tensors)}
    if isinstance(value, dict):
        return {"dict": {key: _encode_state(item, tensors, f"{name}.{key}") for key, item in value.items()}}
    return {"plain": encode(value)}
