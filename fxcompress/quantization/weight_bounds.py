"""int8 weights that were quantized for a CPU that cannot saturate, made safe for one that can."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.backends.base import Backend
from fxcompress.backends.saturation import largest_activation
from fxcompress.graph import edit, ops, qdq
from fxcompress.graph.recurrent import QuantizedRecurrent
from fxcompress.quantization.placement import weight_options
from fxcompress.quantization.weights import quantize_weight

__all__ = ["bound_weights"]


def bound_weights(module: fx.GraphModule, backend: Backend, settings: Mapping[str, Any]) -> list[str]:
    """Put weights that 8-bit activations could saturate on coarser scales; returns their names.

    ``module`` is a quantize/dequantize graph. Tensors are replaced, never written to.
    """
    found = [*_of_graph(module, backend, settings), *_of_recurrent(module)]
    return [name for name, axis, adjacent in found if _bound(module, name, axis, adjacent)]


def _of_graph(module: fx.GraphModule, backend: Backend, settings: Mapping[str, Any]) -> Iterator[tuple[str, int, bool]]:
    """Name, axis of output channels, and whether pairs are known to be neighbours, of weights that kernels read."""
    for node in module.graph.nodes:
        if node.target is qdq.dequantize_per_channel:
            calls = [ops.read(user) for user in node.users if user.meta.get("integer")]
            known = [weight_options(call, backend, settings)["adjacent"] for call in calls if call is not None]
            if known:
                yield str(node.args[0].target), node.args[2], all(known)


def _of_recurrent(module: nn.Module) -> Iterator[tuple[str, int, bool]]:
    for path, layer in module.named_modules():
        if isinstance(layer, QuantizedRecurrent):
            for suffix in layer.suffixes():
                yield from ((f"{path}.weight_{side}{suffix}", 0, True) for side in ("ih", "hh"))


def _bound(module: nn.Module, name: str, axis: int, adjacent: bool) -> bool:
    levels, scale = edit.get_tensor(module, name), edit.get_tensor(module, f"{name}_scale")
    if levels.dtype != torch.int8 or largest_activation(levels, axis, adjacent=adjacent) >= 255:
        return False
    zero_point = _zero_point(module, name)
    exact = levels.to(torch.float64)
    exact = exact if zero_point is None else exact - qdq.along(zero_point.to(torch.float64), levels.dim(), axis)
    options = {"per_channel": scale.numel() > 1, "symmetric": zero_point is None, "adjacent": adjacent}
    exact = exact * qdq.along(scale.to(torch.float64), levels.dim(), axis)
    coarser = quantize_weight(exact, axis, bound_pairs=True, **options)
    for suffix, tensor in zip(("", "_scale", "_zero_point"), coarser, strict=True):
        if tensor is not None:
            edit.set_tensor(module, f"{name}{suffix}", tensor, buffer=True)
    return True


def _zero_point(module: nn.Module, name: str) -> Tensor | None:
    path, _, leaf = f"{name}_zero_point".rpartition(".")
    found: Tensor | None = getattr(module.get_submodule(path), leaf, None)
    return found
