"""Losses, and what each of them counts."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

__all__ = ["Weighted"]


class Weighted(dict[str, Tensor]):
    """Losses by name, each times its weight: their sum is the total.

    ``raw`` holds them before that and ``weights`` the factors, for whoever keeps account of both.
    """

    def __init__(self, raw: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
        self.raw, self.weights = dict(raw), {name: float(weights.get(name, 1.0)) for name in raw}
        super().__init__({name: _times(self.weights[name], value) for name, value in raw.items()})


def _times(weight: float, value: Tensor) -> Tensor:
    return value if weight == 1.0 else weight * value
