"""How to train, as plain data: what a configuration can say about it."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from fxcompress.errors import ConfigError
from fxcompress.options import Count, Positive, Seed
from fxcompress.plan import option_types
from fxcompress.registry import Registry
from fxcompress.training.metrics import METRICS

__all__ = ["LOSSES", "LR_SCHEDULES", "OPTIMIZERS", "Horizon", "Recipe", "build_optimizer", "build_schedule"]


@dataclass(frozen=True)
class Recipe:
    """What :func:`~fxcompress.training.train` does with a model; ConfigError for a value that cannot be meant.

    ``epochs``             passes over the data
    ``lr``                 the optimizer's learning rate
    ``optimizer``          a name in OPTIMIZERS; ``optimizer_options`` are its parameters
    ``scheduler``          a name in LR_SCHEDULES, stepped with every optimizer step; ``scheduler_options`` its parameters
    ``warmup_epochs``      the learning rate rises linearly over these first
    ``precision``          ``fp32``, or autocast to ``bf16`` or ``fp16`` (with loss scaling)
    ``accumulate``         batches whose gradients are averaged into one step
    ``clip_norm``          the largest gradient norm a step may have
    ``ema``                decay of an exponential moving average of the parameters, which is then what is evaluated and kept
    ``patience``           stop after this many epochs without a better ``metric``, and keep the best weights
    ``metric``, ``mode``   what patience watches, and whether ``min`` or ``max`` is better (None: what METRICS says of
                           it: min where its name ends in ``loss`` or ``error``)
    ``checkpoint_every``   steps between checkpoints; None: at the end of every epoch
    ``gradient_norms``     measure every loss term's gradient norm on the first batch of every epoch
    ``find_unused_parameters``  for several processes: some parameters get no gradient in some steps
    ``seed``               for every random choice
    """

    epochs: Annotated[int, Field(ge=0)] = 10
    lr: Positive = 1e-3
    optimizer: str = "adamw"
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    scheduler: str = "constant"
    scheduler_options: dict[str, Any] = field(default_factory=dict)
    warmup_epochs: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    accumulate: Count = 1
    clip_norm: Positive | None = None
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    patience: Count | None = None
    metric: str = "loss"
    mode: Literal["min", "max"] | None = None
    checkpoint_every: Count | None = None
    gradient_norms: bool = True
    find_unused_parameters: bool = False
    seed: Seed = 0

    def __post_init__(self) -> None:
        adapters: dict[str, pydantic.TypeAdapter[Any]] = option_types(type(self))  # type: ignore[arg-type]
        for name, adapter in adapters.items():
            value = getattr(self, name)
            try:
                adapter.validate_python(value, strict=True)
            except pydantic.ValidationError as error:
                raise ConfigError(f"{name} is {value!r}: {error.errors()[0]['msg'].lower()}.") from error
        if "lr" in self.optimizer_options:
            raise ConfigError("optimizer_options holds lr, which has a place of its own.")
        optimizer = build_optimizer(self, [nn.Parameter(torch.zeros(1, dtype=torch.float32, device="cpu"))])
        build_schedule(self, optimizer, Horizon(self.epochs, 1))

    def better(self, value: float, best: float | None) -> bool:
        """Whether ``value`` of the metric is an improvement on ``best``."""
        if best is None:
            return True
        lower = METRICS.lower_is_better(self.metric) if self.mode is None else self.mode == "min"
        return value < best if lower else value > best

    def as_data(self) -> dict[str, Any]:
        """The recipe as plain data."""
        return dataclasses.asdict(self)


OPTIMIZERS = Registry(
    "optimizer",
    {
        "sgd": torch.optim.SGD,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "nadam": torch.optim.NAdam,
        "radam": torch.optim.RAdam,
        "rmsprop": torch.optim.RMSprop,
        "adagrad": torch.optim.Adagrad,
    },
)
"""Optimizers by name: ``(parameters, lr=..., **options)``."""

LOSSES = Registry(
    "loss",
    {
        "cross_entropy": nn.functional.cross_entropy,
        "mse": nn.functional.mse_loss,
        "l1": nn.functional.l1_loss,
        "smooth_l1": nn.functional.smooth_l1_loss,
        "binary_cross_entropy": nn.functional.binary_cross_entropy_with_logits,
    },
)
"""Losses by name: ``(output, target)`` → a scalar, or scalars by name."""


class Horizon(NamedTuple):
    """How long a training is, for schedules: ``epochs`` of ``steps_per_epoch`` optimizer steps (None: not known)."""

    epochs: int
    steps_per_epoch: int | None

    def steps(self, epochs: float, who: str) -> int:
        """Optimizer steps in ``epochs``; ConfigError where the data does not say how long an epoch is."""
        if self.steps_per_epoch is None:
            raise ConfigError(f"{who} must know how many batches an epoch has, and the data has no len().")
        return round(epochs * self.steps_per_epoch)


def _constant(horizon: Horizon) -> Callable[[int], float]:
    return lambda step: 1.0


def _linear(horizon: Horizon, final: float = 0.0) -> Callable[[int], float]:
    total = horizon.steps(horizon.epochs, "scheduler 'linear'")
    return lambda step: 1.0 + (final - 1.0) * min(step / max(total, 1), 1.0)


def _cosine(horizon: Horizon, final: float = 0.0) -> Callable[[int], float]:
    total = horizon.steps(horizon.epochs, "scheduler 'cosine'")
    return lambda step: final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * min(step / max(total, 1), 1.0)))


def _multistep(horizon: Horizon, milestones: Iterable[float] = (), gamma: float = 0.1) -> Callable[[int], float]:
    edges = [horizon.steps(epoch, "scheduler 'multistep'") for epoch in milestones]
    return lambda step: float(gamma ** sum(step >= edge for edge in edges))


def _exponential(horizon: Horizon, gamma: float = 0.95) -> Callable[[int], float]:
    epoch = horizon.steps(1, "scheduler 'exponential'")
    return lambda step: float(gamma ** (step // max(epoch, 1)))


LR_SCHEDULES = Registry(
    "scheduler",
    {
        "constant": _constant,
        "linear": _linear,
        "cosine": _cosine,
        "multistep": _multistep,
        "exponential": _exponential,
    },
)
"""Learning rates by name: ``(horizon, **options)`` → a function from the step, counted from 0, to a factor of ``lr``."""


def build_optimizer(recipe: Recipe, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The recipe's optimizer over ``parameters``."""
    found = list(parameters)
    if not found:
        raise ConfigError("the model has no parameter that requires a gradient; there is nothing to train.")
    options = {"lr": recipe.lr, **recipe.optimizer_options}
    what = f"{'optimizer_options: ' if recipe.optimizer_options else ''}optimizer {recipe.optimizer!r}"
    return _called(OPTIMIZERS[recipe.optimizer], (found,), options, what)


def build_schedule(recipe: Recipe, optimizer: Optimizer, horizon: Horizon) -> lr_scheduler.LRScheduler:
    """The recipe's learning rates, warm-up included."""
    name = f"{'scheduler_options: ' if recipe.scheduler_options else ''}scheduler {recipe.scheduler!r}"
    factor = _called(LR_SCHEDULES[recipe.scheduler], (horizon,), recipe.scheduler_options, name)
    warmup = horizon.steps(recipe.warmup_epochs, "warmup_epochs") if recipe.warmup_epochs else 0

    def rate(step: int) -> float:
        return float(factor(step)) * min((step + 1) / (warmup + 1), 1.0)

    return lr_scheduler.LambdaLR(optimizer, rate)


def _called(function: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any], what: str) -> Any:
    """``function(*args, **options)``; ConfigError naming what does not fit."""
    try:
        inspect.signature(function).bind(*args, **options)
        return function(*args, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what}: {error}.") from error
