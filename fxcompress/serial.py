"""Modules and graphs as plain data, and back. Nothing here executes what it reads: names resolve in allow-lists."""

from __future__ import annotations

import collections
import copy
import functools
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.fx.passes.shape_prop import TensorMetadata
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from fxcompress.errors import ArtifactError
from fxcompress.graph import ops, recurrent
from fxcompress.graph.island import TOP, Island
from fxcompress.graph.module import TracedModule
from fxcompress.graph.trace import around_island

__all__ = ["Tensors", "build_module", "module_data"]

_BASE = set(nn.Module().__dict__) - {"training"}
_KEPT_META = ("integer", "float", "macs", "observer", "kind", "taps", "weight_grid")


class Tensors:
    """Named tensors of a saved model; one that is used under several names is stored once."""

    def __init__(self, values: Mapping[str, Tensor] | None = None) -> None:
        self.values = dict(values or {})
        self._names: dict[int, str] = {}
        self._parameters: dict[str, nn.Parameter] = {}

    def put(self, name: str, tensor: Tensor) -> str:
        """Store ``tensor``; returns the name it is stored under."""
        name = self._names.setdefault(id(tensor), name)
        self.values[name] = tensor
        return name

    def stored(self) -> dict[str, Tensor]:
        """What goes into the file: contiguous copies that share no memory."""
        return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in self.values.items()}

    def parameter(self, data: dict[str, Any]) -> nn.Parameter:
        """The parameter under this name, one object however often it is asked for."""
        name = data["tensor"]
        if name not in self._parameters:
            self._parameters[name] = nn.Parameter(self.buffer(data), requires_grad=data["requires_grad"])
        return self._parameters[name]

    def buffer(self, data: dict[str, Any]) -> Tensor:
        if data["tensor"] not in self.values:
            raise ArtifactError(f"tensor {data['tensor']!r} is missing from the file.")
        value = self.values[data["tensor"]]
        if list(value.shape) != data["shape"]:
            raise ArtifactError(f"tensor {data['tensor']!r} has shape {list(value.shape)}, not {data['shape']}.")
        layout = torch.channels_last if data["channels_last"] else torch.contiguous_format
        return value.clone(memory_format=layout)  # the file's memory may be unaligned, which changes kernels and bits


def _tensor_data(name: str, tensor: Tensor, tensors: Tensors) -> dict[str, Any]:
    channels_last = tensor.dim() == 4 and not tensor.is_contiguous()
    return {
        "tensor": tensors.put(name, tensor),
        "shape": list(tensor.shape),
        "requires_grad": tensor.requires_grad,
        "channels_last": channels_last and tensor.is_contiguous(memory_format=torch.channels_last),
    }


def module_data(module: nn.Module, tensors: Tensors, prefix: str = "") -> dict[str, Any]:
    """``module`` as plain data; its tensors go to ``tensors``. Raises ArtifactError naming what has no plain form."""
    if isinstance(module, fx.GraphModule):
        module = module.meta.get("portable", module)
        assert isinstance(module, fx.GraphModule)
        if TOP in module._modules:
            island = module._modules[TOP]
            assert isinstance(island, Island)
            return {"top": True, **_island_data(island.model, tensors, prefix)}
        return {"class": "GraphModule", **_state(module, tensors, prefix), **_graph_data(module)}
    cls = _plain_class(module)
    name = f"{cls.__module__}.{cls.__qualname__}"
    if cls is nn.Module:
        return {"class": "Module", **_state(module, tensors, prefix)}
    if name not in _classes() and name not in ops.known_class_names():
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
            leaf: None if p is None else _tensor_data(prefix + leaf, p, tensors) for leaf, p in module._parameters.items()
        },
        "buffers": {
            leaf: None if b is None else {**_tensor_data(prefix + leaf, b, tensors), "volatile": leaf in volatile}
            for leaf, b in module._buffers.items()
        },
        "children": {
            leaf: module_data(child, tensors, f"{prefix}{leaf}.")
            for leaf, child in module._modules.items()
            if child is not None and not (leaf == "parametrizations" and _masked(module))
        },
        **_parametrized(module, tensors, prefix),
    }


def _plain_class(module: nn.Module) -> type:
    """The class of a module; of a masked one, the class it had before ``parametrize`` made one for it."""
    return type(module).__mro__[1] if _masked(module) else type(module)


def _masked(module: nn.Module) -> bool:
    """Whether a module has parametrizations, all of which can be saved as modules over one original tensor."""
    lists: Any = getattr(module, "parametrizations", None)
    if not parametrize.is_parametrized(module):
        return False
    return all(held.is_tensor and all(ops.is_known_module(part) for part in held) for held in lists.values())


def _parametrized(module: nn.Module, tensors: Tensors, prefix: str) -> dict[str, Any]:
    if not _masked(module):
        return {}
    entries = {}
    lists: Any = module.parametrizations
    for leaf, held in lists.items():
        inner = f"{prefix}parametrizations.{leaf}."
        parts = [module_data(part, tensors, f"{inner}{index}.") for index, part in enumerate(held)]
        entries[leaf] = {"original": _tensor_data(f"{inner}original", held.original, tensors), "parts": parts}
    return {"parametrized": entries}


def _attributes(module: nn.Module, prefix: str) -> dict[str, Any]:
    names = _CONSTRUCTED.get(_plain_class(module))
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
        "tensors": {name: _tensor_data(prefix + name, tensor, tensors) for name, tensor in own.items()},
        "parametrized": {
            n: _parametrized(m, tensors, f"{prefix}{n}.")["parametrized"]
            for n, m in module.named_modules()
            if _masked(m) and not any(n.startswith(f"{region}.") for region in outer)
        },
    }


def _encode_state(value: Any, tensors: Tensors, name: str) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": _tensor_data(name, value, tensors)}
    if isinstance(value, dict):
        return {"dict": {key: _encode_state(item, tensors, f"{name}.{key}") for key, item in value.items()}}
    return {"plain": encode(value)}


def _decode_state(data: Any, tensors: Tensors) -> Any:
    if "tensor" in data:
        return tensors.buffer(data["tensor"])
    if "dict" in data:
        return {key: _decode_state(item, tensors) for key, item in data["dict"].items()}
    return decode(data["plain"])


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
    cls = _resolve_class(data["class"])
    if "saved_state" in data:
        state = {key: _decode_state(value, tensors) for key, value in data["saved_state"].items()}
        return cls.from_saved_state(state)  # type: ignore[attr-defined, no-any-return]
    attributes = {key: decode(value) for key, value in data["attributes"].items()}
    if cls in _CONSTRUCTED:
        return cls(**attributes)
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    module.__dict__.update(attributes)
    return module


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


def _graph_data(module: fx.GraphModule) -> dict[str, Any]:
    codegen = module.graph._codegen
    tree = None
    if isinstance(codegen, _PyTreeCodeGen):
        info = codegen.pytree_info
        specs = [pytree.treespec_dumps(spec) if spec else None for spec in (info.in_spec, info.out_spec)]
        tree = {"names": list(info.orig_args), "in": specs[0], "out": specs[1]}
    return {
        "name": type(module).__name__,
        "nodes": [_node_data(node) for node in module.graph.nodes],
        "pytree": tree,
        "stage": module.meta.get("stage", "float"),
        "quantization": module.meta.get("quantization"),
        "pruning": module.meta.get("pruning"),
    }


def _node_data(node: fx.Node) -> dict[str, Any]:
    target: Any = node.target
    if node.op == "call_function":
        target = ops.target_name(node.target)
        if ops.is_named_tuple(node.target):
            made: Any = node.target
            target = {"named": made.__name__, "fields": list(made._fields)}
        if target is None:
            raise ArtifactError(
                f"node {node.name!r} calls {node.target!r}, which is not in the op table and cannot be saved without code."
            )
    meta = {key: node.meta[key] for key in _KEPT_META if key in node.meta}
    meta["tensor_meta"] = _meta_data(node.meta.get("tensor_meta"))
    meta["owner"] = ops.owner_name(node)
    return {
        "op": node.op,
        "name": node.name,
        "target": target,
        "args": encode(tuple(node.args)),
        "kwargs": encode(dict(node.kwargs)),
        "meta": meta,
    }


def _build_graph_module(
    data: dict[str, Any], tensors: Tensors, modules: Mapping[str, nn.Module], prefix: str
) -> fx.GraphModule:
    root = nn.Module()
    _restore(root, data, tensors, modules, prefix)
    graph = fx.Graph()
    if data["pytree"]:
        tree = data["pytree"]
        specs = [pytree.treespec_loads(tree[side]) if tree[side] else None for side in ("in", "out")]
        graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(tree["names"], *specs)))  # type: ignore[arg-type]
    nodes: dict[str, fx.Node] = {}
    for entry in data["nodes"]:
        nodes[entry["name"]] = _build_node(graph, entry, nodes)
    module = TracedModule(root, graph, str(data["name"]))
    module.meta.update(stage=data["stage"], rungs=())
    for key in ("quantization", "pruning"):
        if data.get(key) is not None:
            module.meta[key] = data[key]
    module.training = data["training"]
    return module


def _build_node(graph: fx.Graph, entry: dict[str, Any], nodes: dict[str, fx.Node]) -> fx.Node:
    target = entry["target"]
    _check_target(entry["op"], target)
    if isinstance(target, dict):
        target = _named_tuple(target["named"], tuple(target["fields"]))
    elif entry["op"] == "call_function":
        target = ops.target_by_name(target)
    args, kwargs = decode(entry["args"], nodes), decode(entry["kwargs"], nodes)
    node = graph.create_node(entry["op"], target, args, kwargs, name=entry["name"])
    meta = dict(entry["meta"])
    node.meta["tensor_meta"] = _build_meta(meta.pop("tensor_meta"))
    owner = meta.pop("owner")
    if owner:
        node.meta["nn_module_stack"] = {owner: (owner, None)}
    node.meta.update({key: value for key, value in meta.items() if key in _KEPT_META})
    return node


def _check_target(op: str, target: Any) -> None:
    if isinstance(target, dict):
        return
    if op == "call_function" and ops.target_by_name(target) is None:
        raise ArtifactError(f"the saved graph calls {target!r}, which is not an operator of the op table.")
    if op == "call_method" and (target.startswith("_") and not ops.is_known_method(target)):
        raise ArtifactError(f"the saved graph calls the method {target!r}, which is not a tensor operator.")
    if op == "call_method" and not hasattr(torch.Tensor, target):
        raise ArtifactError(f"the saved graph calls the method {target!r}, which tensors do not have.")


def _meta_data(meta: Any) -> Any:
    if isinstance(meta, TensorMetadata):
        return {"shape": list(meta.shape), "dtype": str(meta.dtype).removeprefix("torch.")}
    if isinstance(meta, (tuple, list)):
        return [_meta_data(item) for item in meta]
    if isinstance(meta, dict):
        return {"items": [[key, _meta_data(item)] for key, item in meta.items()]}
    return None


def _build_meta(data: Any) -> Any:
    if isinstance(data, list):
        return tuple(_build_meta(item) for item in data)
    if isinstance(data, dict) and "items" in data:
        return {key: _build_meta(item) for key, item in data["items"]}
    if isinstance(data, dict):
        return TensorMetadata(torch.Size(data["shape"]), getattr(torch, data["dtype"]), False, (), None, False, {})
    return None


@functools.cache
def _classes() -> dict[str, type[nn.Module]]:
    """Classes that may be built from data: the op table's, plain layers of torch.nn, and our own observers."""
    observer = importlib.import_module("fxcompress.quantization.observer").ActivationObserver
    fake = importlib.import_module("fxcompress.quantization.fake_quant")
    layers = [cls for cls in vars(nn).values() if isinstance(cls, type) and issubclass(cls, nn.Module)]
    named = {
        f"{cls.__module__}.{cls.__qualname__}": cls
        for cls in [*layers, observer, *fake.CLASSES, *recurrent.CLASSES.values()]
    }
    return {**named, **ops.known_classes()}


def _resolve_class(name: str) -> type[nn.Module]:
    if name in _classes():
        return _classes()[name]
    if name in ops.known_class_names():
        package, _, cls = name.rpartition(".")
        return getattr(importlib.import_module(package), cls)  # type: ignore[no-any-return]
    raise ArtifactError(f"the saved model has a layer of class {name!r}, which is not in the allow-list.")


_RECURRENT = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
_CONSTRUCTED: dict[type, tuple[str, ...]] = {
    nn.LSTM: (*_RECURRENT, "proj_size"),
    nn.GRU: _RECURRENT,
    nn.RNN: (*_RECURRENT, "nonlinearity"),
}
"""Layers that keep more than plain attributes, with the arguments of their constructor."""

_TORCH_VALUES: dict[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]] = {
    "dtype": (torch.dtype, lambda v: str(v).removeprefix("torch."), lambda s: getattr(torch, s)),
    "device": (torch.device, str, torch.device),
    "memory_format": (torch.memory_format, lambda v: str(v).removeprefix("torch."), lambda s: getattr(torch, s)),
    "layout": (torch.layout, lambda v: str(v).removeprefix("torch."), lambda s: getattr(torch, s)),
}


def encode(value: Any) -> Any:
    """A node argument or attribute as JSON. Raises ArtifactError for what has no plain form."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [encode(v) for v in value]}
    if isinstance(value, (list, range)):
        return [encode(v) for v in value]
    if isinstance(value, dict):
        return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(v) for v in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    for word, (kind, write, _) in _TORCH_VALUES.items():
        if isinstance(value, kind):
            return {word: write(value)}
    name = ops.target_name(value) if callable(value) else None
    if name is None:
        raise ArtifactError(f"a {type(value).__name__} ({value!r}) has no plain form.")
    return {"operator": name}


def decode(data: Any, nodes: Mapping[str, fx.Node] | None = None) -> Any:
    """The inverse of :func:`encode`; node references resolve in ``nodes``."""
    if isinstance(data, list):
        return [decode(v, nodes) for v in data]
    if not isinstance(data, dict):
        return data
    if "node" in data:
        return (nodes or {})[data["node"]]
    if "tuple" in data:
        return tuple(decode(v, nodes) for v in data["tuple"])
    if "dict" in data:
        return {decode(k, nodes): decode(v, nodes) for k, v in data["dict"]}
    if "slice" in data:
        return slice(*(decode(v, nodes) for v in data["slice"]))
    if "ellipsis" in data:
        return ...
    if "float" in data:
        return float(data["float"])
    if "operator" in data:
        return ops.target_by_name(data["operator"])
    for word, (kind, _, read) in _TORCH_VALUES.items():
        if word in data:
            value = read(data[word])
            if isinstance(value, kind):
                return value
    raise ArtifactError(f"the saved model holds {data!r}, which nothing here reads.")


@functools.cache
def _named_tuple(name: str, fields: tuple[str, ...]) -> Any:
    """A named tuple like the one a model returned; its class lives in the model's code, which is not saved."""
    return collections.namedtuple(name, fields)
