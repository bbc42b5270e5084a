"""Losses between features of layers.

A feature is (B, C) or (B, C, *positions), channels on axis 1 unless ``channel_dim`` says otherwise. Several layers are given
as lists; their losses are added up.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fxcompress.distillation.losses.precision import Features, full_precision, layers, same_shape, unit
from fxcompress.errors import ConfigError, DataError

__all__ = [
    "attention_transfer_loss",
    "feature_loss",
    "fsp_loss",
    "fsp_matrix",
    "hcl_loss",
    "hint_loss",
    "ofd_loss",
    "ofd_margin",
]


@full_precision
def hint_loss(student: Features, teacher: Features) -> Tensor:
    """The mean squared difference over every element (FitNets, Romero 2015), after the student went through a regressor."""
    return _sum(F.mse_loss(s, t) for s, t in _alike(student, teacher))


@full_precision
def feature_loss(
    student: Features,
    teacher: Features,
    loss_type: str = "mse",
    *,
    axis: Literal["channel", "spatial", "flat"] = "channel",
    normalize: bool = False,
    channel_dim: int = 1,
) -> Tensor:
    """The difference of two features.

    ``mse`` and ``l1`` are means over every element. ``cosine`` is the mean of 1 − cos and ``kl`` the mean of
    KL(softmax(teacher) ‖ softmax(student)), along ``axis``: ``channel``, at every position; ``spatial``, over the positions
    of every channel; ``flat``, over everything in a sample. ``normalize`` first gives the vectors along ``axis`` length one.
    """
    if loss_type not in _DIFFERENCES:
        raise ConfigError(f"there is no loss_type {loss_type!r}; known: {', '.join(_DIFFERENCES)}.")
    if axis not in ("channel", "spatial", "flat"):
        raise ConfigError(f"there is no axis {axis!r}; known: channel, spatial, flat.")
    if any(s.dim() < 2 for s, _ in layers(student, teacher)):
        raise DataError("a feature is (B, C) or (B, C, *positions); one given has a single axis.")
    pairs = [(_vectors(s, axis, channel_dim), _vectors(t, axis, channel_dim)) for s, t in _alike(student, teacher)]
    if normalize:
        pairs = [(unit(s), unit(t)) for s, t in pairs]
    return _sum(_DIFFERENCES[loss_type](s, t) for s, t in pairs)


def _vectors(feature: Tensor, axis: str, channel_dim: int) -> Tensor:
    """``feature`` with the axes that belong together last, as one."""
    last = feature.movedim(channel_dim, -1)
    if axis == "flat":
        return last.flatten(1)
    return last if axis == "channel" or last.dim() == 2 else last.flatten(1, -2).transpose(1, 2)


def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return (1 - (unit(student) * unit(teacher)).sum(-1)).mean()


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    log_s, log_t = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return (log_t.exp() * (log_t - log_s)).sum(-1).mean()


_DIFFERENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "cosine": _cosine,
    "kl": _divergence,
}


@full_precision
def attention_transfer_loss(student: Features, teacher: Features, p: float = 2, normalize: bool = True) -> Tensor:
    """The difference of attention maps (Zagoruyko 2017): where a layer looks, whatever its channels.

    Q = mean over channels of |f|^p, divided by its length per sample if ``normalize``; the loss is the mean over samples
    and positions of (Qˢ − Qᵗ)², added up over layers. The larger map is average-pooled to the smaller one's size first.
    """
    if p < 1:
        raise ConfigError(f"p is {p}; the power of an attention map is 1 or more.")
    total = []
    for s, t in layers(student, teacher):
        s, t = _same_size(s, t)
        total.append(F.mse_loss(_attention(s, p, normalize), _attention(t, p, normalize)))
    return _sum(total)


def _attention(feature: Tensor, p: float, normalize: bool) -> Tensor:
    attention = feature.abs().pow(p).mean(1).flatten(1)
    return unit(attention) if normalize else attention


@full_precision
def fsp_loss(student: Features, teacher: Features) -> Tensor:
    """The difference of the flow between layers (Yim 2017): mean of (Gˢ − Gᵗ)² for each two consecutive layers, added up.

    See :func:`fsp_matrix`. Student and teacher need the same channels.
    """
    pairs = layers(student, teacher)
    if len(pairs) < 2:
        raise DataError("the flow of solution procedure needs two layers at least.")
    total = []
    for (s1, t1), (s2, t2) in itertools.pairwise(pairs):
        flow_s, flow_t = fsp_matrix(s1, s2), fsp_matrix(t1, t2)
        same_shape(flow_s, flow_t)
        total.append(F.mse_loss(flow_s, flow_t))
    return _sum(total)


@full_precision
def fsp_matrix(first: Tensor, second: Tensor) -> Tensor:
    """G = F₁ F₂ᵀ / (H·W), (B, C₁, C₂); the larger map is average-pooled to the smaller one's size first."""
    first, second = _same_size(first, second)
    first, second = first.flatten(2), second.flatten(2)
    return first @ second.transpose(1, 2) / first.shape[2]


@full_precision
def ofd_loss(student: Features, teacher: Features, margin: Features) -> Tensor:
    """The partial squared distance of features before their ReLU (Heo 2019).

    With t = max(teacher, margin) per channel: Σ (s − t)² over elements with s > t or t > 0, divided by the batch size and
    1000; of L layers the i-th counts 2^−(L−1−i). ``margin`` is (C,), from :func:`ofd_margin`.
    """
    pairs = _alike(student, teacher)
    margins = [margin] if isinstance(margin, Tensor) else list(margin)
    total = []
    for depth, ((s, t), least) in enumerate(zip(pairs, margins, strict=True)):
        t = torch.maximum(t, least.to(t.dtype).reshape(-1, *[1] * (t.dim() - 2)))
        counts = (s > t) | (t > 0)
        total.append(torch.where(counts, (s - t).square(), 0.0).sum() / (1000 * len(s)) * 2.0 ** (depth + 1 - len(pairs)))
    return _sum(total)


def ofd_margin(mean: Tensor, deviation: Tensor) -> Tensor:
    """The expected value of a normal variable where it is negative: a channel's margin from its BatchNorm (β, |γ|).

    m = μ − σ φ(μ/σ) / Φ(−μ/σ); −3σ where hardly anything is negative (Φ ≤ 1e-3); min(μ, 0) for a dead channel (σ = 0).
    """
    mean, deviation = mean.double(), deviation.double().abs()
    dead = deviation == 0
    ratio = mean / torch.where(dead, 1.0, deviation)
    negative = torch.special.ndtr(-ratio)
    density = torch.exp(-ratio.square() / 2) / (2 * torch.pi) ** 0.5
    rare = negative <= 1e-3
    margin = torch.where(rare, -3 * deviation, mean - deviation * density / torch.where(rare, 1.0, negative))
    return torch.where(dead, mean.clamp(max=0.0), margin)


@full_precision
def hcl_loss(student: Features, teacher: Features) -> Tensor:
    """The hierarchical context loss (ReviewKD, Chen 2021): squared differences at several scales.

    (mse + Σ wₗ mse(pooled to l×l)) / (1 + Σ wₗ) for l of 4, 2, 1 that are smaller than the map, w = ½, ¼, ⅛ in turn.
    """
    total = []
    for s, t in _alike(student, teacher):
        weight, weights, loss = 1.0, 1.0, F.mse_loss(s, t)
        for size in (4, 2, 1) if s.dim() == 4 else ():
            if size >= s.shape[2]:
                continue
            weight /= 2
            weights += weight
            loss = loss + weight * F.mse_loss(F.adaptive_avg_pool2d(s, size), F.adaptive_avg_pool2d(t, size))
        total.append(loss / weights)
    return _sum(total)


def _alike(student: Features, teacher: Features) -> list[tuple[Tensor, Tensor]]:
    pairs = layers(student, teacher)
    for pair in pairs:
        same_shape(*pair)
    return pairs


def _same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller size, the larger one average-pooled."""
    if a.dim() != b.dim() or a.dim() < 3:
        raise DataError(f"maps are (B, C, *positions) of equal rank, not {tuple(a.shape)} and {tuple(b.shape)}.")
    if a.shape[2:] == b.shape[2:]:
        return a, b
    size = tuple(map(min, a.shape[2:], b.shape[2:]))
    return _pooled(a, size), _pooled(b, size)


def _pooled(x: Tensor, size: tuple[int, ...]) -> Tensor:
    pools: dict[int, Any] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
    return x if tuple(x.shape[2:]) == size else pools[len(size)](x, size)


def _sum(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(losses)).sum()
