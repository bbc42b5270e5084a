"""Losses that tell one sample from others."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fxcompress.distillation.losses.precision import full_precision

__all__ = ["info_nce_loss", "nce_loss"]


@full_precision
def nce_loss(
    positive: Tensor, negatives: Tensor, samples: int, counted: Tensor | None = None, *, logarithms: bool = False
) -> Tensor:
    """Noise-contrastive estimation (CRD, Tian 2020).

    ``positive`` (B,) and ``negatives`` (B, K) are x = exp(cos / T) / Z. With h = x / (x + K/n + 1e-7), n ``samples``: minus
    the mean over the batch of log h(positive) + Σ log(1 − h(negatives)). ``counted`` (B, K) says which negatives count.
    With ``logarithms`` they are log x, which no temperature brings out of range.
    """
    if not logarithms:
        positive, negatives = positive.log(), negatives.log()
    noise = negatives.shape[1] / samples
    offset = math.log(noise + 1e-7)
    hit = F.logsigmoid(positive - offset)
    miss = math.log(noise) - offset + F.logsigmoid(offset - negatives)
    if counted is not None:
        miss = torch.where(counted, miss, 0.0)
    return -(hit + miss.sum(1)).mean()


@full_precision
def info_nce_loss(positive: Tensor, negatives: Tensor, counted: Tensor | None = None) -> Tensor:
    """The cross entropy of picking the positive among all (van den Oord 2018).

    ``positive`` (B,) and ``negatives`` (B, K) are cos / T; ``counted`` (B, K) says which negatives count.
    """
    if counted is not None:
        negatives = negatives.masked_fill(~counted, -torch.inf)
    logits = torch.cat([positive[:, None], negatives], 1)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))
