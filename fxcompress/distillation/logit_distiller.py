"""Distillation of class scores."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from fxcompress.distillation.base_distiller import BaseDistiller
from fxcompress.distillation.losses import dist_loss, dkd_loss, kd_loss
from fxcompress.distillation.parameters import distiller
from fxcompress.distillation.step import Step
from fxcompress.errors import DataError
from fxcompress.options import Positive, Weight

__all__ = ["DISTDistiller", "DKDDistiller", "LogitDistiller", "warmed_up"]


def warmed_up(epoch: int, warmup_epochs: int) -> float:
    """min(epoch / warmup_epochs, 1), epochs counted from 1."""
    return min(epoch / warmup_epochs, 1.0) if warmup_epochs > 0 else 1.0


@distiller
class LogitDistiller(BaseDistiller):
    """Learn the teacher's softened scores (Hinton 2015): ``alpha`` · KL · T² + ``beta`` · cross entropy.

    ``beta`` scales the task loss; among the ``distillers`` of another one, labels are that one's affair. Logits are (B, C),
    or (B, C, *positions). See :func:`~fxcompress.distillation.losses.kd_loss`; further options: :class:`BaseDistiller`.
    """

    term: ClassVar[str] = "kd"

    temperature: Positive = 4.0
    alpha: Weight = 0.5
    beta: Weight = 0.5

    def factors(self) -> dict[str, float]:
        return {self.term: self.alpha, "task": self.beta}

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        return {self.term: kd_loss(*step.logits(), self.temperature)}


@distiller
class DKDDistiller(BaseDistiller):
    """Learn the target's score and the other classes' apart (Zhao 2022).

    min(epoch / ``warmup_epochs``, 1) · (``alpha`` · target + ``beta`` · others), beside the cross entropy; needs labels. See
    :func:`~fxcompress.distillation.losses.dkd_loss`; further options: :class:`BaseDistiller`.
    """

    term: ClassVar[str] = "dkd"

    temperature: Positive = 4.0
    alpha: Weight = 1.0
    beta: Weight = 8.0
    warmup_epochs: Annotated[int, Field(ge=0)] = 20

    def factors(self) -> dict[str, float]:
        return {self.term: warmed_up(self.epoch, self.warmup_epochs)}

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        if not isinstance(step.targets, Tensor):
            raise DataError("DKDDistiller takes the target class apart, and there are no targets.")
        pair = step.logits()
        return {self.term: dkd_loss(*pair, step.targets, self.alpha, self.beta, self.temperature, step.ignore_index)}


@distiller
class DISTDistiller(BaseDistiller):
    """Learn how the teacher's scores correlate, by sample (``beta``) and by class (``gamma``) (Huang 2022).

    See :func:`~fxcompress.distillation.losses.dist_loss`; further options: :class:`BaseDistiller`.
    """

    term: ClassVar[str] = "dist"

    beta: Weight = 1.0
    gamma: Weight = 1.0
    temperature: Positive = 1.0

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        return {self.term: dist_loss(*step.logits(), self.beta, self.gamma, self.temperature)}
