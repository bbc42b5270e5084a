"""Distillation stopped at a step and resumed ends bit for bit where an uninterrupted run ends; NaN stops it whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fxcompress.distillation import IndexedDataset, make_distiller
from fxcompress.errors import TrainingError
from fxcompress.training import Recipe, checkpoint, train
from tests.interruption import StopAfter, StoppedError

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(44, 3, 8, 8, generator=GENERATOR), torch.randint(4, (44,), generator=GENERATOR)


def net(width: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, width, 1), (width, 2 * width, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.Dropout(0.1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 4))


LAYERS = ["2", "6"]
EVERYTHING: list[dict[str, Any]] = [
    {"type": "CRDDistiller", "samples": 44, "num_negatives": 16, "feature_dim": 4},
    {"type": "DKDDistiller", "warmup_epochs": 3},
    {"type": "OFDDistiller"},
    {"type": "ReviewKDDistiller", "teacher_layers": LAYERS},
    {"type": "FitNetDistiller", "teacher_layers": LAYERS, "projector": "conv_bn"},
]
CONFIGS: dict[str, dict[str, Any]] = {
    "bank, margins, projectors, fusion, warm-up": {"type": "BaseDistiller", "distillers": EVERYTHING},
    "queue": {"type": "CRDDistiller", "mode": "queue", "num_negatives": 20, "feature_dim": 4},
    "a teacher that learns": {"type": "LogitDistiller", "freeze_teacher": False},
    "a cached teacher": {"type": "LogitDistiller", "cache_teacher": "folder"},
}


def run(config: dict[str, Any], folder: Path, stop: int | None = None) -> dict[str, Tensor]:
    """The state at the end of the run that lives in ``folder``."""
    torch.manual_seed(1)
    teacher, student = net(8), net(4)
    if "cache_teacher" in config:
        config = {**config, "cache_teacher": str(folder / "cache")}
    distiller = make_distiller(config, teacher=teacher, student=student, example_inputs=X[:2])
    options: dict[str, Any] = {"accumulate": 2, "ema": 0.9, "clip_norm": 1.0, "precision": "bf16", "checkpoint_every": 1}
    train(
        distiller,
        DataLoader(IndexedDataset(TensorDataset(X, Y)), batch_size=8, shuffle=True),
        Recipe(epochs=2, lr=0.01, scheduler="cosine", **options),
        checkpoint=folder / "run.pt",
        resume=True,
        progress=False,
        callbacks=[] if stop is None else [StopAfter(stop)],
    )
    return {name: value.clone() for name, value in distiller.state_dict().items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_distillation_stopped_at_steps_and_resumed_ends_bit_for_bit_the_same(name: str, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = run(CONFIGS[name], whole)
    for step in (1, 2, 5):
        with pytest.raises(StoppedError):
            run(CONFIGS[name], stopped, step)
    found = run(CONFIGS[name], stopped)
    assert found.keys() == expected.keys()
    assert not [key for key, value in expected.items() if not torch.equal(value, found[key])]


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = {"type": "FeatureDistiller", "teacher_layers": LAYERS}
    distiller = make_distiller(config, teacher=net(8), student=net(4), example_inputs=X[:2])
    batches = [(X[:8], Y[:8])] * 3 + [(X[:8] * torch.nan, Y[:8])]
    with pytest.raises(TrainingError, match="loss term 'task' is nan at step 4"):
        train(distiller, batches, Recipe(checkpoint_every=1), checkpoint=tmp_path / "run.pt", progress=False)
    kept = checkpoint.read(tmp_path / "run.pt")
    assert kept["step"] == 3
    assert all(bool(value.isfinite().all()) for value in kept["model"]["state"].values())
