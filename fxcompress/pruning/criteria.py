"""Importance of channels: pure functions from the slices of a tensor to one score per slice; the smallest go first.

``slices`` is a tensor seen along the dimension that is pruned, one row per index: ``weight.movedim(dim, 0).flatten(1)``.
Scores are float64 [n], and finite: values that no criterion can rank are a ConfigError that names the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxcompress.errors import ConfigError, did_you_mean
from fxcompress.registry import Registry

__all__ = [
    "CRITERIA",
    "NORMALISATIONS",
    "REDUCTIONS",
    "bn_scale",
    "combine",
    "fpgm",
    "hrank",
    "l1_norm",
    "l2_norm",
    "normalise",
    "random",
    "scored",
    "taylor",
]


def l1_norm(slices: Tensor, name: str = "the weight") -> Tensor:
    """Σ|w| of every slice (Li et al. 2017)."""
    rows = slices.detach().flatten(1)
    return _finite(rows.abs().sum(1, dtype=_precision(rows)).to(torch.float64), name)  # torch's own norm is 4 times slower


def l2_norm(slices: Tensor, name: str = "the weight") -> Tensor:
    """√Σw² of every slice."""
    rows = slices.detach().flatten(1)
    return _finite(torch.linalg.vector_norm(rows, 2, dim=1, dtype=_precision(rows)).to(torch.float64), name)


def bn_scale(scale: Tensor, name: str = "the scale") -> Tensor:
    """|γ| of a normalisation layer (Liu et al. 2017); ``scale`` is [n]."""
    return _finite(scale.detach().to(torch.float64).abs(), name)


def taylor(slices: Tensor, gradients: Tensor | None, name: str = "the weight") -> Tensor:
    """|Σ w·∂L/∂w| of every slice: by how much the loss moves, to first order, when the slice becomes zero.

    The sum is inside the absolute value (Molchanov et al. 2017), so that parts that cancel count for nothing. Raises
    ConfigError where there are no gradients.
    """
    if gradients is None:
        raise ConfigError(f"{name} has no gradient; taylor needs the loss over data, and backward() before it.")
    return _finite(
        (slices.detach() * gradients.detach()).flatten(1).sum(1, dtype=_precision(slices)).to(torch.float64).abs(), name
    )


def random(count: int, generator: torch.Generator) -> Tensor:
    """Uniform scores in [0, 1), reproducible by the generator."""
    return torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")


def fpgm(slices: Tensor, name: str = "the weight") -> Tensor:
    """Σ of the distances to all other slices: the smallest are nearest to the geometric median, and the others can
    replace them (He et al. 2019)."""
    points = slices.detach().flatten(1).to(torch.float64)
    return _finite(torch.cdist(points, points).sum(1), name)


def hrank(features: Tensor, name: str = "the feature maps") -> Tensor:
    """The rank of every channel's feature map, mean over the batch (Lin et al. 2020); ``features`` is [N, C, H, W] → [C].

    [N, C, D, H, W] counts as [N, C, D·H, W]. With one spatial dimension or none the batch gives the rows: [N, C, L] → the
    rank of the [N, L] matrix of every channel.
    """
    if features.dim() < 2:
        raise ConfigError(f"{name} have shape {tuple(features.shape)}; hrank takes [batch, channels, ...].")
    maps = features.detach().to(_precision(features))
    if not bool(torch.isfinite(maps).all()):
        raise _not_finite(name)
    if maps.dim() < 4:
        maps = maps.flatten(2) if maps.dim() == 3 else maps[..., None]
        return _rank(maps.transpose(0, 1))
    return _rank(maps.flatten(2, -2)).mean(0)


def _rank(matrices: Tensor) -> Tensor:
    found: Tensor = torch.linalg.matrix_rank(matrices)
    return found.to(torch.float64)


CRITERIA = Registry(
    "criterion",
    {
        "l1_norm": l1_norm,
        "l2_norm": l2_norm,
        "fpgm": fpgm,
        "bn_scale": bn_scale,
        "taylor": taylor,
        "hrank": hrank,
        "random": random,
    },
)
"""Criteria by name. One of a user's own is called as ``l1_norm`` is: ``(slices, name)`` → [n]."""


REDUCTIONS = ("sum", "mean", "max", "norm")
"""How the scores of several slices become the score of the unit they belong to; ``norm`` is √Σs²."""


def combine(parts: Sequence[Tensor | tuple[Tensor, Tensor]], reduction: str = "sum", count: int | None = None) -> Tensor:
    """The score of every unit from the scores of its slices, [count].

    A part is the scores of one tensor's slices, slice i belonging to unit i, or ``(scores, units)`` with the unit of each
    slice. ``norm`` of l2 norms is the l2 norm of all slices together. A unit without slices scores zero.
    """
    if reduction not in REDUCTIONS:
        raise ConfigError(
            f"there is no reduction {reduction!r}.{did_you_mean(reduction, REDUCTIONS)} Known: {', '.join(REDUCTIONS)}."
        )
    pairs = [part if isinstance(part, tuple) else (part, torch.arange(part.numel(), device="cpu")) for part in parts]
    units = torch.cat([units.cpu() for _, units in pairs])
    scores = torch.cat([scores.detach().to("cpu", torch.float64) for scores, _ in pairs])
    total = int(units.max()) + 1 if count is None else count
    how = {"max": "amax", "mean": "mean"}.get(reduction, "sum")
    source = scores.square() if reduction == "norm" else scores
    found = torch.zeros(total, dtype=torch.float64, device="cpu").scatter_reduce(0, units, source, how, include_self=False)
    return found.sqrt() if reduction == "norm" else found


NORMALISATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda scores: scores,
    "mean": lambda scores: scores / _positive(scores.mean()),
    "max": lambda scores: scores / _positive(scores.max()),
}
"""How the scores of one group are scaled before groups compare."""


def normalise(scores: Tensor, how: str = "mean") -> Tensor:
    """Scores of one group, divided by their mean or their largest; all zeros stay zeros."""
    if how not in NORMALISATIONS:
        hint = did_you_mean(how, NORMALISATIONS)
        raise ConfigError(f"there is no normalisation {how!r}.{hint} Known: {', '.join(NORMALISATIONS)}.")
    return NORMALISATIONS[how](scores) if scores.numel() else scores


def scored(criterion: str, slices: Tensor, name: str) -> Tensor:
    """The scores of ``slices`` by a criterion that looks at them alone; ConfigError unless it gives one number a slice."""
    found: Tensor = CRITERIA[criterion](slices, name)
    if not isinstance(found, Tensor) or found.shape != slices.shape[:1]:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(
            f"the criterion {criterion!r} gave {shape} for {name}; it gives a tensor of {slices.shape[0]} scores."
        )
    return _finite(found.detach().to(torch.float64), name)


def _positive(value: Tensor) -> Tensor:
    return torch.where(value > 0, value, torch.ones_like(value))


def _precision(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _finite(scores: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(scores).all()):
        raise _not_finite(name)
    return scores


def _not_finite(name: str) -> ConfigError:
    return ConfigError(f"{name}: NaN, infinite or overflowing values; no criterion ranks them.")
