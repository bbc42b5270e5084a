"""What the pages about configurations share: a model, and a file to read."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

__all__ = ["small", "written"]


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)).eval()


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path
