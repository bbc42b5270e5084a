"""Calibrators: from the values a tensor takes over a dataset to the range it is quantized on.

Every calibrator streams in constant memory, gives the same result for any split and order of the same data, merges with one
that saw other data, and saves its state. Empty tensors are ignored; NaN and infinite values are refused.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxcompress.errors import ConfigError, DataError, did_you_mean
from fxcompress.quantization.grid import Grid, compute_scale_zp, grid
from fxcompress.quantization.histogram import Histogram

__all__ = [
    "CALIBRATORS",
    "Calibrator",
    "HistogramCalibrator",
    "MinMaxCalibrator",
    "build_calibrator",
]


class Calibrator:
    """Watches tensors; knows the observed extremes and how often it was shown something.

    ``symmetric``  the default grid of :meth:`compute_scale_zp` is symmetric
    """

    name: ClassVar[str]

    def __init__(self, symmetric: bool = True) -> None:
        self.symmetric = symmetric
        self.count = 0
        self.minimum: Tensor | None = None
        self.maximum: Tensor | None = None

    def collect(self, tensor: Tensor) -> None:
        """Take note of a tensor of any shape, layout and floating dtype. Raises DataError for NaN or infinite values."""
        if tensor.numel() == 0:
            return
        values = tensor.detach()
        if values.dtype != torch.float32:
            values = values.to(torch.float32)
        low, high = self._extremes(values)
        bounds = (float(low), float(high)) if low.dim() == 0 else (float(low.sum()), float(high.sum()))
        if not math.isfinite(bounds[0] + bounds[1]) and not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise DataError("NaN or infinite values reached a calibrator; look for the layer that produces them.")
        self._widen(low, high)
        self.count += values.numel()
        self._add(values, *bounds)

    def merge(self, other: Calibrator) -> None:
        """Join what ``other``, of the same class and options, has seen."""
        if type(other) is not type(self):
            raise ConfigError(f"a {type(self).__name__} cannot merge with a {type(other).__name__}.")
        if other.minimum is not None and other.maximum is not None:
            self._widen(other.minimum, other.maximum)
            self.count += other.count
            self._join(other)

    def compute_range(self) -> tuple[Tensor, Tensor]:
        """The range to quantize on, as float64 tensors. Raises DataError where nothing was collected."""
        if self.minimum is None or self.maximum is None:
            raise DataError("a calibrator has seen no data; run batches through the observed model first.")
        return self._range(self.minimum.to(torch.float64), self.maximum.to(torch.float64))

    def compute_scale_zp(self, dtype: str | Grid = "int8") -> tuple[Tensor, Tensor]:
        """Scale and zero point on a grid, or on the default grid of a dtype."""
        target = dtype if isinstance(dtype, Grid) else grid(dtype, symmetric=self.symmetric)
        return compute_scale_zp(*self.compute_range(), target)

    def reset(self) -> None:
        """Forget everything seen."""
        self.count, self.minimum, self.maximum = 0, None, None

    def state_dict(self) -> dict[str, Any]:
        """What was seen, as tensors and numbers."""
        if self.minimum is None or self.maximum is None:
            return {"count": 0}
        return {"count": self.count, "minimum": self.minimum.clone(), "maximum": self.maximum.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state of :meth:`state_dict`."""
        self.reset()
        if state["count"]:
            self.count = int(state["count"])
            self.minimum, self.maximum = state["minimum"].clone(), state["maximum"].clone()

    def _extremes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.aminmax(values)
        return low, high

    def _widen(self, low: Tensor, high: Tensor) -> None:
        self.minimum = low if self.minimum is None else torch.minimum(self.minimum, low)
        self.maximum = high if self.maximum is None else torch.maximum(self.maximum, high)

    def _add(self, values: Tensor, minimum: float, maximum: float) -> None:
        """Count float32 values; their extremes are known."""

    def _join(self, other: Any) -> None:
        """Join the counts of another calibrator of this class."""

    def _range(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        return minimum, maximum


class MinMaxCalibrator(Calibrator):
    """The observed extremes; per channel along ``axis`` on request."""

    name: ClassVar[str] = "minmax"

    def __init__(self, symmetric: bool = True, per_channel: bool = False, axis: int = 0) -> None:
        super().__init__(symmetric)
        self.per_channel, self.axis = per_channel, axis

    def _extremes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        if not self.per_channel:
            return super()._extremes(values)
        rows = values.movedim(self.axis, 0).flatten(1) if values.dim() > 1 else values[:, None]
        return rows.amin(1), rows.amax(1)


class _HistogramBased(Calibrator):
    """Keeps a streaming histogram beside the extremes; ``signed`` where the two sides of zero matter apart."""

    signed: ClassVar[bool] = True

    def __init__(self, symmetric: bool = True, num_bins: int = 2048) -> None:
        super().__init__(symmetric)
        if not isinstance(num_bins, int) or not 16 <= num_bins <= 65536:
            raise ConfigError(f"num_bins is {num_bins!r}; it is an integer from 16 to 65536.")
        self.num_bins = num_bins
        self.histogram = self._empty()

    def _empty(self) -> Histogram:
        return Histogram(1 << (self.num_bins - 1).bit_length(), signed=self.signed)

    def _add(self, values: Tensor, minimum: float, maximum: float) -> None:
        self.histogram.add(_flat(values), minimum, maximum)

    def _join(self, other: Any) -> None:
        self.histogram.merge(other.histogram)

    def reset(self) -> None:
        super().reset()
        self.histogram = self._empty()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "histogram": self.histogram.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.histogram.load_state_dict(state["histogram"])


def _flat(values: Tensor) -> Tensor:
    """All elements in memory order, without a copy where the memory has no gaps."""
    order = sorted(range(values.dim()), key=values.stride, reverse=True)
    return values.permute(order).reshape(-1)


class HistogramCalibrator(_HistogramBased):
    """Clips to the ``percentile`` mass of the streamed histogram, in percent.

    What is cut off is the same share of values on the two sides together: (100 − percentile) %. Where no value is negative
    all of it is cut at the top. Thresholds lie on the right edge of a bin and never beyond the observed extremes.
    """

    name: ClassVar[str] = "histogram"
    signed: ClassVar[bool] = False

    def __init__(self, num_bins: int = 2048, percentile: float = 99.99, symmetric: bool = True) -> None:
        super().__init__(symmetric, num_bins)
        if not isinstance(percentile, (int, float)) or not 50.0 < percentile <= 100.0:
            raise ConfigError(f"percentile is {percentile!r}; it lies in (50, 100].")
        self.percentile = float(percentile)

    def _range(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        edges = self.histogram.edges()
        kept = self.histogram.magnitudes().cumsum(0)
        needed = self.percentile / 100.0 * self.count
        reach = edges[int(torch.searchsorted(kept.to(torch.float64), needed).clamp(max=edges.numel() - 1))]
        return torch.maximum(minimum, -reach), torch.minimum(maximum, reach)


CALIBRATORS: dict[str, type[Calibrator]] = {cls.name: cls for cls in (MinMaxCalibrator, HistogramCalibrator)}


def build_calibrator(name: str, **options: Any) -> Calibrator:
    """The calibrator called ``name`` with its parameters; ConfigError names what is unknown."""
    if name not in CALIBRATORS:
        raise ConfigError(
            f"there is no calibration method {name!r}.{did_you_mean(name, CALIBRATORS)} Known: {', '.join(CALIBRATORS)}."
        )
    try:
        return CALIBRATORS[name](**options)
    except TypeError as error:
        raise ConfigError(f"calibration method {name!r}: {error}.") from error
