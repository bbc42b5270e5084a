"""Fake-quantizers: modules in an observed graph that round what passes through them onto a grid, and train along.

====================== ============================= ======================================================
class                  stands on                     its scale
====================== ============================= ======================================================
`FakeQuantize`         weights and activations       fixed
`WeightFakeQuantize`   weights                       of the weight as it is, at every step
`RangeFakeQuantize`    activations                   of a moving average of the ranges of training batches
`LearnedFakeQuantize`  weights and activations       a parameter (learned step size, Esser et al. 2020)
====================== ============================= ======================================================

A weight that batch normalisation follows is rounded as it will be folded. With γ/σ the factor of an output channel, rounding
``w·γ/σ`` with step ``s`` is rounding ``w`` with step ``s/|γ/σ|``, so the layer computes on its own weight and the
normalisation after it learns and keeps statistics as ever, at no cost per activation. Scales per channel follow the weight
anyway; one scale in all is shared out over the channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from fxcompress.graph import edit, ops
from fxcompress.graph.fakequant import fake_quantize
from fxcompress.graph.qdq import along
from fxcompress.graph.shapes import module_of
from fxcompress.quantization import moving
from fxcompress.quantization.grid import Grid
from fxcompress.quantization.weights import weight_grid

__all__ = [
    "CLASSES",
    "FakeQuantize",
    "LearnedFakeQuantize",
    "RangeFakeQuantize",
    "WeightFakeQuantize",
    "fake_quantizer",
    "fake_quantizers",
    "fixed_on_weight",
    "on_weight",
]


class FakeQuantize(nn.Module):
    """Rounds its input onto a grid with a fixed scale, while ``enabled``; see :mod:`fxcompress.graph.fakequant`.

    ``scale``       float32, one number (``axis`` None) or one per channel along ``axis``; 0: not known yet, values pass
    ``zero_point``  int32, like ``scale``, or one number
    ``shift``       what is added before a weight is rounded, where it is not rounded to nearest; None: nothing
    """

    clip: ClassVar[bool] = False
    scale: Tensor
    zero_point: Tensor
    shift: Tensor | None

    def __init__(
        self,
        grid: Grid,
        scale: Tensor | float,
        zero_point: Tensor | int = 0,
        axis: int | None = None,
        shift: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.quant_min, self.quant_max, self.dtype, self.symmetric = (
            grid.quant_min,
            grid.quant_max,
            grid.dtype,
            grid.symmetric,
        )
        self.axis, self.enabled = axis, True
        self.register_buffer("scale", _tensor(scale, torch.float32))
        self.register_buffer("zero_point", _tensor(zero_point, torch.int32))
        self.register_buffer("shift", shift)

    @property
    def grid(self) -> Grid:
        return Grid(self.dtype, self.quant_min, self.quant_max, self.symmetric)

    def forward(self, input: Tensor, *norm: Any, average: bool = False) -> Tensor:
        """``norm``: gamma, variance and eps of the normalisation that a weight is folded with.

        ``average``: the input are means of values that this rounded before; they set no range.
        """
        if self.training and not average:
            self.look(input.detach(), *norm)
        if not self.enabled:
            return input
        steps = self.steps(input, *norm)
        rounded: Tensor = fake_quantize(
            self._shifted(input), *steps, self.axis, self.quant_min, self.quant_max, self.clip, average
        )
        return rounded

    def _shifted(self, input: Tensor) -> Tensor:
        return input if self.shift is None else input + self.shift

    def look(self, input: Tensor, *norm: Any) -> None:
        """Take note of what comes in while training."""

    def steps(self, input: Tensor, *norm: Any) -> tuple[Tensor, Tensor]:
        """Scale and zero point for this input."""
        return self.scale.clone(), self.zero_point

    def fixed(self, input: Tensor | None = None, *norm: Any) -> FakeQuantize:
        """This fake-quantizer with the scale that it has now."""
        with torch.no_grad():
            scale, zero_point = (self.scale, self.zero_point) if input is None else self.steps(input, *norm)
        made = FakeQuantize(self.grid, scale.detach().abs(), zero_point.detach(), self.axis, self.shift)
        made.enabled = self.enabled
        return made.train(self.training)

    @torch.no_grad()
    def folded(self, weight: Tensor, factor: Tensor) -> Tensor:
        """``weight`` rounded, ready to be multiplied by ``factor`` per channel, which the scale takes up.

        Where the sign changes, an affine grid is mirrored and a symmetric one widened by the level it has on one side only,
        so that every weight keeps its level.
        """
        on = self.scale, self.zero_point, self.axis, self.quant_min, self.quant_max
        rounded: Tensor = fake_quantize(self._shifted(weight), *on)
        self.shift = None
        grown = self.scale * factor.abs().to(self.scale)
        largest = grown.amax()
        self.scale = torch.where(
            grown > 0, grown, torch.where(largest > 0, largest, 1.0 / self.quant_max)
        )  # a silenced channel takes any
        if bool((self.zero_point != 0).any()) or not self.symmetric:
            mirrored = self.quant_min + self.quant_max - self.zero_point
            self.zero_point = torch.where(factor < 0, mirrored, self.zero_point).to(torch.int32)
        else:
            self.quant_max = max(-self.quant_min, self.quant_max)
            self.quant_min = -self.quant_max
        return rounded

    @torch.no_grad()
    def levels(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """``weight`` as int8 levels, their scale and zero point (None where the grid is symmetric), each one-dimensional."""
        axis = self.axis if self.axis is not None else 0
        zero_point = self.zero_point.reshape(-1)
        ratio = self._shifted(weight) / along(self.scale, weight.dim(), axis)
        levels = torch.round(ratio) + along(zero_point, weight.dim(), axis)
        stored = levels.clamp_(self.quant_min, self.quant_max).to(torch.int8)
        affine = None if self.symmetric else zero_point.expand(self.scale.numel()).to(torch.int8)
        return stored, self.scale.reshape(-1), affine

    def extra_repr(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.quant_min}..{self.quant_max}, axis={self.axis}"


def _tensor(value: Tensor | float, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype, device="cpu")


def _factor(norm: tuple[Any, ...]) -> Tensor:
    """γ/σ per channel."""
    gamma, variance, eps = norm
    inverse = torch.rsqrt(variance.detach() + eps)
    return inverse if gamma is None else gamma.detach() * inverse


def _shared(scale: Tensor, factor: Tensor) -> Tensor:
    """One scale of folded weights, as each channel's own; where γ is 0 the weight is silenced and any step will do."""
    return scale / torch.where(factor == 0, torch.ones_like(factor), factor).abs()


class WeightFakeQuantize(FakeQuantize):
    """Rounds a weight on the scale that post-training quantization would give it as it stands.

    ``axis``     of the output channels
    ``options``  those of :func:`~fxcompress.quantization.weights.weight_grid`
    """

    def __init__(self, axis: int, **options: Any) -> None:
        _, _, grid = weight_grid(torch.ones(1, 1, dtype=torch.float32, device="cpu"), 0, **options)
        super().__init__(grid, 0.0, axis=axis)
        self.options = options

    def steps(self, input: Tensor, *norm: Any) -> tuple[Tensor, Tensor]:
        assert self.axis is not None
        channels = input.shape[self.axis]
        if not norm or self.options["per_channel"]:
            scale, zero_point, _ = weight_grid(input, self.axis, **self.options)
            zero_point = self.zero_point if zero_point is None else zero_point.expand(channels)
            return scale.expand(channels), zero_point
        factor = _factor(norm)
        scale, zero_point, _ = weight_grid(input.detach() * along(factor, input.dim(), self.axis), self.axis, **self.options)
        if zero_point is None:
            return _shared(scale, factor), self.zero_point
        mirrored = self.quant_min + self.quant_max - zero_point
        return _shared(scale, factor), torch.where(factor < 0, mirrored, zero_point)


class RangeFakeQuantize(FakeQuantize):
    """Rounds activations on a moving average of the ranges that ``observer`` finds in training batches.

    ``observer``  a calibrator's name, shown one batch at a time, and its ``options``
    ``momentum``  weight of the newest batch; the first ``1/momentum`` batches count alike
    """

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self, grid: Grid, observer: str, options: Mapping[str, Any] | None = None, momentum: float = 0.01) -> None:
        super().__init__(grid, 0.0)
        self.observer = observer
        self.settings = moving.settings(observer, options or {}, momentum, grid)
        self.register_buffer("low", torch.zeros((), dtype=torch.float32, device="cpu"))
        self.register_buffer("high", torch.zeros((), dtype=torch.float32, device="cpu"))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64, device="cpu"))

    def look(self, input: Tensor, *norm: Any) -> None:
        moving.observe(input, self.low, self.high, self.seen, self.scale, self.zero_point, self.settings)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, observer={self.observer}"


class LearnedFakeQuantize(FakeQuantize):
    """Rounds on a learned scale: LSQ (Esser et al. 2020, Learned Step Size Quantization).

    The scale starts at ``2·mean|x|/√Qp`` and its gradient is multiplied by ``1/√(N·Qp)``: N elements of the weight that
    share the scale, or of one sample's activations; Qp the largest level counted from zero. Activations start with the first
    training batch, and have their zero point in the middle of an unsigned grid where that batch has negative values.

    ``weight``  the weight it stands on, which sets its scale now; None for activations
    ``learn``   whether the scale is trained
    """

    clip: ClassVar[bool] = True

    def __init__(
        self,
        grid: Grid,
        *,
        learn: bool = True,
        weight: Tensor | None = None,
        axis: int | None = None,
        per_channel: bool = True,
        norm: tuple[Any, ...] = (),
    ) -> None:
        super().__init__(grid, 0.0, axis=axis)
        self.learn, self.per_channel, self.started = learn, per_channel, weight is not None
        start = self.scale if weight is None else self._start(weight.detach(), norm)
        del self.scale
        self.scale = nn.Parameter(start, requires_grad=learn)

    def _start(self, weight: Tensor, norm: tuple[Any, ...]) -> Tensor:
        assert self.axis is not None
        rows = weight.movedim(self.axis, 0).flatten(1).to(torch.float32).abs().mean(1)
        if not self.per_channel:
            rows = (rows * _factor(norm).abs() if norm else rows).mean().reshape(1)
        start = 2 * rows / math.sqrt(self.quant_max)
        return torch.where(start > 0, start, 1.0 / self.quant_max)

    def look(self, input: Tensor, *norm: Any) -> None:
        if not self.started:
            moving.start_step(input, self.scale.detach(), self.zero_point, self.quant_min, self.quant_max)
            self.started = True

    def steps(self, input: Tensor, *norm: Any) -> tuple[Tensor, Tensor]:
        sharing = input.numel() // self.scale.numel() if self.axis is not None else input.numel() // input.shape[0]
        rate = torch.rsqrt(sharing * (self.quant_max - self.zero_point).to(torch.float32))
        slow = self.scale.abs() * rate
        scale = self.scale.detach().abs() + (slow - slow.detach())  # this value, that gradient
        if self.axis is None:
            return scale, self.zero_point
        if norm and not self.per_channel:
            scale = _shared(scale, _factor(norm))
        return scale.expand(input.shape[self.axis]), self.zero_point

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, learn={self.learn}"


CLASSES = (FakeQuantize, WeightFakeQuantize, RangeFakeQuantize, LearnedFakeQuantize)
"""What a saved model may hold."""


def on_weight(call: ops.Call) -> fx.Node | None:
    """The node between a weighted call and its weight that fake-quantizes it, or None."""
    for node in call.node.all_input_nodes:
        if node.meta.get("observer") and ops.Attr(str(node.all_input_nodes[0].target)) == call["weight"]:
            return node
    return None


def fixed_on_weight(module: nn.Module, node: fx.Node) -> FakeQuantize:
    """The fake-quantizer that a node between a layer and its weight calls, with the scale that it has now."""
    values: list[Any] = [edit.get_tensor(module, str(a.target)) if isinstance(a, fx.Node) else a for a in node.args]
    fake = module_of(node)
    assert isinstance(fake, FakeQuantize)
    return fake.fixed(*values)


def fake_quantizer(call: ops.Call) -> FakeQuantize | None:
    """The fake-quantizer on the weight of a weighted call, or None."""
    node = on_weight(call)
    found = module_of(node) if node is not None else None
    return found if isinstance(found, FakeQuantize) else None


def fake_quantizers(model: nn.Module) -> dict[str, FakeQuantize]:
    """Every fake-quantizer in a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FakeQuantize)}
