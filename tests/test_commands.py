"""The fxcompress command: what it does, what it prints, how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fxcompress
from fxcompress.__main__ import main, parser
from fxcompress.schema import schema

ROOT = Path(__file__).parent.parent

CONFIG = """
compression:
  pipeline:
  - {type: MagnitudePruner, sparsity: 0.5, finetune_epochs: 1}
  - {type: PTQQuantizer, exclude_layers: ['4'], num_calibration_batches: 2}
model: {type: commands-test}
data: {type: random, samples: 16, shape: [1, 8, 8], classes: 4, batch_size: 8}
validation: {type: random, samples: 16, shape: [1, 8, 8], classes: 4, batch_size: 8, seed: 1}
"""

MODULE = """
import torch
from torch import nn
from fxcompress.models import MODELS

if "commands-test" not in MODELS:
    @MODELS.register("commands-test")
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)
        ).eval()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "models_of_mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


MINE = ["--import", "models_of_mine"]
TOO_MANY = [
    "--data",
    "{type: random, samples: 8, shape: [1, 8, 8], classes: 99}",
    "--metric",
    "cross_entropy_loss",
    "--steps",
    "1",
]


def run(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert main([*arguments]) == status
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return out if status == 0 else err


def test_a_model_is_compressed_inspected_and_exported(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compressed = json.loads(run(capsys, "compress", "config.yaml", *MINE, "-o", "small", "--json"))
    assert [row["step"] for row in compressed["ledger"]["rows"]][:3] == ["trace", "mask-weights", "train"]
    assert len(compressed["metrics"]["accuracy"]) == 2
    assert json.loads((place / "small" / "ledger.json").read_text()) == compressed["ledger"]
    model = fxcompress.load(place / "small")
    image = torch.randn(2, 1, 8, 8)
    assert model(image).shape == (2, 4)
    inspected = json.loads(run(capsys, "inspect", "small", "--json"))
    assert (inspected["stage"], inspected["bytes"]) == ("lowered", compressed["bytes"])
    assert 0 < inspected["int8_macs"] < 1
    assert "mask-weights" in run(capsys, "inspect", "small")
    pytest.importorskip("onnxscript")
    run(capsys, "export", "small", "-o", "small.onnx")
    assert (place / "small.onnx").stat().st_size > 1000
    run(capsys, "export", "small", "--format", "torch", "-o", "small.pt2")
    program = torch.export.load(place / "small.pt2").module()
    with torch.no_grad():
        assert program(torch.randn(8, 1, 8, 8)).shape == (8, 4)
    refused = run(capsys, "export", "small", "--format", "tensorrt", "-o", "small.engine", status=2)
    assert "quantized for 'fbgemm'" in refused
    assert not list(place.glob("*small.engine*"))


def test_what_an_engine_is_built_from_is_exported_anywhere_and_the_engine_where_it_can_be(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    from fxcompress.backends import tensorrt

    wide = MODULE.replace("commands-test", "wide").replace("2d(1, 8,", "2d(1, 32,").replace("d(8)", "d(32)")
    (place / "wide_models.py").write_text(wide.replace("512", "2048"))
    config = CONFIG.replace("commands-test", "wide").replace("type: PTQQuantizer", "type: PTQQuantizer, backend: tensorrt")
    (place / "trt.yaml").write_text(config)
    run(capsys, "compress", "trt.yaml", "--import", "wide_models", "-o", "small")
    run(capsys, "export", "small", "-o", "small.onnx")
    kinds = {node.op_type for node in onnx.load(place / "small.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    missing = tensorrt.BACKEND.unavailable()
    if missing is None:
        run(capsys, "export", "small", "--format", "tensorrt", "-o", "small.engine")
        assert (place / "small.engine").stat().st_size > 1000
        return
    refused = run(capsys, "export", "small", "--format", "tensorrt", "-o", "small.engine", status=2)
    assert missing in refused and "Its ONNX can be exported anywhere" in refused
    assert not list(place.glob("*small.engine*"))


def test_a_run_is_resumed_from_what_it_kept(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "compress", "config.yaml", *MINE, "-o", "a", "--keep", "kept")
    assert "holds a run" in run(capsys, "compress", "config.yaml", *MINE, "-o", "b", "--keep", "kept", status=2)
    run(capsys, "compress", "config.yaml", *MINE, "-o", "b", "--keep", "kept", "--resume")
    image = torch.randn(2, 1, 8, 8)
    assert torch.equal(fxcompress.load(place / "a")(image), fxcompress.load(place / "b")(image))


def test_a_plan_is_printed_and_explained_layer_by_layer(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = json.loads(run(capsys, "plan", "config.yaml", *MINE, "--json"))
    assert [stage["component"] for stage in printed["stages"]] == ["MagnitudePruner", "PTQQuantizer"]
    assert fxcompress.Plan.parse(printed["plan"])
    layers = {
        row["layer"]: row for row in json.loads(run(capsys, "plan", "config.yaml", *MINE, "--explain", "--json"))["layers"]
    }
    assert set(layers) == {"0", "1", "4"}
    assert (layers["0"]["runs_in"], layers["1"]["runs_in"], layers["4"]["runs_in"]) == ("int8", "folded", "float")
    assert "excluded by name" in layers["4"]["left_alone"]
    total = 72 + 2048
    zeros = sum(float(layers[name]["zeros"].rstrip("%")) / 100 * size for name, size in (("0", 72), ("4", 2048)))
    assert zeros == pytest.approx(total / 2, rel=0.01)
    assert "left alone" in run(capsys, "plan", "config.yaml", *MINE, "--explain")
    (place / "qat.yaml").write_text("compression: {type: QATQuantizer, exclude_layers: ['4']}")
    explain = ["plan", "qat.yaml", *MINE, "--model", "commands-test", "--shape", "2", "1", "8", "8", "--explain", "--json"]
    trained = {row["layer"]: row["runs_in"] for row in json.loads(run(capsys, *explain))["layers"]}
    assert (trained["0"], trained["4"]) == ("int8", "float")


def test_sensitivity_is_measured_and_reported(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = "{type: random, samples: 16, shape: [1, 8, 8], classes: 4}"
    common = ["sensitivity", *MINE, "--model", "commands-test", "--data", data, "--type", "unstructured", "--steps", "2"]
    found = json.loads(run(capsys, *common, "--json", "-o", "report.md", "--target", "0.0"))
    assert set(found["curves"]) == {"0", "4"}
    assert set(found["curves"]["0"]) == {"0.1", "0.9"}
    assert 0 <= found["baseline"] <= 1
    assert set(found["recommended"]) == {"0", "4"}
    assert (place / "report.md").stat().st_size > 50
    assert "recommended" in run(capsys, *common)
    assert "Did you mean 'accuracy'" in run(capsys, *common, "--metric", "acuracy", status=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "nowhere.yaml"], "cannot be read"),
        (["plan", "config.yaml", "--model", "comands-tset"], "there is no model"),
        (["plan", "config.yaml", "--import", "no_such_module"], "no_such_module"),
        (["compress", "config.yaml", *MINE, "-o", "no/where/at/all"], "no folder"),
        (["compress", "config.yaml", *MINE, "-o", "out", "--data", "{type: rndom}"], "Did you mean 'random'"),
        (["compress", "config.yaml", *MINE, "-o", "out", "--data", "{type: random, shape: [1, 4, 4], classes: 4}"], ""),
        (["compress", "config.yaml", *MINE, "-o", "out", "--weights", "none.pth", "--model", "commands-test"], "none.pth"),
        (["compress", "config.yaml", *MINE, "-o", "."], "is not a saved model"),
        (["compress", "config.yaml", *MINE, "-o", "out", "--resume"], "--keep"),
        (["compress", "config.yaml", *MINE, "-o", "out", "--weights", "mine.pth"], "give --model"),
        (["compress", "qat.yaml", *MINE, "-o", "out", "--model", "commands-test"], "'train' needs data: give --data"),
        (["plan", "config.yaml", "--import", "raises"], "ValueError: not today"),
        (["plan", "config.yaml", "--import", "misspelt"], "SyntaxError"),
        (
            ["compress", "config.yaml", *MINE, "-o", "out", "--validation", "{type: random, shape: [2, 8, 8]}"],
            "batch 0 does not fit",
        ),
        (
            ["compress", "config.yaml", *MINE, "-o", "out", "--validation", "{type: random, shape: [1, 4, 4]}"],
            "batch 0 does not fit",
        ),
        (
            ["sensitivity", *MINE, "--model", "commands-test", *TOO_MANY],
            "batch 0 does not fit the model, the loss or the metric",
        ),
        (["inspect", "."], "no saved model"),
        (["export", "nowhere", "-o", "x.onnx"], "no saved model"),
        (["replay", "nowhere"], "not a reproducer"),
    ],
)
def test_what_the_user_can_mend_ends_with_status_2_and_no_output(
    arguments: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "qat.yaml").write_text("compression: {type: QATQuantizer, epochs: 1}")
    (place / "raises.py").write_text("raise ValueError('not today')")
    (place / "misspelt.py").write_text("def f(:")
    text = run(capsys, *arguments, status=2)
    assert text.startswith("error: ")
    assert message in text
    assert not (place / "out").exists()


def test_a_result_that_is_refused_ends_with_status_1(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config: dict[str, Any] = yaml.safe_load(CONFIG)
    config["compression"]["pipeline"].append({"require": {"int8_macs": 1.0}})
    (place / "strict.yaml").write_text(yaml.safe_dump(config))
    assert "required" in run(capsys, "compress", "strict.yaml", *MINE, "-o", "out", status=1)
    assert not (place / "out").exists()


def test_the_library_lists_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert "calibrate" in json.loads(run(capsys, "passes", "--json"))
    assert "fold-batchnorm" in run(capsys, "passes")


def test_every_command_shows_an_example_that_parses(capsys: pytest.CaptureFixture[str]) -> None:
    import shlex

    actions = next(action for action in parser()._actions if action.choices)
    for name, command in dict(actions.choices).items():  # type: ignore[arg-type]
        example = str(command.epilog).splitlines()[1].split(">")[0]
        words = shlex.split(example)
        assert words[:2] == ["fxcompress", name]
        command.parse_args(words[2:])


def test_the_command_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"fxcompress {fxcompress.__version__}\n")


@pytest.mark.parametrize("shape", [["2", "1", "-8", "8"], ["0"], ["x"]])
def test_a_shape_that_is_none_is_refused(shape: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compress", "config.yaml", *MINE, "-o", "out", "--shape", *shape])
    assert ended.value.code == 2
    assert "--shape" in capsys.readouterr().err


def test_a_shape_the_model_refuses_is_said_by_export(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "compress", "config.yaml", *MINE, "-o", "small")
    for form, target in (("onnx", "a.onnx"), ("torch", "a.pt2")):
        text = run(capsys, "export", "small", "--format", form, "-o", target, "--shape", "1", "2", "8", "8", status=2)
        assert text.startswith("error: the example inputs [(1, 2, 8, 8)] do not run through the model")
        assert not (place / target).exists()


def test_a_disk_that_refuses_is_one_line_and_status_2(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "small")

    monkeypatch.setattr("fxcompress.artifact.save", full)
    text = run(capsys, "compress", "config.yaml", *MINE, "-o", "small", status=2)
    assert text == "error: 'small': No space left on device.\n"


def test_a_saved_int8_model_is_listed_by_kinds_of_operators(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "compress", "config.yaml", *MINE, "-o", "small")
    kinds = {row["kind"] for row in json.loads(run(capsys, "inspect", "small", "--json"))["graph"]}
    assert "conv2d" in kinds and "island" not in kinds


def test_the_module_is_the_command() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "fxcompress", "plan", "nowhere.yaml"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: ")


# the schema


def test_the_committed_schema_is_that_of_the_types() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "fxcompress", "schema"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    committed = (ROOT / "compression.schema.json").read_text(encoding="utf-8")
    assert committed == run.stdout, "python -m fxcompress schema > compression.schema.json"


def test_the_schema_takes_the_examples_and_refuses_what_the_builder_refuses() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    made = schema()
    jsonschema.Draft202012Validator.check_schema(made)
    check = jsonschema.Draft202012Validator(made)
    for name in ("ptq", "qat", "structured", "distillation", "pipeline"):
        assert check.is_valid(yaml.safe_load((ROOT / "tests" / "configs" / f"{name}.yaml").read_text(encoding="utf-8")))
    assert check.is_valid(yaml.safe_load(CONFIG))
    wrong: list[dict[str, Any]] = [
        {"compression": {"type": "PTQQuantiser"}},
        {"compression": {"type": "PTQQuantizer", "dtyp": "int8"}},
        {"compression": {"type": "PTQQuantizer", "per_channel": "yes"}},
        {"compression": {"pipeline": []}},
        {"model": "resnet18"},
    ]
    for bad in wrong:
        assert not check.is_valid(bad)
