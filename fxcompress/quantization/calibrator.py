"""Calibrators: from the values a tensor takes over a dataset to the range it is quantized on.

Every calibrator streams in constant memory, gives the same result for any split and order of the same data, merges with one
that saw other data, and saves its state. Empty tensors are ignored; NaN and infinite values are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxcompress.errors import ConfigError, DataError
from fxcompress.quantization.grid import Grid, compute_scale_zp, grid
from fxcompress.quantization.histogram import Histogram, octave
from fxcompress.quantization.thresholds import entropy_threshold, even_bins, graded, mse_range
from fxcompress.registry import Registry

__all__ = [
    "CALIBRATORS",
    "Calibrator",
    "EntropyCalibrator",
    "HistogramCalibrator",
    "MSECalibrator",
    "MinMaxCalibrator",
    "PercentileCalibrator",
    "build_calibrator",
]


_ROUNDING = 1e-9  # a share of a count that should be whole is not quite
_NOTHING = (math.inf, -math.inf)


class _Ranges(dict[Any, tuple[Tensor, Tensor]]):
    """Ranges already found, by what was asked; copies of a calibrator that have seen the same share them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Ranges:
        return self


class Calibrator:
    """Watches tensors; knows the observed extremes and how often it was shown something.

    ``symmetric``  the default grid of :meth:`compute_scale_zp` is symmetric
    """

    name: ClassVar[str]
    per_channel: bool = False

    def __init__(self, symmetric: bool = True) -> None:
        self.symmetric = _flag("symmetric", symmetric)
        self.count = 0
        self.minimum: Tensor | None = None
        self.maximum: Tensor | None = None
        self._known = _NOTHING  # the extremes as numbers, where they are one pair: most tensors do not widen them
        self._ranges = _Ranges()

    def collect(self, tensor: Tensor) -> None:
        """Take note of a tensor of any shape, layout and floating dtype. Raises DataError for NaN or infinite values.

        What is counted and kept is on the CPU, wherever the tensor is.
        """
        if not isinstance(tensor, Tensor):
            raise DataError(f"a calibrator was shown a {type(tensor).__name__}; it collects tensors.")
        if tensor.is_complex() or tensor.is_quantized:
            raise DataError(f"a calibrator was shown {tensor.dtype} values; it collects real numbers.")
        if tensor.numel() == 0:
            return
        values = tensor.detach()
        if values.dtype != torch.float32 or values.device.type != "cpu":
            values = values.to("cpu", torch.float32)
        if not self.per_channel:
            values = _flat(values)
        low, high = self._extremes(values)
        bounds = (float(low), float(high)) if low.dim() == 0 else (float(low.sum()), float(high.sum()))
        if not math.isfinite(bounds[0] + bounds[1]) and not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise DataError("NaN or infinite values reached a calibrator; look for the layer that produces them.")
        if not (self._known[0] <= bounds[0] and bounds[1] <= self._known[1]):
            self._widen(low, high)
        self.count += values.numel()
        self._ranges = _Ranges()
        self._add(values, *bounds)

    def merge(self, other: Calibrator) -> None:
        """Join what ``other``, of the same class and options, has seen."""
        if type(other) is not type(self):
            raise ConfigError(f"a {type(self).__name__} cannot merge with a {type(other).__name__}.")
        if self._options() != other._options():
            raise ConfigError(f"calibrators with {self._options()} and {other._options()} cannot merge.")
        if other.minimum is not None and other.maximum is not None:
            self._widen(other.minimum, other.maximum)
            self.count += other.count
            self._ranges = _Ranges()
            self._join(other)

    def compute_range(self, dtype: str | Grid = "int8") -> tuple[Tensor, Tensor]:
        """The range to quantize on with this grid (or the default grid of a dtype), as float64 tensors.

        Raises DataError where nothing was collected.
        """
        if self.minimum is None or self.maximum is None:
            raise DataError("a calibrator has seen no data; run batches through the observed model first.")
        target = self._grid(dtype)
        asked = (target, *self._options().items())
        if asked not in self._ranges:
            self._ranges[asked] = self._range(self.minimum.to(torch.float64), self.maximum.to(torch.float64), target)
        low, high = self._ranges[asked]
        return low.clone(), high.clone()

    def compute_scale_zp(self, dtype: str | Grid = "int8") -> tuple[Tensor, Tensor]:
        """Scale and zero point on a grid, or on the default grid of a dtype."""
        return compute_scale_zp(*self.compute_range(dtype), self._grid(dtype))

    def _grid(self, dtype: str | Grid) -> Grid:
        return dtype if isinstance(dtype, Grid) else grid(dtype, symmetric=self.symmetric)

    def reset(self) -> None:
        """Forget everything seen."""
        self.count, self.minimum, self.maximum, self._known, self._ranges = 0, None, None, _NOTHING, _Ranges()

    def state_dict(self) -> dict[str, Any]:
        """What was seen, as tensors and numbers."""
        if self.minimum is None or self.maximum is None:
            return {"count": 0}
        return {"count": self.count, "minimum": self.minimum.clone(), "maximum": self.maximum.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state of :meth:`state_dict`. Raises ConfigError for what is none of this class."""
        if not isinstance(state, Mapping):
            raise ConfigError(f"the state of a {type(self).__name__} is a dict; this is a {type(state).__name__}.")
        extremes = {"minimum", "maximum"}
        keys = (set(self.state_dict()) - extremes) | (extremes if state.get("count") else set())
        if set(state) != keys:
            held = ", ".join(sorted(map(str, state))) or "nothing"
            raise ConfigError(f"the state of a {type(self).__name__} holds {', '.join(sorted(keys))}; this one {held}.")
        if not _is_range(**{key: state[key] for key in state if key != "histogram"}):
            raise ConfigError(f"the state of a {type(self).__name__} is damaged: its count or extremes cannot be meant.")
        self.reset()
        if state["count"]:
            self.count = state["count"]
            self._widen(state["minimum"].clone(), state["maximum"].clone())

    def _extremes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.aminmax(values)
        return low, high

    def _options(self) -> dict[str, Any]:
        settings = {key: value for key, value in vars(self).items() if not key.startswith("_") and key != "count"}
        return {key: value for key, value in settings.items() if isinstance(value, (bool, int, float))}

    def _widen(self, low: Tensor, high: Tensor) -> None:
        if self.minimum is not None and self.minimum.shape != low.shape:
            raise DataError(f"a calibrator that has seen {self.minimum.numel()} channels was shown {low.numel()}.")
        self.minimum = low if self.minimum is None else torch.minimum(self.minimum, low)
        self.maximum = high if self.maximum is None else torch.maximum(self.maximum, high)
        if self.minimum.dim() == 0:
            self._known = (float(self.minimum), float(self.maximum))

    def _add(self, values: Tensor, minimum: float, maximum: float) -> None:
        """Count float32 values, all in one dimension; their extremes are known."""

    def _join(self, other: Any) -> None:
        """Join the counts of another calibrator of this class."""

    def _range(self, minimum: Tensor, maximum: Tensor, target: Grid) -> tuple[Tensor, Tensor]:
        return minimum, maximum


def _flat(values: Tensor) -> Tensor:
    """All elements in memory order, without a copy where the memory has no gaps."""
    if _has_no_gaps(values):
        return values.as_strided((values.numel(),), (1,))
    return values.reshape(-1)


_has_no_gaps = torch.ops.aten.is_non_overlapping_and_dense.default


class MinMaxCalibrator(Calibrator):
    """The observed extremes; per channel along ``axis`` on request."""

    name: ClassVar[str] = "minmax"

    def __init__(self, symmetric: bool = True, per_channel: bool = False, axis: int = 0) -> None:
        super().__init__(symmetric)
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise ConfigError(f"axis is {axis!r}; it is the number of a dimension.")
        self.per_channel, self.axis = _flag("per_channel", per_channel), axis

    def _extremes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        if not self.per_channel:
            return super()._extremes(values)
        if values.dim() != 1 and not -values.dim() <= self.axis < values.dim():
            raise DataError(f"a calibrator of the channels of axis {self.axis} was shown a shape of {tuple(values.shape)}.")
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
        self.histogram.add(values, minimum, maximum)

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
        if self.histogram.top != (octave(max(map(abs, self._known))) if self.count else -1):
            raise ConfigError(f"the state of a {type(self).__name__} is damaged: its histogram is not of its extremes.")


class HistogramCalibrator(_HistogramBased):
    """Clips to the ``percentile`` mass of the streamed histogram, in percent.

    What is cut off is the same share of values on the two sides together: (100 − percentile) %. Where no value is negative
    all of it is cut at the top. Thresholds lie on the right edge of a bin and never beyond the observed extremes.
    """

    name: ClassVar[str] = "histogram"
    signed: ClassVar[bool] = False

    def __init__(self, num_bins: int = 2048, percentile: float = 99.99, symmetric: bool = True) -> None:
        super().__init__(symmetric, num_bins)
        self.percentile = _percentile(percentile)

    def _range(self, minimum: Tensor, maximum: Tensor, target: Grid) -> tuple[Tensor, Tensor]:
        reach = _quantile(self.histogram.edges(), self.histogram.magnitudes(), self.percentile / 100)
        return torch.maximum(minimum, -reach), torch.minimum(maximum, reach)


class PercentileCalibrator(_HistogramBased):
    """The ``percentile`` of |x|, in percent; on an affine grid both tails, half of what is cut off at either end.

    The percentile is the smallest value that as many values do not exceed, within a bin of the streamed histogram (on its
    far edge, never beyond the observed extremes).
    """

    name: ClassVar[str] = "percentile"

    def __init__(self, percentile: float = 99.99, num_bins: int = 2048, symmetric: bool = True) -> None:
        super().__init__(symmetric, num_bins)
        self.percentile = _percentile(percentile)

    def _range(self, minimum: Tensor, maximum: Tensor, target: Grid) -> tuple[Tensor, Tensor]:
        edges, kept = self.histogram.edges(), self.percentile / 100
        if target.symmetric:
            reach = _quantile(edges, self.histogram.magnitudes(), kept)
            return torch.maximum(minimum, -reach), torch.minimum(maximum, reach)
        positive, negative = self.histogram.counts
        tail = (1 - kept) / 2
        return torch.maximum(minimum, -_upper(edges, negative, positive, tail)), torch.minimum(
            maximum, _upper(edges, positive, negative, tail)
        )


class EntropyCalibrator(_HistogramBased):
    """The threshold on |x| with the least KL divergence between the clipped distribution and its quantized version.

    The divergence is that of :func:`~fxcompress.quantization.thresholds.entropy_threshold`, over ``num_bins`` equal bins of
    the magnitudes, quantized to ``num_quantized_bins`` levels. Zeros are exact whatever the threshold and do not count. The
    bins cover the whole range, unless less than a thousandth of the values lies in its upper half: then they cover the lower
    half, and so on, with as many bins for every octave above; thus a few outliers do not blur the rest into one bin, and a
    threshold that keeps them is weighed against one that does not.
    """

    name: ClassVar[str] = "entropy"
    signed: ClassVar[bool] = False

    def __init__(self, num_bins: int = 2048, num_quantized_bins: int = 128, symmetric: bool = True) -> None:
        super().__init__(symmetric, num_bins)
        if not isinstance(num_quantized_bins, int) or not 2 <= num_quantized_bins <= num_bins:
            raise ConfigError(
                f"num_quantized_bins is {num_quantized_bins!r}; it is an integer from 2 to num_bins ({num_bins})."
            )
        self.num_quantized_bins = num_quantized_bins

    def _range(self, minimum: Tensor, maximum: Tensor, target: Grid) -> tuple[Tensor, Tensor]:
        left, right, counts = self.histogram.bins(float(minimum), float(maximum))
        left, right, counts = left[right > 0], right[right > 0], counts[right > 0]
        largest = float(torch.maximum(-minimum, maximum))
        if largest == 0.0:
            return minimum, maximum
        octaves, rare, finest = 0, 1e-3 * float(counts.sum()), float(right.min())
        while (half := largest / 2 ** (octaves + 1)) >= finest and float(counts[left >= half].sum()) < rare:
            octaves += 1
        ends = graded(self.num_bins, octaves)
        reach = ends.to(torch.float64) / float(ends[-1]) * largest
        threshold = float(reach[entropy_threshold(even_bins(left, right, counts, reach), self.num_quantized_bins, ends)])
        return minimum.clamp(min=-threshold), maximum.clamp(max=threshold)


class MSECalibrator(_HistogramBased):
    """The range that minimises the mean squared quantization error on the grid, over the streamed histogram."""

    name: ClassVar[str] = "mse"

    def __init__(self, num_bins: int = 2048, symmetric: bool = True) -> None:
        super().__init__(symmetric, num_bins)

    def _range(self, minimum: Tensor, maximum: Tensor, target: Grid) -> tuple[Tensor, Tensor]:
        bins = self.histogram.bins(float(minimum), float(maximum))
        low, high = mse_range(float(minimum), float(maximum), target, bins)
        return torch.tensor(low, dtype=torch.float64, device="cpu"), torch.tensor(high, dtype=torch.float64, device="cpu")


def _is_range(count: Any, minimum: Any = None, maximum: Any = None) -> bool:
    """Whether these can have been observed together."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        return False
    if minimum is None and maximum is None:
        return count == 0
    if not isinstance(minimum, Tensor) or not isinstance(maximum, Tensor) or minimum.shape != maximum.shape:
        return False
    return bool((torch.isfinite(minimum) & torch.isfinite(maximum) & (minimum <= maximum)).all())


def _flag(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; it is True or False.")
    return value


def _percentile(percentile: float) -> float:
    if isinstance(percentile, bool) or not isinstance(percentile, (int, float)) or not 0.0 < percentile <= 100.0:
        raise ConfigError(f"percentile is {percentile!r}; it lies in (0, 100].")
    return float(percentile)


def _quantile(edges: Tensor, counts: Tensor, share: float) -> Tensor:
    """The right edge of the first bin at which ``share`` of the counts is reached."""
    reached = counts.cumsum(0)
    needed = share * float(reached[-1]) * (1 - _ROUNDING)
    return edges[int(torch.searchsorted(reached.to(torch.float64), needed).clamp(max=edges.numel() - 1))]


def _upper(edges: Tensor, here: Tensor, there: Tensor, tail: float) -> Tensor:
    """The edge above which no more than ``tail`` of all values lie on this side of zero; 0 where the cut is beyond zero."""
    total = float(here.sum() + there.sum())
    beyond = here.flip(0).cumsum(0).flip(0) - here
    allowed = tail * total * (1 + _ROUNDING)
    if float(here.sum()) <= allowed:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    return edges[int((beyond <= allowed).to(torch.int8).argmax())]


_ALL: tuple[type[Calibrator], ...] = (
    MinMaxCalibrator,
    HistogramCalibrator,
    EntropyCalibrator,
    PercentileCalibrator,
    MSECalibrator,
)
CALIBRATORS = Registry("calibration method", {cls.name: cls for cls in _ALL})
"""Calibrators by name."""


def build_calibrator(name: str, **options: Any) -> Calibrator:
    """The calibrator called ``name`` with its parameters; ConfigError names what is unknown."""
    cls = CALIBRATORS[name]
    try:
        made: Calibrator = cls(**options)
        return made
    except TypeError as error:
        raise ConfigError(f"calibration method {name!r}: {error}.") from error
