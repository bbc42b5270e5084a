"""cast-single: a model in another number type computes in single precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.passes.shape_prop import TensorMetadata
from torch.utils import _pytree as pytree

from fxcompress.graph import ops
from fxcompress.graph.shapes import is_meta, module_of, tensor_meta
from fxcompress.pass_base import APPROXIMATE, Context, Pass, Promise

__all__ = ["CastSingle"]

OTHERS = (torch.float16, torch.bfloat16, torch.float64)
_METHODS = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float64: "double"}


@dataclass(frozen=True)
class CastSingle(Pass):
    """Compute a model of half, bfloat16 or double numbers in float32; its inputs and outputs keep their type.

    Parameters and buffers become float32, and so does what the graph casts to their type; every input is cast once and every
    output back. A model in float32 stays as it is. Left alone, with the reason: a graph whose inputs are not known, and code
    that stays Python (an island).
    """

    name: ClassVar[str] = "cast-single"
    promise: ClassVar[Promise] = APPROXIMATE

    def run(self, module: fx.GraphModule, context: Context) -> None:
        found = {parameter.dtype for parameter in module.parameters()} & set(OTHERS)
        if not found:
            return
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        reason = _obstacle(module)
        if reason:
            context.skip("", f"the model is {names} and stays so: {reason}")
            return
        results = {leaf: meta.dtype for leaf in _results(module) if (meta := tensor_meta(leaf)) and meta.dtype in OTHERS}
        module._apply(lambda tensor: tensor.to(_single(tensor.dtype)))
        for node in list(module.graph.nodes):
            if node.op.startswith("call"):
                _respell(node)
            if node.op not in ("placeholder", "output") and "tensor_meta" in node.meta:
                node.meta["tensor_meta"] = _in_single(node.meta["tensor_meta"])
        for node in module.graph.find_nodes(op="placeholder"):
            if (meta := tensor_meta(node)) and meta.dtype in OTHERS:
                _cast(node, torch.float32, list(node.users))
        output = next(iter(module.graph.find_nodes(op="output")))
        for leaf, dtype in results.items():
            _cast(leaf, dtype, [output])
        context.note("", f"the model is {names}: it computes in float32, and its inputs and outputs keep their type")


def _obstacle(module: fx.GraphModule) -> str | None:
    """Why a graph cannot be cast, or None."""
    for node in module.graph.nodes:
        metas = list(_metas(node.meta.get("tensor_meta")))
        if node.op == "placeholder" and node.users and "tensor_meta" not in node.meta:
            return f"which of its inputs are numbers is not known (example_inputs tell): {node.target!r}"
        if node.op == "placeholder" and tensor_meta(node) is None and any(meta.dtype in OTHERS for meta in metas):
            return f"its input {node.target!r} is a container"
        if node.op == "call_module" and ops.lookup(node) is None and next(module_of(node).parameters(), None) is not None:
            return f"{node.target!r} is code that stays Python (an island)"
    return None


def _metas(value: Any) -> Iterator[TensorMetadata]:
    yield from filter(is_meta, pytree.tree_leaves(value, is_leaf=is_meta))


def _in_single(value: Any) -> Any:
    def cast(meta: TensorMetadata) -> TensorMetadata:
        return meta._replace(dtype=_single(meta.dtype))

    return pytree.tree_map_only(TensorMetadata, cast, value, is_leaf=is_meta)


def _respell(node: fx.Node) -> None:
    """Let a call that casts to another type, or makes tensors of it, do so in float32."""
    if node.op == "call_method" and node.target in _METHODS.values():
        node.target = "float"
    node.args, node.kwargs = pytree.tree_map_only(torch.dtype, _single, (tuple(node.args), dict(node.kwargs)))


def _single(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in OTHERS else dtype


def _results(module: fx.GraphModule) -> list[fx.Node]:
    output = next(iter(module.graph.find_nodes(op="output")))
    return list(output.all_input_nodes)


def _cast(node: fx.Node, dtype: torch.dtype, readers: list[fx.Node]) -> None:
    """Let ``readers`` read the value in another type."""
    with node.graph.inserting_after(node):
        made = node.graph.call_method("to", (node, dtype))
    meta = tensor_meta(node)
    made.meta["tensor_meta"] = meta._replace(dtype=dtype) if meta is not None else None
    for reader in readers:
        reader.replace_input_with(node, made)
