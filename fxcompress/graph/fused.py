"""A weighted operator, or an addition, with its activation: one node instead of two.

Each is the original operator with one more argument, so the op table reads both alike and the arithmetic is unchanged bit
for bit. Module forms keep the parameter names of the module they replace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "FUNCTIONS", "GEOMETRY", "MODULES", "fuse_module", "make_functional"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu_, "relu6": lambda x: F.relu6(x, inplace=True)}
"""Activations, applied in place: the value before one belongs to the fused operator alone."""


class _Fused(nn.Module):
    """Mixed in before a layer class: the layer, then its activation."""

    activation: str = "relu"

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return ACTIVATIONS[self.activation](super().forward(input, *args, **kwargs))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class ConvActivation1d(_Fused, nn.Conv1d):
    """Conv1d, then its activation."""


class ConvActivation2d(_Fused, nn.Conv2d):
    """Conv2d, then its activation."""


class ConvActivation3d(_Fused, nn.Conv3d):
    """Conv3d, then its activation."""


class ConvTransposeActivation1d(_Fused, nn.ConvTranspose1d):
    """ConvTranspose1d, then its activation."""


class ConvTransposeActivation2d(_Fused, nn.ConvTranspose2d):
    """ConvTranspose2d, then its activation."""


class ConvTransposeActivation3d(_Fused, nn.ConvTranspose3d):
    """ConvTranspose3d, then its activation."""


class LinearActivation(_Fused, nn.Linear):
    """Linear, then its activation."""


MODULES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: ConvActivation1d,
    nn.Conv2d: ConvActivation2d,
    nn.Conv3d: ConvActivation3d,
    nn.ConvTranspose1d: ConvTransposeActivation1d,
    nn.ConvTranspose2d: ConvTransposeActivation2d,
    nn.ConvTranspose3d: ConvTransposeActivation3d,
    nn.Linear: LinearActivation,
}
"""Class of layers → the same with an activation."""


def fuse_module(module: nn.Module, activation: str) -> None:
    """Turn ``module`` into its fused form in place; parameters, buffers, hooks and names stay."""
    module.__class__ = MODULES[type(module)]
    module.activation = activation  # type: ignore[assignment]


def _activated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that computes ``function`` and then its ``activation``, under the same name."""

    def activated(input: Tensor, *args: Any, activation: str, **options: Any) -> Tensor:
        return ACTIVATIONS[activation](function(input, *args, **options))

    activated.__name__ = activated.__qualname__ = function.__name__
    return activated


conv1d = _activated(F.conv1d)
conv2d = _activated(F.conv2d)
conv3d = _activated(F.conv3d)
conv_transpose1d = _activated(F.conv_transpose1d)
conv_transpose2d = _activated(F.conv_transpose2d)
conv_transpose3d = _activated(F.conv_transpose3d)
linear = _activated(F.linear)


def add(input: Tensor, other: Tensor, *, activation: str) -> Tensor:
    """The sum, then its activation."""
    return ACTIVATIONS[activation](torch.add(input, other))


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d, linear, add)
}
"""Kind → the function that joins it with an activation."""

GEOMETRY: dict[str, tuple[str, ...]] = {
    "linear": (),
    **{f"conv{d}d": ("stride", "padding", "dilation", "groups") for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": ("stride", "padding", "output_padding", "groups", "dilation") for d in (1, 2, 3)},
}
"""Kind of weighted operator → its arguments beside input, weight and bias, in the order of torch's function."""


def make_functional(call: Any, weight: fx.Node, bias: fx.Node | None) -> None:
    """Respell a weighted :class:`~fxcompress.graph.ops.Call` as a function of its weight and bias."""
    node, input = call.node, call["input"]
    geometry = tuple(call[name] for name in GEOMETRY[call.kind])
    if call["activation"]:
        node.target, node.kwargs = FUNCTIONS[call.kind], {"activation": call["activation"]}
    else:
        node.target, node.kwargs = getattr(F, call.kind), {}
    node.op, node.args = "call_function", (input, weight, bias, *geometry)
