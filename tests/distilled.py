"""What the pages about distillers share: two networks, a batch, and the distillers between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.distillation import (
    BaseDistiller,
    make_distiller,
)

__all__ = ["INDEX", "LAYERS", "MADE", "Net", "X", "Y", "made", "models"]


class Net(nn.Module):
    """Three stages of Conv-BN-ReLU, the last with a shortcut, and a classifier."""

    def __init__(self, width: int, classes: int = 5) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.stage2 = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(inplace=True)
        )
        self.conv, self.bn = nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(x))
        x = self.relu(self.bn(self.conv(x)) + x)
        return self.fc(x.mean((2, 3)))


LAYERS = ["stage1", "stage2"]
X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3, 4, 0])
INDEX = torch.arange(6)


def models() -> tuple[Net, Net]:
    torch.manual_seed(0)
    return Net(8), Net(4)


MADE: dict[str, dict[str, Any]] = {
    "LogitDistiller": {},
    "DKDDistiller": {},
    "DISTDistiller": {},
    "FeatureDistiller": {"teacher_layers": LAYERS},
    "FitNetDistiller": {"teacher_layers": "stage2", "student_layers": "stage1"},
    "ATDistiller": {"teacher_layers": LAYERS},
    "FSPDistiller": {"teacher_layers": LAYERS},
    "OFDDistiller": {},
    "ReviewKDDistiller": {"teacher_layers": LAYERS},
    "RelationDistiller": {"relation_type": ["distance", "angle", "similarity"]},
    "RKDDistiller": {},
    "CRDDistiller": {"samples": 10, "num_negatives": 7, "feature_dim": 4},
    "PKTDistiller": {},
    "CCDistiller": {},
}


def made(name: str, **options: Any) -> BaseDistiller:
    teacher, student = models()
    return make_distiller({"type": name, **MADE[name], **options}, teacher=teacher, student=student)
