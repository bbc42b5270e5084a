"""Zeros among the weights of a model, as they are computed with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.utils import parametrize

from fxcompress.graph import edit, ops
from fxcompress.graph.island import regions
from fxcompress.graph.tree import parts, tensors

__all__ = ["sparsity", "weights_of"]


def sparsity(model: torch.nn.Module) -> float:
    """Share of zeros among the elements of weights (tensors of two or more dimensions called ``weight``), masks applied."""
    weights = list(weights_of(model).values())
    total = sum(t.numel() for t in weights)
    return sum(t.numel() - _filled(t) for t in weights) / total if total else 0.0


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Layer → its weight as it is used, masks applied; of two or more dimensions, shared ones once."""
    named = {name: tensor for name, tensor, _ in tensors(model) if name.endswith("weight")}
    names = {id(tensor): name.removesuffix(".weight") for name, tensor in named.items()}
    used: dict[int, Any] = {id(tensor): tensor for tensor in named.values()}
    for name, module in parts(model).items():
        if "parametrizations" in module._modules and parametrize.is_parametrized(module, "weight"):
            held: Any = module.parametrizations
            names[id(held.weight)], used[id(held.weight)] = name, module.weight
    for graph in regions(model).values():
        for mask in (ops.read(node) for node in graph.graph.nodes if ops.kind(node) == "mask"):
            if mask is not None and isinstance(mask["input"], ops.Attr):
                weight = edit.get_tensor(graph, mask["input"].name)
                names.setdefault(id(weight), mask["input"].name.removesuffix(".weight"))
                used[id(weight)] = weight * edit.get_tensor(graph, mask["mask"].name)
    return {names[key]: tensor for key, tensor in used.items() if tensor.dim() > 1 and not tensor.is_meta}


def _filled(tensor: torch.Tensor) -> int:
    """How many elements are not zero; several times faster than ``torch.count_nonzero`` on a CPU."""
    flags = tensor.detach().bool()
    return int(torch.count_nonzero(flags)) if flags.is_cuda else int(np.count_nonzero(flags.cpu().numpy()))
