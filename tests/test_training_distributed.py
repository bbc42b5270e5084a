"""Several processes: the same call, the same losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "tests" / "programs" / "two_processes.py"


def result(folder: Path, processes: int) -> dict[str, Any]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launch, str(PROGRAM), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((folder / f"result-{processes}.json").read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    return result(folder, 1), result(folder, 2)


@pytest.mark.parametrize("data", ["loader", "list"])
def test_two_processes_and_one_have_the_same_losses_and_weights(results: Any, data: str) -> None:
    one, two = results
    assert two[data]["loss"] == pytest.approx(one[data]["loss"], rel=1e-5)
    assert two[data]["gradient/loss"] == pytest.approx(one[data]["gradient/loss"], rel=1e-4)
    assert one[data]["loss"][-1] < one[data]["loss"][0]
    for a, b in zip(one[f"{data} weights"], two[f"{data} weights"], strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def test_an_evaluation_that_differs_between_processes_is_rank_zeros(results: Any) -> None:
    assert results[1]["loader"]["mine"] == [0.0, 0.0, 0.0]


def test_merged_calibrators_have_seen_what_one_process_sees(results: Any) -> None:
    one, two = results
    assert two["ranges"] == one["ranges"]


def test_a_sweep_is_spread_over_the_processes_and_comes_back_in_order(results: Any) -> None:
    one, two = results
    assert one["spread"] == two["spread"] == [0, 1, 4, 9, 16]
    assert (one["ranks"], two["ranks"]) == ([0], [0, 1])


def test_a_model_quantized_by_two_processes_is_the_one_that_one_process_quantizes(results: Any) -> None:
    one, two = results
    step = max(map(abs, one["quantized"])) / 100  # the float models differ by rounding
    assert two["quantized"] == pytest.approx(one["quantized"], abs=step)


def test_processes_end_alike_and_a_run_that_was_stopped_goes_on_exactly(results: Any) -> None:
    for result in results:
        assert (result["buffers alike"], result["resumed alike"], result["stopped"]) == (True, True, True)
