"""Attention-based fusion: a layer's features joined with those of all deeper layers (ReviewKD, Chen 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["AttentionFusion", "Reviewer"]


class AttentionFusion(nn.Module):
    """ABF: the layer's features (B, ``inputs``, H, W) and the residual of the deeper one, weighted per position and added.

    Returns features with ``outputs`` channels, and the residual for the next layer, both at the size of the teacher's map.
    """

    def __init__(self, inputs: int, middle: int, outputs: int, fuse: bool) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(inputs, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.conv2 = nn.Sequential(nn.Conv2d(middle, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))
        self.attention = nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid()) if fuse else None
        for block in (self.conv1, self.conv2):
            nn.init.kaiming_uniform_(block[0].weight, a=1)  # type: ignore[arg-type]

    def forward(self, x: Tensor, deeper: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        x = self.conv1(x)
        if self.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, x.shape[2:], mode="nearest")
            weights = self.attention(torch.cat([x, deeper], 1))
            x = x * weights[:, :1] + deeper * weights[:, 1:]
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="nearest")
        return self.conv2(x), x


class Reviewer(nn.Module):
    """Fusions for layers from shallow to deep; the deepest has nothing to fuse with."""

    def __init__(self, inputs: Sequence[int], outputs: Sequence[int], middle: int) -> None:
        super().__init__()
        last = len(inputs) - 1
        self.fusions = nn.ModuleList(
            AttentionFusion(i, middle, o, fuse=n < last) for n, (i, o) in enumerate(zip(inputs, outputs, strict=True))
        )

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> list[Tensor]:
        """The fused student features, each of its teacher's shape."""
        found: list[Tensor] = []
        residual: Tensor | None = None
        for fusion, x, like in reversed(list(zip(self.fusions, students, teachers, strict=True))):
            fused, residual = fusion(x, residual, like.shape[2:])
            found.append(fused)
        return found[::-1]
