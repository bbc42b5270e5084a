"""Saved models: islands, sharing, tampering, truncation, and nothing executed."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fxcompress import PassManager, load, save, trace
from fxcompress.errors import ArtifactError, FxCompressError
from tests.test_trace import AroundDataDependent, DataDependent, Outputs, Shared

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
INT8: list[Any] = ["fold-batchnorm", "fuse-activations", "insert-observers", "calibrate", "fold-quantization", "lower"]


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(PassManager(INT8).run(small(), data=[X]), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("plan", [[], INT8], ids=["float", "int8"])
@pytest.mark.parametrize(("model", "name"), [(AroundDataDependent(), "inner"), (DataDependent(), "")])
def test_islands_are_saved_without_code_and_given_back_at_load(
    model: nn.Module, name: str, plan: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    result = PassManager(plan).run(model.eval(), X, [X])
    save(result, tmp_path / "model")
    fresh = DataDependent().eval()
    loaded = load(tmp_path / "model", modules={name: fresh})
    assert torch.equal(loaded(X), result(X))
    with pytest.raises(ArtifactError, match=f"supply modules=.*{name!r}.*DataDependent"):
        load(tmp_path / "model")
    with pytest.raises(ArtifactError, match="has no part"):
        load(tmp_path / "model", modules={name: nn.Linear(1, 1)})


def test_shared_tensors_stay_shared_and_structures_stay(tmp_path: Path) -> None:
    traced = trace(Shared().eval(), X)
    save(traced, tmp_path / "shared")
    loaded: Any = load(tmp_path / "shared")
    assert loaded.head.weight is loaded.tied.weight
    assert torch.equal(loaded(X), traced(X))
    save(trace(Outputs(), X), tmp_path / "outputs")
    again = load(tmp_path / "outputs")(X)
    assert again["point"].y.equal(X + 1)
    assert list(again["ordered"]) == ["a", "b"]


def test_saving_over_a_model_replaces_it_whole_and_over_anything_else_is_refused(saved: Path, tmp_path: Path) -> None:
    save(trace(small(), X), saved)
    assert load(saved).meta["stage"] == "float"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(ArtifactError, match="is not a saved model"):
        save(trace(small(), X), tmp_path / "notes")
    assert sorted(os.listdir(tmp_path)) == ["model", "notes"]
    with pytest.raises(ArtifactError, match="trace\\(\\) it first"):
        save(small(), tmp_path / "eager")


def test_history_tells_the_plan_and_the_ledger(saved: Path) -> None:
    history = load(saved).meta["history"]
    assert history[0]["plan"].startswith("- fold-batchnorm")
    assert history[0]["ledger"]["rows"][-1]["step"] == "lower"


@pytest.mark.parametrize("file", ["graph.json", "tensors.safetensors", "history.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "noise"])
def test_damaged_files_are_one_clear_error(saved: Path, file: str, damage: str) -> None:
    content = (saved / file).read_bytes()
    if damage == "missing":
        (saved / file).unlink()
    else:
        (saved / file).write_bytes({"empty": b"", "half": content[: len(content) // 2], "noise": b"\xff\x00" * 64}[damage])
    with pytest.raises(ArtifactError, match=r"damaged|missing"):
        load(saved)


def edit(saved: Path, change: Any) -> None:
    document = json.loads((saved / "graph.json").read_text())
    change(document)
    (saved / "graph.json").write_text(json.dumps(document))


TAMPERED: list[Any] = [
    lambda d: d["module"]["nodes"][-2].update(op="call_function", target="os.system"),
    lambda d: d["module"]["nodes"][-2].update(op="call_function", target="builtins.eval"),
    lambda d: d["module"]["nodes"][-2].update(op="call_function", target="aten.from_file.default"),
    lambda d: d["module"]["nodes"][-2].update(op="call_method", target="__reduce__"),
    lambda d: d["module"]["nodes"][-2].update(op="call_module", target="nowhere"),
    lambda d: d["module"]["children"].update(extra={"class": "subprocess.Popen", "attributes": {}, "training": False}),
    lambda d: d["module"]["nodes"][1].update(args={"tuple": [{"node": "ghost"}]}),
    lambda d: d["module"]["nodes"].pop(),
    lambda d: d.update(format=99),
    lambda d: d.update(stage="molten"),
    lambda d: d["module"].update(quantization={"backend": "nowhere"}),
    lambda d: d["module"]["children"]["0"]["buffers"]["weight"].update(shape=[1]),
    lambda d: d["module"]["children"]["0"]["buffers"]["weight"].update(tensor="gone"),
]


@pytest.mark.parametrize("change", TAMPERED)
def test_a_tampered_description_is_refused_and_runs_nothing(saved: Path, change: Any) -> None:
    edit(saved, change)
    with pytest.raises(FxCompressError):
        load(saved)


def paths(data: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [here, *(path for key, value in items for path in paths(value, (*here, key)))]


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_change_of_the_description_loads_or_is_an_error_of_ours(saved: Path, data: Any) -> None:
    original = (saved / "graph.json").read_text()
    document = json.loads(original)
    path = data.draw(st.sampled_from(paths(document)[1:]))
    target = document
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = data.draw(st.none() | st.integers(-2, 2) | st.text(max_size=4) | st.just([]) | st.just({}))
    (saved / "graph.json").write_text(json.dumps(document))
    try:
        load(saved)
    except FxCompressError:
        pass
    finally:
        (saved / "graph.json").write_text(original)


def test_pickle_keeps_stage_and_history() -> None:
    result = PassManager(INT8).run(small(), data=[X])
    again = pickle.loads(pickle.dumps(result))
    assert again.meta["stage"] == "lowered"
    assert again.meta["history"] == result.meta["history"]
    assert torch.equal(again(X), result(X))


@pytest.mark.parametrize("training", [True, False])
def test_every_part_keeps_its_mode(tmp_path: Path, training: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    prepared = PassManager(["insert-fake-quant"], progress=False).run(model, torch.randn(2, 3, 8, 8)).train(training)
    prepared.get_submodule("1").eval()
    save(prepared, tmp_path / "model")
    again = load(tmp_path / "model")
    assert {n: p.training for n, p in again.named_modules()} == {n: p.training for n, p in prepared.named_modules()}
