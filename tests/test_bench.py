"""The command line: rows, JSON, exit status, and no traceback for what the caller can mend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fxcompress.__main__ import main
from fxcompress.bench import interleaved

pytest.importorskip("torchvision")
FAST = ["--shape", "64", "64", "--runs", "2", "--no-progress"]


def test_json_has_a_row_per_model_and_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("- fold-batchnorm\n")
    plans = ["fp32", "int8", str(tmp_path / "mine.yaml")]
    threads = torch.get_num_threads()
    assert main(["bench", "--models", "resnet18", "--plans", *plans, "--json", *FAST]) == 0
    torch.set_num_threads(threads)
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["model"], row["plan"]) for row in rows] == [("resnet18", plan) for plan in plans]
    fp32, int8, folded = rows
    assert fp32["SNR dB"] is None and int8["SNR dB"] > 15 and folded["SNR dB"] > 80
    assert int8["MB"] / fp32["MB"] <= 0.26
    assert (fp32["int8 MACs"], int8["int8 MACs"]) == (0.0, 1.0)
    assert fp32["MMACs"] == int8["MMACs"] > 100
    assert all(row["median ms"] <= row["p90 ms"] for row in rows)


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert main(["bench", "--models", "mobilenet_v3_small", "--plans", "fused", *FAST]) == 0
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "speed-up" in out and "mobilenet_v3_small" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--models", "resnet19"], "Did you mean"),
        (["bench", "--plans", "int9"], "no preset 'int9'"),
        (["bench", "--plans", "missing.yaml"], "cannot be read"),
        (["bench", "--plans", "BAD.yaml"], "no pass 'fold'"),
        (["bench", "--models", "vit_b_16", "--shape", "50", "50", "--runs", "1"], "Wrong image height"),
        (["replay", "nowhere"], "not a reproducer"),
    ],
)
def test_mistakes_are_one_line_and_status_two(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "BAD.yaml").write_text("- fold\n")
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and "Traceback" not in err


@pytest.mark.parametrize("arguments", [["bench", "--batch", "0"], ["bench", "--nonsense"], ["fly"], []])
def test_bad_flags_exit_with_two(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_passes_lists_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes"]) == 0
    assert "fold-batchnorm" in capsys.readouterr().out


def test_candidates_take_turns() -> None:
    order: list[str] = []
    found = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, runs=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert found["a"].runs == 3 and found["a"].min <= found["a"].median <= found["a"].p90
