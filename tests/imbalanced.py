"""Networks like MobileNetV2 whose channels were rescaled against each other: same function, ranges that quantize badly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Inverted", "imbalanced", "mobile"]


class Inverted(nn.Module):
    """MobileNetV2's block: expand, depthwise, project, shortcut."""

    def __init__(self, width: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.expand, self.project = nn.Conv2d(width, 4 * width, 1), nn.Conv2d(4 * width, width, 1)
        self.depthwise = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width)
        self.first, self.second = activation(), activation()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.second(self.depthwise(self.first(self.expand(x)))))


def mobile(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """A stem, three inverted residuals, a classifier."""
    torch.manual_seed(0)
    blocks = [Inverted(8, activation) for _ in range(3)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), activation(), *blocks, *head).eval()


def imbalanced(model: nn.Module, octaves: float = 8.0) -> Any:
    """``model`` with the hidden channels of its blocks rescaled by up to ``2^±octaves/2``; what it computes stays."""
    generator = torch.Generator().manual_seed(3)
    for block in model.modules():
        if isinstance(block, Inverted):
            for first, second in ((block.expand, block.depthwise), (block.depthwise, block.project)):
                t = torch.exp2((torch.rand(first.weight.shape[0], generator=generator) - 0.5) * octaves)
                with torch.no_grad():
                    first.weight.mul_(t[:, None, None, None])
                    first.bias.mul_(t)  # type: ignore[union-attr]
                    second.weight.div_(t[:, None, None, None] if second.groups > 1 else t[None, :, None, None])
    return model
