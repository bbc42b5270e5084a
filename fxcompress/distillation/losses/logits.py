"""Losses between class scores.

Logits are (B, C), or (B, C, *positions) for dense outputs; every loss is the mean over samples and positions. Classes are
axis 1. Labels are (B,) or (B, *positions) with values in [0, C); those equal to ``ignore_index`` do not count.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
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
    return temperature**2 * _kl(student, teacher, temperature).mean()


def _kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(teacher / T) ‖ softmax(student / T)) by row."""
    divergence: Tensor = _Divergence.apply(student, teacher, temperature)[0]
    return divergence


class _Divergence(torch.autograd.Function):
    """KL(p ‖ q) by row as Σ p · (d + e⁻ᵈ − 1), d = log p − log q, with p and q of the teacher's and the student's scores.

    No term is negative, so that none takes digits from another, however near p and q are; what is near is compared by how
    far the scores moved.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, ...]:
        log_q, log_p = (F.log_softmax((x - x.amax(1, keepdim=True)) / temperature, 1) for x in (student, teacher))
        p, q = log_p.exp(), log_q.exp()
        moved = torch.where(student == teacher, 0.0, teacher - student) / temperature  # -inf in both moves nowhere
        moved = moved - (q * moved).sum(1, keepdim=True)
        near = moved.abs().amax(1, keepdim=True) < 1.0
        d = torch.where(near, moved - torch.log1p((q * torch.expm1(moved)).sum(1, keepdim=True)), log_p - log_q)
        d = d.nan_to_num(0.0, posinf=torch.inf)  # where p is 0, p · d is as well
        near, less = d.abs() < 0.25, torch.expm1(-d)
        terms = torch.where(near, p * _excess(d, less), p * d - p + q)
        return terms.sum(1), torch.where(near, p * less, q - p), p, d

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.temperature = inputs[2]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        divergence, of_student, p, d = ctx.saved_tensors
        gradient = gradients[0].unsqueeze(1) / ctx.temperature
        of_teacher = p * (d - divergence.unsqueeze(1)) if ctx.needs_input_grad[1] else None
        return gradient * of_student, None if of_teacher is None else gradient * of_teacher, None


def _excess(d: Tensor, less: Tensor) -> Tensor:
    """d + e⁻ᵈ − 1 for |d| < 1/4, to the last digits: 2 sinh²(d/2) − (sinh d − d), a series; ``less`` is e⁻ᵈ − 1."""
    square = d * d
    series = 1 + square / 20 * (1 + square / 42 * (1 + square / 72 * (1 + square / 110)))
    return less * less / (2 + 2 * less) - d * square / 6 * series


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
    (binary_s, rest_s), (binary_t, rest_t) = (_decoupled(x / temperature, target) for x in (student, teacher))
    return temperature**2 * (alpha * _kl(binary_s, binary_t) + beta * _kl(rest_s, rest_t)).mean()


def _decoupled(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Scores whose softmax is [p, 1 − p], and the softmax over the other classes."""
    others = scores.masked_fill(target, -torch.inf)
    return torch.stack([scores[target], torch.logsumexp(others, 1)], 1), others


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
