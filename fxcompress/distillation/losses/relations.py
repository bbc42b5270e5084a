"""Losses between the relations of samples in a batch.

Embeddings are (B, D); further axes are flattened. Student and teacher may differ in D. A batch of one has no relations: its
loss is zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxcompress.distillation.losses.precision import full_precision, same_batch, unit
from fxcompress.errors import DataError

__all__ = ["angle_loss", "correlation_congruence_loss", "distance_loss", "pkt_loss", "similarity_loss"]


@full_precision
def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The difference of distances between samples (RKD, Park 2019).

    Euclidean distances, each matrix divided by the mean of its positive entries; smooth L1, mean over B².
    """
    student, teacher = _embeddings(student, teacher)
    return F.smooth_l1_loss(_distances(student), _distances(teacher))


def _distances(x: Tensor) -> Tensor:
    """From differences, since a Gram matrix cancels where samples lie close together; over the mean of positive ones."""
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / (distances > 0).sum().clamp(min=1)
    return distances / torch.where(mean > 0, mean, 1.0)


@full_precision
def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The difference of angles between samples (RKD, Park 2019).

    cos of the angle at i between i−j and i−k, for all triples; smooth L1, mean over B³. Equal samples span no angle: 0.
    """
    student, teacher = _embeddings(student, teacher)
    return F.smooth_l1_loss(_angles(student), _angles(teacher))


def _angles(x: Tensor) -> Tensor:
    directions = unit(x[None] - x[:, None])
    return directions @ directions.transpose(1, 2)


@full_precision
def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The difference of similarity matrices (Tung 2019): ‖Gˢ − Gᵗ‖² / B², the rows of G = X Xᵀ of length one."""
    student, teacher = _embeddings(student, teacher)
    return F.mse_loss(unit(student @ student.T), unit(teacher @ teacher.T))


@full_precision
def pkt_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The difference of neighbourhoods as probabilities (PKT, Passalis 2018).

    p = (cos + 1) / 2 with rows (diagonal included) of sum one; mean over B² of pᵗ log((pᵗ + 1e-7) / (pˢ + 1e-7)).
    """
    student, teacher = _embeddings(student, teacher)
    s, t = _neighbours(student), _neighbours(teacher)
    return (t * torch.log((t + 1e-7) / (s + 1e-7))).mean()


def _neighbours(x: Tensor) -> Tensor:
    directions = unit(x)
    similar = ((directions @ directions.T) / 2 + 0.5).clamp(0, 1)
    return similar / similar.sum(1, keepdim=True)


@full_precision
def correlation_congruence_loss(student: Tensor, teacher: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    """The difference of correlations under a Gaussian kernel (CC, Peng 2019).

    C = Σ over p ≤ ``order`` of e^(−2γ) (2γ)^p / p! · (f̂ᵢ·f̂ⱼ)^p with f̂ of length one: the kernel's Taylor series; the loss is
    the mean over B² of (Cˢ − Cᵗ)².
    """
    student, teacher = _embeddings(student, teacher)
    return F.mse_loss(_correlations(student, gamma, order), _correlations(teacher, gamma, order))


def _correlations(x: Tensor, gamma: float, order: int) -> Tensor:
    directions = unit(x)
    cosines = directions @ directions.T
    terms: Any = (math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * cosines**p for p in range(order + 1))
    return torch.stack(list(terms)).sum(0)


def _embeddings(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    same_batch(student, teacher)
    if not student.dim() > 1 < teacher.dim():
        raise DataError(f"embeddings are (B, D), not {tuple(student.shape)} and {tuple(teacher.shape)}.")
    return student.flatten(1), teacher.flatten(1)
