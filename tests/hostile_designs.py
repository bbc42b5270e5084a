"""Models that are hard to prune: small forms of what published networks do."""

# mypy: disable-error-code="arg-type, attr-defined, func-returns-value, operator"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.channel_cases import Hostile, c3, net


def shaped_like_what_was_read(self: Any, x: Tensor) -> Tensor:
    """The number of channels is asked of a tensor that other channels make."""
    y = F.relu(self.a(x))
    n, c, h, w = y.shape
    return self.o(self.b(y).reshape(n, 4, 2, h * w).reshape(n, c, h, w))


def divided_by_the_spread_of_groups(self: Any, x: Tensor) -> Tensor:
    """Evolved normalisation (EvoNorm-S0): groups of channels by their standard deviation, repeated for every channel."""
    y = self.a(x)
    n, c, h, w = y.shape
    grouped = y.reshape(n, 4, c // 4, h, w)
    spread = (grouped.var((2, 3, 4), unbiased=False, keepdim=True) + 1e-5).sqrt()
    return self.o(y * torch.sigmoid(y * self.v) / spread.expand(grouped.shape).reshape(n, c, h, w))


MODELS = {
    "spread of groups": Hostile(
        lambda: net(divided_by_the_spread_of_groups, a=c3(3, 16), o=c3(16, 3), v=torch.randn(1, 16, 1, 1)), statistics=True
    ),
    "a size asked of other channels": Hostile(
        lambda: net(shaped_like_what_was_read, a=c3(3, 8), b=c3(8, 8), o=c3(8, 3)),
        options={"sparsity": 0.2},
    ),
}
