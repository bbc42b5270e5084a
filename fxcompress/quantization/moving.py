"""Operators that update a fake-quantizer's state while it trains: moving ranges, and the first value of a learned step.

They are operators of their own so that a compiled model runs them without leaving its graph.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed

from fxcompress.quantization.calibrator import build_calibrator
from fxcompress.quantization.grid import Grid, compute_scale_zp, grid

__all__ = ["observe", "settings", "start_step"]

_library = torch.library.Library("fxcompress", "FRAGMENT")
_library.define(
    "observe_range(Tensor input, Tensor(a!) low, Tensor(b!) high, Tensor(c!) seen, Tensor(d!) scale, "
    "Tensor(e!) zero_point, str settings) -> ()"
)
_library.define("start_step(Tensor input, Tensor(a!) scale, Tensor(b!) zero_point, int quant_min, int quant_max) -> ()")


def settings(observer: str, options: Mapping[str, Any], momentum: float, grid: Grid) -> str:
    """What :func:`observe` needs to know, in one word."""
    bits = grid.quant_max.bit_length() + (grid.quant_min < 0)
    name = str(grid.dtype).removeprefix("torch.")
    return json.dumps([observer, dict(options), momentum, name, bits, grid.symmetric])


@functools.cache
def _read(settings: str) -> tuple[str, dict[str, Any], float, Grid]:
    observer, options, momentum, name, bits, symmetric = json.loads(settings)
    return observer, options, momentum, grid(name, symmetric=symmetric, bits=bits)


def _observe(
    input: Tensor, low: Tensor, high: Tensor, seen: Tensor, scale: Tensor, zero_point: Tensor, settings: str
) -> None:
    if input.numel() == 0:
        return
    observer, options, momentum, target = _read(settings)
    calibrator = build_calibrator(observer, **options)
    calibrator.collect(input)
    rate = max(momentum, 1 / (int(seen) + 1))
    for bound, found in zip((low, high), calibrator.compute_range(), strict=True):
        bound.lerp_(found.to(bound), rate)
    seen.add_(1)
    for state, found in zip((scale, zero_point), compute_scale_zp(low, high, target), strict=True):
        state.copy_(found)


def _start_step(input: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> None:
    if float(scale) != 0.0 or input.numel() == 0:
        return
    facts = torch.stack([input.to(torch.float32).abs().mean(), (input < 0).any().to(torch.float32)])
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(facts)
        facts /= distributed.get_world_size()
    mean, negative = facts.tolist()
    if negative and quant_min == 0:
        zero_point.fill_((quant_max + 1) // 2)
    start = 2 * mean / math.sqrt(quant_max - int(zero_point))
    scale.fill_(start if start > 0 else 1.0)


_library.impl("observe_range", _observe, "CompositeExplicitAutograd")
_library.impl("start_step", _start_step, "CompositeExplicitAutograd")
for _name in ("observe_range", "start_step"):
    _library.impl(_name, lambda *state: None, "Meta")

observe = torch.ops.fxcompress.observe_range.default
start_step = torch.ops.fxcompress.start_step.default
