"""Contrastive distillation, alone or under torchrun: FOLDER. Every rank writes its memories to FOLDER/WORLD-RANK.pt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fxcompress.distillation import IndexedDataset, make_distiller
from fxcompress.distributed import rank, world
from fxcompress.training import Recipe, train


def net(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


def main() -> None:
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    teacher, student, x = net(16), net(8), torch.randn(32, 6)
    loader = DataLoader(IndexedDataset(TensorDataset(x, teacher(x).argmax(1))), batch_size=8, shuffle=True)
    found: dict[str, Any] = {}
    for mode, options in (("bank", {"samples": 32}), ("queue", {}), ("batch", {})):
        config = {"type": "CRDDistiller", "mode": mode, "num_negatives": 12, "feature_dim": 4, **options}
        distiller = make_distiller(config, teacher=teacher, student=student)
        history = train(distiller, loader, Recipe(epochs=2, lr=0.01, optimizer="sgd"), progress=False)
        found[mode] = {
            "memory": dict(distiller.get_submodule("memory").named_buffers()),
            "loss": [row["loss"] for row in history.rows],
            "weights": [p.detach() for p in distiller.student.parameters()],
        }
    torch.save(found, folder / f"{world()}-{rank()}.pt")


if __name__ == "__main__":
    main()
