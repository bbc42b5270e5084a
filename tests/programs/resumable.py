"""A training run in which everything is random, killed at a step on request: FOLDER [STEP].

Prints nothing; writes the final weights, as safetensors, to FOLDER/weights.safetensors.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fxcompress.pruning import AGPScheduler, MagnitudePruner
from fxcompress.training import Callback, OnEpoch, Recipe, Trainer, train


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Samples that differ every time they are read, by all three global generators."""

    def __len__(self) -> int:
        return 44

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        clean = torch.randn(6, generator=torch.Generator().manual_seed(index))
        noise = 0.1 * torch.randn(6) + random.random() + float(np.random.standard_normal())
        return clean + noise, (clean.sum() > 0).long()


class Kill(Callback):
    """SIGKILL to this very process, after a step."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def after_step(self, trainer: Trainer, step: int) -> None:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, kill_at: int | None = None, **recipe: Any) -> dict[str, Tensor]:
    """The final weights and buffers of the run that lives in ``folder``."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 2))
    schedule = AGPScheduler(target_sparsity=0.5, end_epoch=3, frequency=2, pruner=MagnitudePruner(), model=model)
    options: dict[str, Any] = {
        "epochs": 4,
        "lr": 0.01,
        "scheduler": "cosine",
        "accumulate": 2,
        "clip_norm": 1.0,
        "ema": 0.9,
        "precision": "fp16",
        "checkpoint_every": 1,
        "seed": 3,
    }
    history = train(
        model,
        DataLoader(Noisy(), batch_size=4, shuffle=True),
        Recipe(**{**options, **recipe}),
        loss="cross_entropy",
        callbacks=[OnEpoch(schedule.step), Kill(kill_at)],
        checkpoint=folder / "run.pt",
        resume=True,
        progress=False,
    )
    losses = torch.tensor([row["loss"] for row in history.rows], dtype=torch.float64)
    return {"losses": losses, **{name: value.detach().clone() for name, value in model.state_dict().items()}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    weights = run(place, int(sys.argv[2]) if len(sys.argv) > 2 else None)
    save_file(weights, place / "weights.safetensors")
