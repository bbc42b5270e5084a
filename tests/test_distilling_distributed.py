"""Contrastive memories in several processes: all see the samples of all, and hold the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("processes")
    program = str(ROOT / "tests" / "programs" / "distilling.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for launch in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        command = [sys.executable, *launch, program, str(folder)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")}


@pytest.mark.parametrize("mode", ["bank", "queue"])
def test_memories_are_equal_on_every_process(results: dict[str, Any], mode: str) -> None:
    first, second = results["2-0"][mode], results["2-1"][mode]
    for name, value in first["memory"].items():
        assert torch.equal(value, second["memory"][name]), name
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))


def test_two_processes_and_one_learn_the_same_with_a_bank(results: dict[str, Any]) -> None:
    one, two = results["1-0"]["bank"], results["2-0"]["bank"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    for name, value in one["memory"].items():
        assert torch.allclose(value.float(), two["memory"][name].float(), atol=1e-4), name
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one["weights"], two["weights"], strict=True))


def test_in_batch_negatives_train_on_two_processes(results: dict[str, Any]) -> None:
    losses = results["2-0"]["batch"]["loss"]
    assert losses[-1] < losses[0]
