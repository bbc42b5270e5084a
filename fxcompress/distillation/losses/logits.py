"""Losses between class scores.

Logits are (B, C), or (B, C, *positions) for dense outputs; every loss is the mean over samples and positions. Classes are
axis 1. Labels are (B,) or (B, *positions) with values in [0, C); those equal to ``ignore_index`` do not count.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fxcompress.distillation.losses.precision import full_precision, nothing
from fxcompress.errors import ConfigError, DataError

__all__ = ["check_labels", "dist_loss", "dkd_loss", "kd_loss"]


@full_precision
def kd_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """How far the student's softened scores are from the teacher's (Hinton 2015).

    T² · mean over rows of KL(softmax(teacher / T) ‖ softmax(student / T)).
    """
    student, teacher = _rows(student, teacher, temperature)
    log_s, log_t = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
    return temperature**2 * _kl(log_t, log_s).mean()


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) by row; what p gives no chance adds nothing, also where q gives it none."""
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(1)


@full_precision
def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    ignore_index: int = -100,
) -> Tensor:
    """KD taken apart: the target class against the rest, and the rest among themselves (Zhao 2022).

    T² · mean over rows of ``alpha`` · KL([pᵗ, 1 − pᵗ] ‖ [pˢ, 1 − pˢ]) + ``beta`` · KL(qᵗ ‖ qˢ), where p is the target's
    probability and q the softmax over the other classes, all at temperature T and in logarithms throughout.
    """
    student, teacher = _rows(student, teacher, temperature)
    if student.shape[1] < 2:
        raise DataError("decoupled distillation needs two classes at least.")
    check_labels(targets, student.shape[1], ignore_index)
    targets = targets.reshape(-1)
    if len(targets) != len(student):
        raise DataError(f"there are {len(targets)} labels for {len(student)} rows of scores.")
    kept = targets != ignore_index
    student, teacher, targets = student[kept], teacher[kept], targets[kept]
    if not len(targets):
        return nothing(student, teacher)
    target = F.one_hot(targets, student.shape[1]).bool()
    binary_s, rest_s = _decoupled(student / temperature, target)
    binary_t, rest_t = _decoupled(teacher / temperature, target)
    return temperature**2 * (alpha * _kl(binary_t, binary_s) + beta * _kl(rest_t, rest_s)).mean()


def _decoupled(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of [p, 1 − p], and of the softmax over the other classes with 0 (which adds nothing) at the target."""
    whole = torch.logsumexp(scores, 1)
    rest = torch.logsumexp(scores.masked_fill(target, -torch.inf), 1)
    binary = torch.stack([scores[target] - whole, rest - whole], 1)
    return binary, torch.where(target, 0.0, scores - rest[:, None])


@full_precision
def dist_loss(student: Tensor, teacher: Tensor, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0) -> Tensor:
    """How well the student's probabilities correlate with the teacher's, by sample and by class (Huang 2022).

    τ² · (``beta`` · (1 − mean over rows of r) + ``gamma`` · (1 − mean over classes of r)), with Pearson's
    r = ⟨a − ā, b − b̄⟩ / (‖a − ā‖ ‖b − b̄‖ + 1e-8) between softmax(student / τ) and softmax(teacher / τ). What is constant
    has r = 0 and no gradient.
    """
    student, teacher = _rows(student, teacher, temperature)
    p, q = F.softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    inter, intra = 1 - _pearson(p, q, 1).mean(), 1 - _pearson(p, q, 0).mean()
    return temperature**2 * (beta * inter + gamma * intra)


def _pearson(a: Tensor, b: Tensor, dim: int) -> Tensor:
    (a, length_a), (b, length_b) = _centred(a, dim), _centred(b, dim)
    return (a * b).sum(dim) / (length_a * length_b + 1e-8)


def _centred(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``x − x̄`` and its length, both exactly zero (and cut off from gradients) where ``x`` is constant up to rounding."""
    centred = x - x.mean(dim, keepdim=True)
    rounding = 8 * torch.finfo(x.dtype).eps * torch.linalg.vector_norm(x.detach(), dim=dim, keepdim=True)
    varies = torch.linalg.vector_norm(centred.detach(), dim=dim, keepdim=True) > rounding
    centred = torch.where(varies, centred, 0.0)
    length = torch.linalg.vector_norm(torch.where(varies, centred, 1.0), dim=dim)
    return centred, torch.where(varies.squeeze(dim), length, 0.0)


def check_labels(targets: Tensor, classes: int, ignore_index: int = -100) -> None:
    """DataError unless every label is a whole number in [0, classes), or ``ignore_index``."""
    if not isinstance(targets, Tensor):
        raise DataError(f"labels are a {type(targets).__name__}; they are a tensor of class numbers (int64).")
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise DataError(f"labels are {targets.dtype}; they are class numbers (int64).")
    wrong = ((targets < 0) | (targets >= classes)) & (targets != ignore_index)
    if targets.is_cuda:
        torch._assert_async(~wrong.any(), f"labels must be in [0, {classes})")
    elif bool(wrong.any()):
        raise DataError(f"label {int(targets[wrong][0])} is out of range: the models tell {classes} classes apart.")


def _rows(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Both as (rows, classes), a row per sample and position; the temperature is only checked."""
    if not 0 < temperature < math.inf:
        raise ConfigError(f"temperature is {temperature}; it is positive and finite.")
    if student.dim() < 2 or student.dim() != teacher.dim():
        raise DataError(f"logits are (B, C) or (B, C, *positions), not {tuple(student.shape)} and {tuple(teacher.shape)}.")
    if student.shape[1] != teacher.shape[1]:
        raise DataError(f"the student tells {student.shape[1]} classes apart and the teacher {teacher.shape[1]}.")
    if student.shape != teacher.shape:
        raise DataError(f"the student's logits are {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}.")
    return student.movedim(1, -1).flatten(0, -2), teacher.movedim(1, -1).flatten(0, -2)
