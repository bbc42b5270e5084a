"""Bringing a student's feature to a teacher's: channels by a projector, space by interpolation, in this order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress.errors import ConfigError
from fxcompress.registry import Registry

__all__ = ["PROJECTORS", "align", "build_projector", "channel_axis", "channels"]

Shape = tuple[int, ...]


def channel_axis(shape: Shape, channel_dim: int | None = None) -> int:
    """Which axis holds the channels: the second; of three axes (tokens) the last; or what was said."""
    if channel_dim is not None:
        return channel_dim % len(shape)
    return 2 if len(shape) == 3 else 1


def channels(shape: Shape, channel_dim: int | None = None) -> int:
    return shape[channel_axis(shape, channel_dim)]


class _OnAxis(nn.Module):
    """A layer for channels-first tensors, applied to channels on another axis."""

    def __init__(self, layer: nn.Module, axis: int) -> None:
        super().__init__()
        self.layer, self.axis = layer, axis

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.movedim(self.axis, 1)).movedim(1, self.axis)  # type: ignore[no-any-return]


def _layer(table: tuple[type[nn.Module], ...], dims: int) -> Any:
    return table[dims]


_CONVS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _conv(inputs: int, outputs: int, dims: int, kernel_size: int = 1, bias: bool = False) -> nn.Module:
    if dims == 0:
        return nn.Linear(inputs, outputs, bias=bias)
    return _layer(_CONVS, dims)(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=bias)  # type: ignore[no-any-return]


def _conv_bn(inputs: int, outputs: int, dims: int, kernel_size: int = 1) -> nn.Module:
    return nn.Sequential(_conv(inputs, outputs, dims, kernel_size), _layer(_NORMS, dims)(outputs))


def _conv_bn_relu(inputs: int, outputs: int, dims: int, kernel_size: int = 1) -> nn.Module:
    return nn.Sequential(_conv(inputs, outputs, dims, kernel_size), _layer(_NORMS, dims)(outputs), nn.ReLU())


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


def build_projector(
    config: Config, student: Shape, teacher: Shape, channel_dim: int | None = None, default: str | None = None
) -> nn.Module:
    """A module from the student's channels to the teacher's.

    ``config``: a name in PROJECTORS, a mapping ``{"type": name, option: value}``, or a module, which is taken as it is.
    None:
    ``default``, or what is needed: nothing where channels agree, a 1×1 convolution where they do not.

    Raises ConfigError where the shapes differ in rank, which no projector mends.
    """
    if len(student) != len(teacher):
        raise ConfigError(
            f"no projector aligns a feature {student} of the student with {teacher} of the teacher: "
            f"they have {len(student)} and {len(teacher)} axes. Choose layers of one kind."
        )
    if isinstance(config, nn.Module):
        return config
    axis = channel_axis(student, channel_dim)
    inputs, outputs = student[axis], teacher[axis]
    options = dict(config) if isinstance(config, Mapping) else {"type": config}
    name = options.pop("type", None) or default or ("identity" if inputs == outputs else "conv")
    if not isinstance(name, str):
        raise ConfigError(f"projector is {config!r}; it is a name, a mapping with a type, or a module.")
    try:
        layer = PROJECTORS[name](inputs, outputs, len(student) - 2, **options)
    except TypeError as error:
        raise ConfigError(f"projector {name!r}: {error}.") from error
    return layer if axis == 1 or isinstance(layer, nn.Identity) else _OnAxis(layer, axis)


_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def align(feature: Tensor, like: Tensor, channel_dim: int | None = None) -> Tensor:
    """``feature`` with the positions of ``like``, by (bi-, tri-)linear interpolation."""
    if feature.dim() != like.dim() or feature.dim() < 3:
        return feature
    axis = channel_axis(tuple(feature.shape), channel_dim)
    size = like.movedim(axis, 1).shape[2:]
    first = feature.movedim(axis, 1)
    if first.shape[2:] == size:
        return feature
    return F.interpolate(first, size=size, mode=_MODES[len(size)], align_corners=False).movedim(1, axis)
