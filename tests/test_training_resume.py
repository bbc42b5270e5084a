"""Checkpoints: a run that is killed and resumed ends where an uninterrupted one ends, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from fxcompress.training import Recipe, train
from tests.interruption import StopAfter, StoppedError

PROGRAM = Path(__file__).parent / "programs" / "resumable.py"
ROOT = Path(__file__).parent.parent


def program(folder: Path, *arguments: str) -> int:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(PROGRAM), str(folder), *arguments]
    return subprocess.run(command, check=False, env=environment, capture_output=True).returncode


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_killed_at_several_steps_ends_bit_for_bit_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()  # type: ignore[func-returns-value]
    assert program(whole) == 0
    for step in ("2", "9", "19"):
        assert program(killed, step) == -signal.SIGKILL
    assert program(killed) == 0
    assert same(load_file(whole / "weights.safetensors"), load_file(killed / "weights.safetensors"))


X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2))


class OwnLoader:
    """Not a DataLoader; shuffles with the global generator."""

    def __iter__(self) -> Any:
        for batch in torch.randperm(40).split(8):
            yield X[batch] + 0.01 * torch.randn(len(batch), 6), Y[batch]


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True),
    "in order": lambda: DataLoader(TensorDataset(X, Y), batch_size=8),
    "workers": lambda: DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True, num_workers=1),
    "weighted": lambda: DataLoader(TensorDataset(X, Y), batch_size=8, sampler=WeightedRandomSampler([1.0, 2.0] * 20, 40)),
    "generator": lambda: DataLoader(
        TensorDataset(X, Y),
        batch_sampler=torch.utils.data.BatchSampler(
            torch.utils.data.RandomSampler(range(40), generator=torch.Generator().manual_seed(5)), 8, False
        ),
    ),
    "a list": lambda: list(zip(X.split(8), Y.split(8), strict=True)),
    "own loader": OwnLoader,
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("step", [3, 10])
def test_every_kind_of_data_goes_on_where_it_stopped(kind: str, step: int, tmp_path: Path) -> None:
    recipe = Recipe(epochs=3, checkpoint_every=1, seed=7)
    torch.manual_seed(11)
    whole = small()
    train(whole, LOADERS[kind](), recipe, loss="cross_entropy")
    with pytest.raises(StoppedError):
        train(
            small(),
            LOADERS[kind](),
            recipe,
            loss="cross_entropy",
            callbacks=[StopAfter(step)],
            checkpoint=tmp_path / "run.pt",
        )
    resumed = small()
    train(resumed, LOADERS[kind](), recipe, loss="cross_entropy", checkpoint=tmp_path / "run.pt", resume=True)
    assert same(whole.state_dict(), resumed.state_dict())
