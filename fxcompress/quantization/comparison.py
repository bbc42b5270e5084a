"""What a comparison of two models gives: a row per layer, as a table and a plot; and the sums that rows are made of."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from tabulate import tabulate
from torch import Tensor

from fxcompress.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ActivationRow", "Comparison", "Sums", "WeightRow"]


@dataclass(frozen=True)
class WeightRow:
    """One layer's weight, int8 against float."""

    name: str
    snr_db: float
    max_error: float
    cosine: float


@dataclass(frozen=True)
class ActivationRow:
    """One layer's result, as its readers see it, over all data.

    ``snr_db``        of the quantized model against the float one: the layer's own error and all before it
    ``local_snr_db``  with the float model's values as its inputs: the layer's own error alone
    ``range_use``     share of the quantization range that the float values span; NaN where it has none
    ``clip_rate``     share of float values outside the range
    """

    name: str
    kind: str
    snr_db: float
    max_error: float
    cosine: float
    local_snr_db: float
    range_use: float
    clip_rate: float


R = TypeVar("R", WeightRow, ActivationRow)


class Comparison(list[R], Generic[R]):
    """A row per layer, worst first; prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "no layer is in both models"
        return tabulate([astuple(row) for row in self], [f.name for f in fields(self[0])], floatfmt=".4g")

    def plot(self, path: str | None = None) -> Figure:
        """A bar per layer, in dB: the whole error, and the layer's own where it is known. Written to ``path`` if given."""
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ConfigError("plot() needs matplotlib: pip install 'fxcompress[plot]'.") from error
        figure = Figure(figsize=(8, 1 + 0.3 * len(self)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        places = range(len(self))
        local = [getattr(row, "local_snr_db", math.nan) for row in self]
        axes.barh([p - 0.2 for p in places], [_drawn(row.snr_db) for row in self], 0.4, label="whole error")
        if any(map(math.isfinite, local)):
            axes.barh([p + 0.2 for p in places], [_drawn(value) for value in local], 0.4, label="the layer's own")
        axes.set_yticks(list(places), [row.name for row in self])
        axes.invert_yaxis()
        axes.set_xlabel("signal to noise, dB")
        axes.legend()
        if path is not None:
            figure.savefig(path)
        return figure


def _drawn(decibels: float) -> float:
    return decibels if math.isfinite(decibels) else 0.0


@dataclass
class Sums:
    """Running sums over pairs of tensors, in float64; ``largest`` is the largest difference."""

    signal: float = 0.0
    noise: float = 0.0
    dot: float = 0.0
    other: float = 0.0
    largest: float = 0.0

    def add(self, reference: Tensor, found: Tensor) -> None:
        """Take in one more pair, of one shape."""
        a, b = reference.detach().to(torch.float64), found.detach().to(torch.float64)
        gap = a - b
        self.signal += float(a.square().sum())
        self.noise += float(gap.square().sum())
        self.dot += float((a * b).sum())
        self.other += float(b.square().sum())
        self.largest = max(self.largest, float(gap.abs().max()) if gap.numel() else 0.0)

    @property
    def snr_db(self) -> float:
        """10·log10 of signal power over noise power; inf for equal values, -inf without a signal."""
        if not self.noise:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    @property
    def cosine(self) -> float:
        """The cosine between all the values of one side and of the other; of zeros with zeros, 1."""
        length = math.sqrt(self.signal) * math.sqrt(self.other)
        return self.dot / length if length else float(self.signal == self.other)
