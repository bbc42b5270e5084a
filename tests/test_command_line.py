"""The command line: every option of every command refuses what it cannot mean, before any work, in one line."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress import PassManager
from fxcompress.__main__ import main, parser
from fxcompress.commands import COMMANDS, values
from fxcompress.commands import compress as compressing
from fxcompress.distributed import placed_on


def subparser(name: str) -> argparse.ArgumentParser:
    actions = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    found: argparse.ArgumentParser = actions.choices[name]
    return found


def taking_values() -> Iterator[tuple[str, argparse.Action]]:
    """Every option and positional of every command that takes a value."""
    for command in COMMANDS:
        for action in subparser(command.name)._actions:
            if action.nargs != 0 and not isinstance(action, (argparse._HelpAction, argparse.BooleanOptionalAction)):
                yield command.name, action


ACTIONS = [pytest.param(*found, id=f"{found[0]} {found[1].dest}") for found in taking_values()]


@pytest.mark.parametrize(("command", "action"), ACTIONS)
def test_every_value_has_a_type_that_can_refuse_it(command: str, action: argparse.Action) -> None:
    assert action.choices is not None or getattr(action.type, "__module__", None) == values.__name__, action


NO_TEXT = ["", "   ", "a\0b", "\ud800"]
NO_NUMBER = [*NO_TEXT, "nan", "inf", "-inf", "1e400", "x", "1,5", "0x", "9" * 5000 + "x"]
NO_COUNT = [*NO_NUMBER, "-1", "1.5", "9" * 50, "9" * 5000, "1e3"]


REFUSED: dict[Any, list[str]] = {values.text: NO_TEXT, values.number: NO_NUMBER, values.seconds: [*NO_NUMBER, "0", "-1"]}


@pytest.mark.parametrize(("command", "action"), ACTIONS)
def test_every_option_refuses_what_it_cannot_mean(
    command: str, action: argparse.Action, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = REFUSED.get(action.type, NO_COUNT)
    made, flag = subparser(command), max(action.option_strings, key=len, default="")
    for value in hostile:
        given = [f"{flag}={value}"] if flag else [value]
        if isinstance(action.nargs, int):
            given = [flag, *[value] * action.nargs]
        with pytest.raises(SystemExit) as ended:
            made.parse_args([*_others(made, action), *given])
        said = capsys.readouterr().err
        assert ended.value.code == 2, (value, said)
        assert (flag or str(action.metavar or action.dest)) in said.splitlines()[-1] or value in ("-inf", "-1"), said


def _others(made: argparse.ArgumentParser, action: argparse.Action) -> list[str]:
    """What else the command insists on."""
    needed = [other for other in made._actions if other.required and other.dest != action.dest]
    options = [[max(other.option_strings, key=len), "x"] for other in needed if other.option_strings]
    return [word for given in options for word in given] + ["x" for other in needed if not other.option_strings]


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        (values.text, " a b ", " a b "),
        (values.positive, "1", 1),
        (values.whole(0, 3), "3", 3),
        (values.seed, "4294967295", 2**32 - 1),
        (values.number, "-0.5", -0.5),
        (values.seconds, "1e-3", 0.001),
        (values.device, "cpu", torch.device("cpu")),
    ],
)
def test_what_can_be_meant_is_taken(kind: Any, given: str, expected: Any) -> None:
    assert kind(given) == expected


@pytest.mark.parametrize(
    ("count", "given", "message"),
    [
        (0, "cuda", "torch sees no NVIDIA GPU"),
        (2, "cuda:2", "cuda:0 to cuda:1"),
        (2, "cuda:-1", "no device to train on"),
        (2, "meta", "no device to train on"),
        (2, "tpu", "no device to train on"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    count: int, given: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        values.device(given)
    if count:
        assert values.device("cuda:1") == torch.device("cuda", 1)
        assert values.device("cuda") == torch.device("cuda")


# places


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.manual_seed(0)
    dense = PassManager([]).run(nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).eval(), torch.randn(2, 1, 4, 4))
    monkeypatch.chdir(tmp_path)
    fxcompress.save(dense, "dense")
    Path("c.yaml").write_text("compression: {type: MagnitudePruner}")
    Path("file").write_text("")
    Path("folder.html").mkdir()
    Path("folder.json").mkdir()
    Path("failure").mkdir()
    Path("failure/plan.yaml").write_text("[fold-batchnorm]")
    fxcompress.save(dense, "failure/model")
    Path("failure/inputs.json").write_text("{")
    shutil.copytree("failure", "cut")
    Path("cut/inputs.json").unlink()
    Path("cut/plan.yaml").write_text("")
    Path("deep.json").write_text("[" * 100_000)
    Path("stageless.yaml").write_text("compression: {pipeline: {}}")
    return tmp_path


DATA = "{type: random, samples: 4, shape: [1, 4, 4], classes: 4}"
COMPRESS = ["compress", "c.yaml", "--model", "dense", "--shape", "1", "1", "4", "4"]
SENSITIVITY = ["sensitivity", "--model", "dense", "--data", DATA, "--type", "unstructured", "--steps", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*COMPRESS, "-o", "file"], "--output 'file' is a file; name a folder"),
        ([*COMPRESS, "-o", "no/where"], "there is no folder"),
        ([*COMPRESS, "-o", "folder.html"], "is not a saved model"),
        ([*COMPRESS, "-o", "file/below"], "there is no folder"),
        ([*COMPRESS, "-o", "out", "--keep", "file"], "--keep 'file' is a file"),
        ([*COMPRESS, "-o", "out", "--keep", "file/below"], "there is no folder"),
        ([*COMPRESS, "-o", "out", "--keep", "out"], "is inside --output"),
        ([*COMPRESS, "-o", "out", "--keep", "out/../out/kept"], "is inside --output"),
        ([*COMPRESS, "-o", "out", "--report", "page.txt"], "does not end in .html or .htm"),
        ([*COMPRESS, "-o", "out", "--report", "folder.html"], "is a folder; name a file"),
        ([*COMPRESS, "-o", "out", "--report", "no/page.html"], "there is no folder"),
        ([*COMPRESS, "-o", "out", "--report", "page.html", "--sensitivity", "folder.json"], "cannot be read"),
        ([*COMPRESS, "-o", "out", "--report", "page.html", "--sensitivity", "file"], "is not an analysis"),
        ([*COMPRESS, "-o", "out", "--weights", "folder.html"], "there is no weights file"),
        ([*COMPRESS, "-o", "out", "--weights", "file"], "cannot be read"),
        ([*COMPRESS, "-o", "out", "--data", "folder.html"], "there is no data set"),
        ([*COMPRESS, "-o", "out", "--data", "{type: random, samples: .nan}"], "samples"),
        ([*COMPRESS, "-o", "out", "--data", "{type: random, samples: 1099511627775}"], "--data"),
        ([*COMPRESS, "-o", "out", "--validation", "{type: random, batch_size: 0}"], "--validation.batch_size"),
        ([*COMPRESS, "-o", "out", "--data", "{type: [random}"], "neither a name nor a mapping"),
        ([*COMPRESS[:4], "-o", "out", "--shape", "1099511627776", "1099511627776"], "does not fit into memory"),
        (["compress", "folder.html", "--model", "dense", "-o", "out"], "cannot be read"),
        (["compress", "c.yaml", "--model", "x" * 5000, "-o", "out"], "there is no model"),
        (["compress", "c.yaml", "--model", "{type: " + "x" * 5000 + "}", "-o", "out"], "there is no model"),
        (["compress", "c.yaml", "--model", "file", "-o", "out"], "there is no model"),
        (["plan", "c.yaml", "--model", "dense", "--import", "."], "--import"),
        (["inspect", "file"], "there is no saved model"),
        (["inspect", "dense", "--report", "folder.html"], "is a folder"),
        (["export", "dense", "-o", "a.pt"], "--output 'a.pt' does not end in .onnx"),
        (["export", "dense", "-o", "a.onnx", "--format", "torch"], "does not end in .pt2"),
        (["export", "dense", "-o", "a.onnx", "--format", "tensorrt"], "does not end in .engine"),
        (["export", "dense", "-o", "no/a.onnx"], "there is no folder"),
        (["export", "folder.html", "-o", "a.onnx"], "there is no saved model"),
        ([*SENSITIVITY, "-o", "a.txt"], "does not end in .json"),
        ([*SENSITIVITY, "-o", "folder.json"], "is a folder"),
        ([*SENSITIVITY, "--cache", "folder.json"], "is a folder"),
        ([*SENSITIVITY, "--cache", "file/below"], "there is no folder"),
        ([*SENSITIVITY, "--type", "structurd"], "pruning_type"),
        ([*SENSITIVITY, "--metric", "acuracy"], "Did you mean 'accuracy'"),
        ([*SENSITIVITY, "--range", "0.9", "0.1"], "0 < low <= high < 1"),
        ([*SENSITIVITY, "--range", "0", "0.5"], "0 < low <= high < 1"),
        ([*SENSITIVITY, "--data", "{type: digits, train: 3}"], "--data.train"),
        (["bench", "--plans", "folder.json"], "cannot be read"),
        (["replay", "failure"], "are damaged"),
        (["replay", "failure", "--json", "--changes"], "choose one of them"),
        (["replay", "file"], "is not a reproducer"),
        (["replay", "cut"], "it holds no step"),
        ([*SENSITIVITY, "--cache", "deep.json"], "is not a cache of a sensitivity analysis"),
        (["plan", "file"], "file is empty; it is a mapping, as in 'compression: {type: PTQQuantizer}'"),
        (["plan", "stageless.yaml"], "line 1: compression.pipeline: is {}; it is a list of stages"),
        (["plan", "nowhere.yaml"], "'nowhere.yaml' cannot be read: No such file or directory.\n"),
    ],
)
def test_a_place_or_name_that_cannot_be_is_refused_before_any_work(
    arguments: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PassManager, "_step", lambda *_: pytest.fail("work has begun"))
    before = sorted(place.rglob("*"))
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "Traceback" not in err
    assert message in err
    assert sorted(path for path in place.rglob("*") if "__pycache__" not in path.parts) == before


@pytest.mark.parametrize(
    "arguments",
    [
        [*COMPRESS, "-o", "out"],
        [*COMPRESS, "-o", "dense", "--report", "page.html"],
        ["export", "dense", "-o", "a.onnx"],
        [*SENSITIVITY, "-o", "a.json"],
        [*SENSITIVITY, "--cache", "not/yet/there.json"],
    ],
)
def test_a_folder_one_may_not_write_to_is_said_before_any_work(
    arguments: list[str], place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert main(arguments) == 2
    assert f"you may not write to {str(place)!r}" in capsys.readouterr().err


def test_a_target_that_cannot_be_had_leaves_the_report_of_what_was_measured(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SENSITIVITY, "-o", "a.json", "--target", "2"]) == 2
    assert "2 is asked of the pruned one" in capsys.readouterr().err
    assert set(json.loads(Path("a.json").read_text())["curves"]) == {"1"}


def test_running_out_of_memory_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(compressing, "example", full)
    assert main([*COMPRESS, "-o", "out"]) == 2
    assert capsys.readouterr().err.startswith("error: out of memory: CUDA out of memory")


# a device


def test_only_what_trains_or_calibrates_runs_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[str, str]] = []
    step = [""]

    def before(self: Any, run: Any, number: int, *rest: Any) -> None:
        step[0] = self.plan.steps[number - 1].name
        original(self, run, number, *rest)

    original = PassManager._step
    monkeypatch.setattr(PassManager, "_step", before)
    monkeypatch.setattr(nn.Module, "to", lambda module, device: moved.append((step[0], str(device))))
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    data = [(torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 3]))]
    plan = ["mask-weights", {"train": {"epochs": 1}}, "bake-masks", *fxcompress.PTQQuantizer(num_calibration_batches=1).plan]
    PassManager(plan, device="cuda:1", progress=False).run(model.eval(), data=data)
    assert [name for name, device in moved if device == "cuda:1"] == ["train", "calibrate"]
    assert [[device for name, device in moved if name == of][-1] for of in ("train", "calibrate")] == ["cpu", "cpu"]


def test_a_model_comes_back_from_the_device_even_where_a_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    monkeypatch.setattr(nn.Module, "to", lambda module, device: moved.append(str(device)))
    with pytest.raises(ValueError, match="failed"), placed_on(nn.Linear(2, 2), torch.device("cuda", 1)):
        raise ValueError("failed")
    assert moved == ["cuda:1", "cpu"]


def test_the_device_of_the_command_is_that_of_the_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    run = fxcompress.CompressionPipeline.run

    def watched(self: Any, *given: Any, **options: Any) -> Any:
        seen.append(options["device"])
        return run(self, *given, **options)

    monkeypatch.setattr(fxcompress.CompressionPipeline, "run", watched)
    assert main([*COMPRESS, "-o", "out", "--device", "cpu"]) == 0
    assert seen == [torch.device("cpu")]
