"""Layers that run in integers: int8 weights packed for the engine in use, a fixed output scale and zero point.

The int8 weight, its scales and the bias are buffers, so that a layer copies, pickles and counts like any other; the packed
form is made from them when the layer is built, copied or unpickled.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.backends.cpu import has_vnni
from fxcompress.graph.qdq import along

__all__ = [
    "FLOAT_RESULT",
    "LAYERS",
    "QuantizedBatchNorm",
    "QuantizedLayer",
    "engine_of",
    "in_one_layout",
    "mean_of_levels",
    "pooled_levels",
    "quantize_input",
    "quantized_weight",
    "with_room_for",
    "x86_engine",
]


def _hear_deprecation_once() -> None:
    """torch says once per process that quantized tensor types are deprecated; this is the one place that uses them.

    They sit behind this module alone, so that another set of kernels can take their place.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.quantize_per_tensor(torch.zeros(1, dtype=torch.float32, device="cpu"), 1.0, 0, torch.quint8)


_hear_deprecation_once()


def x86_engine() -> str:
    """The engine whose kernels are fastest on this x86 CPU: oneDNN's where it has VNNI, FBGEMM's elsewhere."""
    supported = torch.backends.quantized.supported_engines
    return "x86" if has_vnni() and "x86" in supported else "fbgemm"


def _engine_for(kind: str, engine: str, groups: int, affine: bool) -> str:
    """The engine to pack a layer for, where torch's own choice for ``x86`` computes something else than the layer.

    Transposed convolutions of oneDNN mix up their channels, FBGEMM's do not; FBGEMM's kernels for one channel per group,
    which torch takes from 101 groups on, add in 16 bits on any CPU, oneDNN's do not. Affine weights are FBGEMM's alone.
    """
    if engine != "x86":
        return engine
    if kind.startswith("conv_transpose") or affine:
        return "fbgemm"
    return "onednn" if groups > _MOST_GROUPS else engine


_MOST_GROUPS = 100
"""Of a convolution that torch's engine ``x86`` gives to oneDNN."""


@contextmanager
def engine_of(name: str) -> Iterator[None]:
    """Pack weights for this engine inside a ``with``."""
    previous = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = previous


class QuantizedLayer(nn.Module):
    """A weighted operator on quint8 tensors.

    ``weight``        int8, as the float layer had it
    ``weight_scale``  float32, one per output channel, or one in all; ``weight_zero_point`` likewise, int8, or None for 0
    ``bias``          float32 or None; kernels hold it as int32 in units of input scale times weight scale
    ``scale``         of the result, with ``zero_point``; None: the result is float
    ``taken``         with a float result, the (scale, zero point) to quantize a float input by; None: the input is quint8
    ``engine``        whose kernels run
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        kind: str,
        weight: Tensor,
        weight_scale: Tensor,
        weight_zero_point: Tensor | None,
        axis: int,
        bias: Tensor | None,
        geometry: dict[str, Any],
        activation: str | None,
        scale: float | None,
        zero_point: int | None,
        taken: tuple[float, int] | None = None,
        engine: str = "fbgemm",
    ) -> None:
        super().__init__()
        self.kind, self.axis, self.geometry, self.activation = kind, axis, geometry, activation
        self.scale, self.zero_point, self.taken, self.engine = scale, zero_point, taken, engine
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("weight_zero_point", weight_zero_point)
        self.register_buffer("bias", bias)
        self._pack()

    def _pack(self) -> None:
        prepack, kernels = LAYERS[self.kind]
        affine = self.weight_zero_point is not None
        with engine_of(_engine_for(self.kind, self.engine, self.geometry.get("groups", 1), affine)):
            weight = quantized_weight(self.weight, self.weight_scale, self.weight_zero_point, self.axis)
            self.packed = prepack(weight, self.bias, self.geometry)
        self.kernel = kernels[self.activation] if self.scale is not None else FLOAT_RESULT[self.kind][self.activation]

    def forward(self, input: Tensor) -> Tensor:
        if self.scale is not None:
            return self.kernel(input, self.packed, self.scale, self.zero_point)
        if self.taken is not None:
            return self.kernel(input, *self.taken, self.packed)
        return self.kernel(input.dequantize(), input.q_scale(), input.q_zero_point(), self.packed)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("packed", "kernel")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()

    def extra_repr(self) -> str:
        shape = "×".join(map(str, self.weight.shape))
        result = "float result" if self.scale is None else f"scale={self.scale:.4g}, zero_point={self.zero_point}"
        return f"{self.kind} {shape}, activation={self.activation}, {result}"


def quantized_weight(weight: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int) -> Tensor:
    """int8 levels as the quantized tensor that prepacking takes."""
    zeros = torch.zeros(scale.numel(), dtype=torch.int64, device="cpu") if zero_point is None else zero_point.to(torch.int64)
    if scale.numel() == 1:
        return torch._make_per_tensor_quantized_tensor(weight, float(scale), int(zeros))
    return torch._make_per_channel_quantized_tensor(weight, scale.to(torch.float64), zeros, axis)


def with_room_for(
    bias: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, input_scale: float
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Levels, scale, zero point and axis of a weight, on a coarser scale where the bias would not fit into int32.

    QNNPACK holds a bias in units of input scale times weight scale. A channel that batch normalisation has all but silenced
    has a scale so small that its bias overflows, and next to that bias its weights hardly count.
    """
    least = (bias.detach().abs() / (_LARGEST_BIAS * input_scale)).to(scale)
    least = least if scale.numel() > 1 else least.amax().reshape(1)
    if zero_point is not None or not bool((scale < least).any()):
        return weight, scale, zero_point, axis
    coarser = torch.maximum(scale, least)
    levels = torch.round(weight * along(scale / coarser, weight.dim(), axis)).to(torch.int8)
    return levels, coarser, zero_point, axis


_LARGEST_BIAS = 2.0**30


def _pack_linear(weight: Tensor, bias: Tensor | None, geometry: dict[str, Any]) -> Any:
    return torch.ops.quantized.linear_prepack(weight, bias)


def _pack_conv(dims: int) -> Callable[[Tensor, Tensor | None, dict[str, Any]], Any]:
    prepack = getattr(torch.ops.quantized, f"conv{dims}d_prepack")

    def pack(weight: Tensor, bias: Tensor | None, geometry: dict[str, Any]) -> Any:
        places = [geometry[name] for name in ("stride", "padding", "dilation")]
        return prepack(weight, bias, *places, geometry["groups"])

    return pack


def _pack_conv_transpose(dims: int) -> Callable[[Tensor, Tensor | None, dict[str, Any]], Any]:
    prepack = getattr(torch.ops.quantized, f"conv_transpose{dims}d_prepack")

    def pack(weight: Tensor, bias: Tensor | None, geometry: dict[str, Any]) -> Any:
        places = [geometry[name] for name in ("stride", "padding", "output_padding", "dilation")]
        return prepack(weight, bias, *places, geometry["groups"])

    return pack


def _then_relu(kernel: Any) -> Any:
    """A kernel that has no fused form, and ReLU after it."""

    def run(*args: Any) -> Tensor:
        return torch.relu(kernel(*args))

    return run


def _with_relu(kernel: Any) -> dict[str | None, Any]:
    return {None: kernel, "relu": _then_relu(kernel)}


_q = torch.ops.quantized
_Prepack = Callable[[Tensor, "Tensor | None", dict[str, Any]], Any]

LAYERS: dict[str, tuple[_Prepack, dict[str | None, Any]]] = {
    "linear": (_pack_linear, {None: _q.linear.default, "relu": _q.linear_relu.default}),
    "conv1d": (_pack_conv(1), {None: _q.conv1d.default, "relu": _q.conv1d_relu.default}),
    "conv2d": (_pack_conv(2), {None: _q.conv2d.new, "relu": _q.conv2d_relu.new}),
    "conv3d": (_pack_conv(3), {None: _q.conv3d.new, "relu": _q.conv3d_relu.new}),
    "conv_transpose1d": (_pack_conv_transpose(1), _with_relu(_q.conv_transpose1d.default)),
    "conv_transpose2d": (_pack_conv_transpose(2), _with_relu(_q.conv_transpose2d.default)),
}
"""Kind → how its weight is packed, and its kernel per fused activation."""

FLOAT_RESULT: dict[str, dict[str | None, Any]] = {
    "linear": {
        None: _q.linear_with_input_q_dq_qweight_dq_output_fp32.default,
        "relu": _q.linear_with_input_q_dq_qweight_dq_relu_output_fp32.default,
    }
}
"""Kind → its kernel with a float result: takes float and quantizes it on the way."""


def quantize_input(input: Tensor, scale: float, zero_point: int) -> Tensor:
    """A float tensor as quint8, images and volumes in the channels-last layout the kernels work in."""
    if input.dim() == 4:
        input = input.contiguous(memory_format=torch.channels_last)
    elif input.dim() == 5:
        input = input.contiguous(memory_format=torch.channels_last_3d)
    return torch.quantize_per_tensor(input, scale, zero_point, torch.quint8)


def in_one_layout(input: Tensor) -> Tensor:
    """A quint8 image or volume whose strides are those of channels-last memory, where its values lie like that.

    A dimension of one may have any stride; torch's kernels that pool and resample take such a value for one layout and their
    result for the other.
    """
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.dim())
    if layout is None or not input.is_contiguous(memory_format=layout):
        return input
    strides = torch.empty(input.shape, dtype=torch.float32, device="meta", memory_format=layout).stride()
    return input if input.stride() == strides else input.as_strided(input.shape, strides)


def mean_of_levels(input: Tensor, dim: int | list[int], keepdim: bool, scale: float, zero_point: int) -> Tensor:
    """The mean of a quint8 tensor over some dimensions, on a grid of its own: torch's kernels keep the input's."""
    return quantize_input(input.dequantize().mean(dim, keepdim), scale, zero_point)


def pooled_levels(input: Tensor, size: Any, scale: float, zero_point: int) -> Tensor:
    """A quint8 image pooled to means of its regions, ``size`` of them, on a grid of its own."""
    return quantize_input(nn.functional.adaptive_avg_pool2d(input.dequantize(), size), scale, zero_point)


class QuantizedBatchNorm(nn.Module):
    """Batch normalisation in eval mode on quint8 images (``dims`` 2) or volumes (3).

    ``tensors``  weight, bias, running mean and running variance, [channels] each
    ``scale``    of the result, with ``zero_point``
    """

    def __init__(
        self, tensors: tuple[Tensor, Tensor, Tensor, Tensor], eps: float, dims: int, scale: float, zero_point: int
    ) -> None:
        super().__init__()
        for name, value in zip(("weight", "bias", "running_mean", "running_var"), tensors, strict=True):
            self.register_buffer(name, value.detach())
        self.eps, self.dims, self.scale, self.zero_point = eps, dims, scale, zero_point

    def forward(self, input: Tensor) -> Tensor:
        kernel = _q.batch_norm2d if self.dims == 2 else _q.batch_norm3d
        statistics = (self.weight, self.bias, self.running_mean, self.running_var)
        return kernel(input, *statistics, self.eps, self.scale, self.zero_point)
