"""The benchmarks' command: its table, the shape of its rows and its file, and what happens when something goes wrong."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

from benchmarks import __main__ as command
from benchmarks import machine, run, suite
from benchmarks.figure import COLUMNS, Figure, shown
from benchmarks.peer_process import PeerError, Peers
from benchmarks.record import record
from benchmarks.turns import in_turns

EVERY = {benchmark.name: benchmark for benchmark in suite.BENCHMARKS}


@pytest.mark.parametrize("name", EVERY)
def test_every_benchmark_of_the_table_exists(name: str) -> None:
    assert callable(EVERY[name].function())


def test_every_program_is_in_the_table_or_serves_one() -> None:
    served = {
        "__main__",
        "figure",
        "machine",
        "memory",
        "peer_process",
        "peers",
        "record",
        "run",
        "subjects",
        "suite",
        "turns",
    }
    programs = {path.stem for path in Path(suite.__file__).parent.glob("*.py")} - served
    assert programs == {benchmark.where.partition(":")[0] for benchmark in suite.BENCHMARKS}


@pytest.mark.parametrize(
    ("value", "bounds", "asked", "met"),
    [
        (3.1, {"at_least": 3.06}, "≥ 3.06", True),
        (3.05, {"at_least": 3.06}, "≥ 3.06", False),
        (0, {"at_most": 0}, "≤ 0", True),
        (1.0, {"at_least": 1.0, "at_most": 1.0}, "≥ 1, ≤ 1", True),
        (1.1, {"at_least": 1.0, "at_most": 1.0}, "≥ 1, ≤ 1", False),
        (5.0, {}, "", None),
        (None, {"at_least": 1.0}, "≥ 1", None),
        (float("nan"), {"at_most": 1.0}, "≤ 1", False),
        (float("inf"), {"at_least": 20.0}, "≥ 20", True),
    ],
)
def test_a_figure_is_met_when_its_bounds_hold(
    value: float | None, bounds: dict[str, float], asked: str, met: bool | None
) -> None:
    row = Figure("what", value, "x", **bounds).row()  # type: ignore[arg-type]
    assert (row["asked"], row["met"]) == (asked, met)
    assert tuple(row) == COLUMNS
    json.dumps(row, allow_nan=False)
    assert "what" in shown([row])


def test_candidates_take_turns_and_ratios_are_medians_over_rounds() -> None:
    order: list[str] = []
    seconds = {"slow": iter([9.0, 4.0, 8.0, 2.0]), "fast": iter([9.0, 2.0, 2.0, 2.0])}

    def candidate(name: str) -> float:
        order.append(name)
        return next(seconds[name])

    turns = in_turns({name: lambda name=name: candidate(name) for name in seconds}, rounds=3)  # type: ignore[misc]
    assert order == ["slow", "fast"] * 4
    assert turns.median("slow") == 4.0
    assert turns.ratio("slow", "fast") == 2.0


def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    def good(given: run.Run) -> Iterator[Figure]:
        given.table("details", [{"what": "a", "ms": 1.5}, {"what": "b", "note": "none"}])
        yield Figure("held", 2.0, "x", at_least=given.pick(1.0, 0.5))
        yield Figure("missed", 2.0, "x", at_most=1.0)

    def bad(given: run.Run) -> Iterator[Figure]:
        yield Figure("before", 1.0)
        raise ValueError("it broke")

    functions = {"good": good, "bad": bad}
    made = tuple(suite.Benchmark(name, name, "a test", "", 0) for name in functions)
    monkeypatch.setattr(suite.Benchmark, "function", lambda self: functions[self.name])
    monkeypatch.setattr(command, "BENCHMARKS", made)


def test_the_file_says_what_was_measured_and_on_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes(monkeypatch)
    assert command.main(["good", "--quick", "--json", str(tmp_path / "figures.json")]) == 0
    report = json.loads((tmp_path / "figures.json").read_text())
    assert set(report) == {"command", "commit", "started", "finished", "quick", "load", "machine", "benchmarks"}
    assert report["command"] == "python -m benchmarks good --quick --json figures.json"
    assert {"CPU", "AVX2", "AVX512", "VNNI", "AMX", "cores", "memory GB", "threads", "Python", "versions", "peers"} <= set(
        report["machine"]
    )
    assert "torch" in report["machine"]["versions"]
    assert len(report["load"]["start"]) == len(report["load"]["end"]) == 3
    (result,) = report["benchmarks"]
    assert [(row["figure"], row["asked"], row["met"]) for row in result["figures"]] == [
        ("held", "≥ 0.5", True),
        ("missed", "≤ 1", False),
    ]
    assert result["tables"][0]["rows"][0] == {"what": "a", "ms": 1.5}
    assert "NO" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [tmp_path / "figures.json"]
    (tmp_path / "README.md").write_text("how\n\n## The last figures\n\nold\n")
    record([tmp_path / "figures.json"], tmp_path / "README.md")
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert lines[:3] == ["how", "", "## The last figures"]
    assert "| missed | 2 | x | ≤ 1 | NO |  |" in lines
    assert "old" not in lines


def test_a_benchmark_that_fails_keeps_its_figures_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes(monkeypatch)
    assert command.main(["bad", "--json", str(tmp_path / "figures.json")]) == 1
    (result,) = json.loads((tmp_path / "figures.json").read_text())["benchmarks"]
    assert result["error"] == "ValueError: it broke"
    assert [row["figure"] for row in result["figures"]] == ["before"]
    assert "FAILED ValueError: it broke" in capsys.readouterr().out


def test_a_failing_model_is_a_row_of_a_sweep() -> None:
    def examine(name: str) -> dict[str, object]:
        if name == "b":
            raise RuntimeError("no")
        return {"model": name, "failed": ""}

    rows = run.Run().sweep(examine, ["a", "b", "c"])
    assert [(row["model"], row["failed"]) for row in rows] == [("a", ""), ("b", "RuntimeError: no"), ("c", "")]
    assert len(run.Run(sample=2, seed=1).sweep(examine, ["a", "b", "c"])) == 2


def test_what_the_caller_can_mend_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["qta"]) == 2
    assert "there is no benchmark 'qta'. Did you mean 'qat'?" in capsys.readouterr().err
    assert command.main(["qat", "--peers", "/no/such/python"]) == 2
    assert "there is no such file" in capsys.readouterr().err


def test_the_list_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in EVERY)


def test_peers_answer_in_a_process_of_their_own() -> None:
    with Peers(Path(os.path.relpath(sys.executable))) as peers:
        assert peers.ask("versions")["versions"]["torch"] == machine.describe(1)["versions"]["torch"]
        with pytest.raises(PeerError, match="unheard of"):
            peers.ask("build", "unheard of")
    with Peers(None) as nobody, pytest.raises(PeerError, match="--peers PYTHON"):
        nobody.ask("versions")
