"""Distillation of class scores."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn

from fxcompress.distillation.base_distiller import BaseDistiller, Step
from fxcompress.distillation.losses import dist_loss, dkd_loss, kd_loss
from fxcompress.errors import ConfigError, DataError

__all__ = ["DISTDistiller", "DKDDistiller", "LogitDistiller", "positive", "warmed_up"]


def positive(name: str, value: float) -> float:
    """``value``, or ConfigError unless it is a finite number above 0."""
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name} is {value!r}; it is a finite number above 0.")
    return value


def weights(**given: float) -> Iterable[float]:
    """The values, or ConfigError unless all are finite numbers, 0 or more."""
    for name, value in given.items():
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{name} is {value!r}; it is a finite number, 0 or more.")
    return given.values()


def warmed_up(epoch: int, warmup_epochs: int) -> float:
    """min(epoch / warmup_epochs, 1), epochs counted from 1."""
    return min(epoch / warmup_epochs, 1.0) if warmup_epochs > 0 else 1.0


class LogitDistiller(BaseDistiller):
    """Learn the teacher's softened scores (Hinton 2015): ``alpha`` · KL · T² + ``beta`` · cross entropy.

    ``beta`` scales the task loss; among the ``distillers`` of another one, labels are that one's affair. Logits are (B, C),
    or (B, C, *positions). See :func:`~fxcompress.distillation.losses.kd_loss`; further options: :class:`BaseDistiller`.
    """

    term: ClassVar[str] = "kd"

    def __init__(
        self,
        teacher: nn.Module | None = None,
        student: nn.Module | None = None,
        temperature: float = 4.0,
        alpha: float = 0.5,
        beta: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.temperature = positive("temperature", temperature)
        self.alpha, self.beta = weights(alpha=alpha, beta=beta)
        self._bind(teacher, student)

    def task_scale(self) -> float:
        return self.beta

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        return {self.term: self.alpha * kd_loss(*step.logits(), self.temperature)}


class DKDDistiller(BaseDistiller):
    """Learn the target's score and the other classes' apart (Zhao 2022).

    min(epoch / ``warmup_epochs``, 1) · (``alpha`` · target + ``beta`` · others), beside the cross entropy; needs labels. See
    :func:`~fxcompress.distillation.losses.dkd_loss`; further options: :class:`BaseDistiller`.
    """

    term: ClassVar[str] = "dkd"

    def __init__(
        self,
        teacher: nn.Module | None = None,
        student: nn.Module | None = None,
        temperature: float = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        warmup_epochs: int = 20,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.temperature = positive("temperature", temperature)
        self.alpha, self.beta = weights(alpha=alpha, beta=beta)
        weights(warmup_epochs=warmup_epochs)
        self.warmup_epochs = warmup_epochs
        self._bind(teacher, student)

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        if not isinstance(step.targets, Tensor):
            raise DataError("DKDDistiller takes the target class apart, and there are no targets.")
        loss = dkd_loss(*step.logits(), step.targets, self.alpha, self.beta, self.temperature, step.ignore_index)
        return {self.term: warmed_up(step.epoch, self.warmup_epochs) * loss}


class DISTDistiller(BaseDistiller):
    """Learn how the teacher's scores correlate, by sample (``beta``) and by class (``gamma``) (Huang 2022).

    See :func:`~fxcompress.distillation.losses.dist_loss`; further options: :class:`BaseDistiller`.
    """

    term: ClassVar[str] = "dist"

    def __init__(
        self,
        teacher: nn.Module | None = None,
        student: nn.Module | None = None,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.temperature = positive("temperature", temperature)
        self.beta, self.gamma = weights(beta=beta, gamma=gamma)
        self._bind(teacher, student)

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        return {self.term: dist_loss(*step.logits(), self.beta, self.gamma, self.temperature)}
