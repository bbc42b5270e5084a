"""The nodes of a graph as plain data, and back."""

from __future__ import annotations

import collections
import functools
import keyword
from typing import Any

import torch
from torch import fx
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.fx.passes.shape_prop import TensorMetadata
from torch.utils import _pytree as pytree

from fxcompress.errors import ArtifactError
from fxcompress.graph import ops, spellings
from fxcompress.graph.treespec import read_spec
from fxcompress.serial.records import build_record, is_record, record_data
from fxcompress.serial.values import decode, encode

__all__ = ["build_graph", "graph_data"]

_KEPT_META = ("integer", "float", "macs", "observer", "kind", "taps", "weight_grid")


def graph_data(module: fx.GraphModule) -> dict[str, Any]:
    """The nodes of ``module``, its calling convention, and what its metadata say of the stages it has been through."""
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
        target = spellings.target_name(node.target)
        if spellings.is_named_tuple(node.target):
            made: Any = node.target
            target = {"named": made.__name__, "fields": list(made._fields)}
        elif is_record(node.target):
            target = record_data(node.target)
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


def build_graph(data: dict[str, Any]) -> fx.Graph:
    """The graph that :func:`graph_data` described, without the module that owns it."""
    graph = fx.Graph()
    if data["pytree"]:
        graph.set_codegen(_PyTreeCodeGen(_calling(data["pytree"])))
    nodes: dict[str, fx.Node] = {}
    for entry in data["nodes"]:
        nodes[entry["name"]] = _build_node(graph, entry, nodes)
    return graph


def _calling(tree: dict[str, Any]) -> _PyTreeInfo:
    """How a graph with containers among its arguments is called."""
    taken, returned = (read_spec(tree[side]) if tree[side] else None for side in ("in", "out"))
    for name in tree["names"]:
        _check_word(name)
    parts = taken.children() if taken is not None else []
    if [part.type for part in parts] == [tuple, dict]:  # fx takes these for arguments by position and by keyword
        for key in parts[1].context:
            _check_quoted(key, "'")
    return _PyTreeInfo(tree["names"], taken, returned)  # type: ignore[arg-type]


def _build_node(graph: fx.Graph, entry: dict[str, Any], nodes: dict[str, fx.Node]) -> fx.Node:
    target = entry["target"]
    _check_target(entry["op"], target)
    if isinstance(target, dict):
        build = _named_tuple if "named" in target else build_record
        target = build(*(tuple(part) if isinstance(part, list) else part for part in target.values()))
    elif entry["op"] == "call_function":
        target = spellings.target_by_name(target)
    args, kwargs = decode(entry["args"], nodes), decode(entry["kwargs"], nodes)
    for key in kwargs:
        _check_word(key)
    if target is getattr and (not isinstance(args[1], str) or args[1].startswith("_")):
        raise ArtifactError(f"the saved graph reads the attribute {args[1]!r}, which is none of a tensor.")
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
    if op == "placeholder":
        _check_word(target.removeprefix("*").removeprefix("*"))
    if op in ("call_module", "get_attr"):
        _check_quoted(target, '"')
    if op == "call_function" and spellings.target_by_name(target) is None:
        raise ArtifactError(f"the saved graph calls {target!r}, which is not an operator of the op table.")
    if op == "call_method" and (target.startswith("_") and not spellings.is_known_method(target)):
        raise ArtifactError(f"the saved graph calls the method {target!r}, which is not a tensor operator.")
    if op == "call_method" and not hasattr(torch.Tensor, target):
        raise ArtifactError(f"the saved graph calls the method {target!r}, which tensors do not have.")


def _check_word(name: Any) -> None:
    """Refuse a name that does not stand in code as a name: fx writes these into the code of ``forward`` as they are."""
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise ArtifactError(f"the saved graph has an argument {name!r}, which is no name.")


def _check_quoted(name: Any, quote: str) -> None:
    """Refuse text that does not stay between two of these quotes, which fx puts around what is no name."""
    if not str(name).isprintable() or not {quote, "\\"}.isdisjoint(str(name)):
        raise ArtifactError(f"the saved graph names {name!r}, which is no part of a model.")


@functools.cache
def _named_tuple(name: str, fields: tuple[str, ...]) -> Any:
    """A named tuple like the one a model returned; its class lives in the model's code, which is not saved."""
    return collections.namedtuple(name, fields)


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
