"""Adaptive rounding: whether each weight goes down or up is learned, layer by layer (Nagel et al. 2020, AdaRound).

``Ŵ = s·clip(⌊W/s⌋ + h(V), quant_min, quant_max)`` with the rectified sigmoid ``h(V) = clip(σ(V)(ζ − γ) + γ, 0, 1)``, ζ = 1.1
and γ = −0.1, is fitted to ``‖f(W·x) − f(Ŵ·x̂)‖²/E + λ·mean(1 − |2h(V) − 1|^β)``, f the layer's activation. Dividing by E,
the error of rounding to nearest, and taking the mean over weights makes one λ fit layers of every size and scale. β falls
from 20 to 2 along a cosine after a warm start without the second term, so that h ends at 0 or 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.quantization.grid import Grid

__all__ = ["Rounding", "adaptive_levels", "rectified_sigmoid", "regularizer"]

_ZETA, _GAMMA = 1.1, -0.1


@dataclass(frozen=True)
class Rounding:
    """How rounding is learned: Adam steps of ``batch_size`` samples, λ of the regularizer, the share of the warm start."""

    iterations: int = 1000
    batch_size: int = 32
    learning_rate: float = 5e-2
    regularization: float = 1.0
    warm_start: float = 0.2


def rectified_sigmoid(variable: Tensor) -> Tensor:
    """h(V), in [0, 1]."""
    return (torch.sigmoid(variable) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)


def regularizer(opened: Tensor, beta: float) -> Tensor:
    """mean(1 − |2h − 1|^β): 0 where every h is 0 or 1."""
    return (1 - (2 * opened - 1).abs().pow(beta)).mean()


def _beta(progress: float, warm_start: float) -> float:
    """20 → 2 along a half cosine between the warm start and the end."""
    along = (progress - warm_start) / (1 - warm_start)
    return 2 + 9 * (1 + math.cos(along * math.pi))


def adaptive_levels(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    grid: Grid,
    layer: Callable[[Tensor, Tensor], Tensor],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    options: Rounding,
    generator: torch.Generator,
) -> Tensor:
    """The learned levels of ``weight``, float, counted from the zero point and clamped to the grid.

    Where they do worse on all the inputs than rounding to nearest does, the nearest levels.

    ``scale``, ``zero_point``  broadcast with the weight
    ``layer``                  (input, weight) → result; per batch it receives ``inputs`` and should give ``targets``
    """
    ratio = (weight / scale).detach()
    low, high = grid.quant_min - zero_point, grid.quant_max - zero_point
    floor = ratio.floor()
    rest = (ratio - floor).clamp(1e-4, 1 - 1e-4)
    variable = torch.logit((rest - _GAMMA) / (_ZETA - _GAMMA)).requires_grad_()  # h(V) starts at the rest
    optimizer = torch.optim.Adam([variable], options.learning_rate)
    samples = [(batch, row) for batch, part in enumerate(inputs) for row in range(part.shape[0])]
    nearest = torch.clamp(ratio.round(), low, high)
    unit = _error(layer, nearest * scale, inputs, targets)
    if unit == 0.0:
        return nearest
    for iteration in range(options.iterations):
        x, y = _draw(samples, inputs, targets, options.batch_size, generator)
        opened = rectified_sigmoid(variable)
        loss = (layer(x, torch.clamp(floor + opened, low, high) * scale) - y).square().mean() / unit
        progress = iteration / options.iterations
        if progress >= options.warm_start:
            loss = loss + options.regularization * regularizer(opened, _beta(progress, options.warm_start))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learned = torch.clamp(floor + (rectified_sigmoid(variable.detach()) >= 0.5), low, high)
    return learned if _error(layer, learned * scale, inputs, targets) <= unit else nearest


@torch.no_grad()
def _error(
    layer: Callable[[Tensor, Tensor], Tensor], weight: Tensor, inputs: Sequence[Tensor], targets: Sequence[Tensor]
) -> float:
    """The mean squared error over all inputs."""
    total = sum(float((layer(x, weight) - y).square().sum()) for x, y in zip(inputs, targets, strict=True))
    return total / sum(y.numel() for y in targets)


def _draw(
    samples: list[tuple[int, int]],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    count: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    chosen = [samples[i] for i in torch.randint(len(samples), (count,), generator=generator, device="cpu").tolist()]
    return (
        torch.stack([inputs[batch][row] for batch, row in chosen]),
        torch.stack([targets[batch][row] for batch, row in chosen]),
    )
