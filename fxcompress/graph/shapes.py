"""What a graph says of its values: shapes and dtypes, noted under the nodes.

Each node's ``meta["tensor_meta"]`` holds fx's ``TensorMetadata`` (or a tuple, list or dict of them), the place other fx
tools look for it. :func:`~fxcompress.graph.meta_run.propagate` writes it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import TensorMetadata

from fxcompress.graph.inputs import Arguments
from fxcompress.graph.tree import submodule

__all__ = ["describe", "dtype_of", "example_of", "is_meta", "module_of", "shape_of", "tensor_meta"]


_LEVELS = {torch.quint8: torch.uint8, torch.qint8: torch.int8}


def describe(value: Any) -> Any:
    """The metadata of a value: of each tensor in its structure, None for anything else.

    A quantized tensor has the dtype of its levels, which fx's printer knows, and says ``is_quantized``.
    """
    if isinstance(value, torch.Tensor):
        dtype = _LEVELS.get(value.dtype, value.dtype)
        return TensorMetadata(torch.Size(value.shape), dtype, value.requires_grad, (), None, value.is_quantized, {})
    if isinstance(value, (tuple, list)):
        return tuple(describe(item) for item in value)
    if isinstance(value, dict):
        return {key: describe(item) for key, item in value.items()}
    return None


def example_of(module: fx.GraphModule) -> Arguments | None:
    """Zeros of the shapes that a graph was traced with, as one call; None where it does not say."""
    inputs = [node for node in module.graph.nodes if node.op == "placeholder" and not node.args]
    metas = [tensor_meta(node) for node in inputs]
    if not metas or any(meta is None for meta in metas) or len(metas) > len(inspect.signature(module.forward).parameters):
        return None
    return Arguments(tuple(torch.zeros(meta.shape, dtype=meta.dtype, device="cpu") for meta in metas if meta), {})


def tensor_meta(node: fx.Node) -> TensorMetadata | None:
    """The metadata of a node whose value is one tensor; None where it is unknown or something else."""
    meta = node.meta.get("tensor_meta")
    return meta if isinstance(meta, TensorMetadata) else None


def is_meta(value: Any) -> bool:
    """Whether ``value`` is the metadata of one tensor, and not of several in a container."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def shape_of(node: fx.Node) -> torch.Size | None:
    """The shape of a node whose value is one tensor; None where it is unknown or something else."""
    meta = tensor_meta(node)
    return meta.shape if meta else None


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype of a node whose value is one tensor; None where it is unknown or something else."""
    meta = tensor_meta(node)
    return meta.dtype if meta else None


def module_of(node: fx.Node) -> nn.Module:
    """The module a ``call_module`` node calls."""
    owner = node.graph.owning_module
    found = submodule(owner, str(node.target)) if owner is not None else None
    assert found is not None, node.target
    return found
