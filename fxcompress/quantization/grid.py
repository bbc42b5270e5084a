"""Quantization grids: which integers there are, and which scale and zero point put a range on them.

int8 is [-128, 127] and uint8 [0, 255]; a symmetric int8 grid uses [-127, 127]. Rounding is half to even.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.errors import ConfigError, DataError, did_you_mean

__all__ = ["Grid", "check_bits", "compute_scale_zp", "grid"]

_DTYPES = {"int8": (torch.int8, -128, 127), "uint8": (torch.uint8, 0, 255)}


@dataclass(frozen=True)
class Grid:
    """The integers ``quant_min .. quant_max``, stored as ``dtype``; ``symmetric`` grids put zero at their middle."""

    dtype: torch.dtype
    quant_min: int
    quant_max: int
    symmetric: bool

    @property
    def levels(self) -> int:
        """Steps between the smallest and the largest integer."""
        return self.quant_max - self.quant_min


def grid(dtype: str, *, symmetric: bool = True, bits: int = 8) -> Grid:
    """The grid of ``dtype`` (``int8`` or ``uint8``) with ``bits`` of 2 to 8; narrow grids are stored in 8 bits.

    Raises ConfigError for another dtype or width.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"there is no quantized dtype {dtype!r}.{did_you_mean(dtype, _DTYPES)}")
    check_bits(bits)
    stored, _, _ = _DTYPES[dtype]
    if dtype == "uint8":
        return Grid(stored, 0, 2**bits - 1, symmetric)
    half = 2 ** (bits - 1)
    return Grid(stored, -half + 1 if symmetric else -half, half - 1, symmetric)


def check_bits(bits: int) -> None:
    """Raise ConfigError unless ``bits`` is an integer from 2 to 8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ConfigError(f"bits is {bits!r}; it is an integer from 2 to 8.")


def compute_scale_zp(minimum: Tensor, maximum: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale (float32, positive, finite) and zero point (int32) that put ``[minimum, maximum]`` on ``grid``.

    The range is widened to hold 0, which is then exact. Symmetric signed grids have zero point 0 and scale max|x| over the
    largest integer; a symmetric unsigned grid has its zero point in the middle and is as fine on both sides of it, or has it
    at 0 where no value is negative.
    A range without extent gets a step as for one of 1, in which kernels hold biases finely enough. Shapes: any,
    elementwise. Raises DataError for NaN or infinite bounds, ConfigError where minimum exceeds maximum.
    """
    low, high = minimum.detach().to(torch.float64), maximum.detach().to(torch.float64)
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise DataError("a range has NaN or infinite bounds; no scale fits it.")
    if bool((low > high).any()):
        raise ConfigError("a range's minimum exceeds its maximum.")
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    largest = torch.maximum(-low, high)
    if grid.symmetric and grid.quant_min < 0:
        scale, zero_point = largest / grid.quant_max, torch.zeros_like(low)
    elif grid.symmetric:
        middle = (grid.levels + 1) // 2
        scale = largest / torch.where(low < 0, float(grid.quant_max - middle), float(grid.quant_max))
        zero_point = torch.where(low < 0, float(middle), 0.0)
    else:
        extent = high - low
        scale = extent / grid.levels
        share = low / torch.where(extent > 0, extent, 1.0)  # a half where both sides are equal, whatever the range
        zero_point = (grid.quant_min - share * grid.levels).round()
    finite = torch.finfo(torch.float32)
    scale = torch.where(scale > 0, scale.clamp(finite.tiny, finite.max), 1.0 / grid.levels).to(torch.float32)
    return scale, zero_point.clamp(grid.quant_min, grid.quant_max).to(torch.int32)
