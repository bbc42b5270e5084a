"""Bringing a student's feature to a teacher's: channels by a projector, space by interpolation, in this order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fxcompress.distillation.layers import Layer
from fxcompress.errors import ConfigError, brief
from fxcompress.registry import Registry

__all__ = ["PROJECTORS", "align", "build_projector", "feed"]


class _OnAxis(nn.Module):
    """A layer of the caller's for channels on another axis, where everybody else has them second."""

    def __init__(self, layer: nn.Module, axis: int) -> None:
        super().__init__()
        self.layer, self.axis = layer, axis

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.movedim(1, self.axis)).movedim(self.axis, 1)


_CONVS: tuple[Any, ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS: tuple[Any, ...] = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _conv(inputs: int, outputs: int, dims: int, kernel_size: int = 1, bias: bool = False) -> nn.Module:
    if dims == 0:
        return nn.Linear(inputs, outputs, bias=bias)
    return _CONVS[dims](inputs, outputs, kernel_size, padding=kernel_size // 2, bias=bias)


def _conv_bn(inputs: int, outputs: int, dims: int, kernel_size: int = 1) -> nn.Module:
    return nn.Sequential(_conv(inputs, outputs, dims, kernel_size), _NORMS[dims](outputs))


def _conv_bn_relu(inputs: int, outputs: int, dims: int, kernel_size: int = 1) -> nn.Module:
    return nn.Sequential(_conv(inputs, outputs, dims, kernel_size), _NORMS[dims](outputs), nn.ReLU())


def _mlp(inputs: int, outputs: int, dims: int, hidden: int | None = None) -> nn.Module:
    width = hidden or outputs
    return nn.Sequential(_conv(inputs, width, dims, bias=True), nn.ReLU(), _conv(width, outputs, dims, bias=True))


def _identity(inputs: int, outputs: int, dims: int) -> nn.Module:
    if inputs != outputs:
        raise ConfigError(f"an identity cannot bring {inputs} channels to {outputs}; leave projector out, or name another.")
    return nn.Identity()


PROJECTORS = Registry(
    "projector",
    {"conv": _conv, "conv_bn": _conv_bn, "conv_bn_relu": _conv_bn_relu, "mlp": _mlp, "identity": _identity},
)
"""Projectors by name: ``(inputs, outputs, dims, **options)`` → a module for channels-first tensors."""

Config = str | Mapping[str, Any] | nn.Module | Callable[..., nn.Module] | None


def build_projector(config: Config, student: Layer, teacher: Layer, default: str | None = None) -> nn.Module:
    """A module from the student's channels to the teacher's, for features with the channels second.

    ``config``: a name in PROJECTORS, a mapping ``{"type": name, option: value}``, or a module, which is given the feature as
    the student has it. None: ``default``, or what is needed: nothing where channels agree, a 1×1 convolution where not.

    Raises ConfigError where the shapes differ in rank, which no projector mends.
    """
    if len(student.shape) != len(teacher.shape):
        raise ConfigError(
            f"no projector aligns a feature {student.shape} of the student with {teacher.shape} of the teacher: "
            f"they have {len(student.shape)} and {len(teacher.shape)} axes. Choose layers of one kind."
        )
    if isinstance(config, nn.Module):
        return config if student.axis == 1 else _OnAxis(config, student.axis)
    inputs, outputs = student.channels, teacher.channels
    options = dict(config) if isinstance(config, Mapping) else {"type": config}
    name = options.pop("type", None) or default or ("identity" if inputs == outputs else "conv")
    if not isinstance(name, str):
        raise ConfigError(f"projector is {config!r}; it is a name, a mapping with a type, or a module.")
    try:
        return PROJECTORS[name](inputs, outputs, len(student.shape) - 2, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"projector {name!r}: {brief(error)}.") from error


def feed(layer: nn.Module, *values: Any) -> Any:
    """What ``layer`` makes of ``values``, in its own precision unless autocast says another."""
    own = next((p.dtype for p in layer.parameters()), None)

    def fitted(value: Tensor) -> Tensor:
        return value if own is None or torch.is_autocast_enabled(value.device.type) else value.to(own)

    return layer(*pytree.tree_map_only(Tensor, fitted, values))


_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def align(feature: Tensor, like: Tensor) -> Tensor:
    """``feature`` with the positions of ``like``, by (bi-, tri-)linear interpolation."""
    size = like.shape[2:]
    if feature.dim() != like.dim() or feature.dim() < 3 or feature.shape[2:] == size:
        return feature
    return F.interpolate(feature, size=size, mode=_MODES[len(size)], align_corners=False)
