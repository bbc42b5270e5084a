"""Saved models: islands, sharing, tampering, truncation, and nothing executed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from fxcompress import PassManager, load, save, trace
from fxcompress.errors import ArtifactError, ConfigError, FxCompressError
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


@pytest.mark.parametrize("file", ["graph.json", "tensors.safetensors", "history.json", "digests.json"])
def test_one_flipped_bit_is_an_error_and_never_another_model(saved: Path, file: str) -> None:
    content = (saved / file).read_bytes()
    for place in range(0, len(content), max(1, len(content) // 40)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        (saved / file).write_bytes(flipped)
        with pytest.raises(ArtifactError, match=r"damaged"):
            load(saved)


@pytest.mark.parametrize("path", [None, 3, [], b"model", "", "\0"])
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(ConfigError, match=r"load\(\)"):
        load(path)
    with pytest.raises(ConfigError, match=r"save\(\)"):
        save(trace(small(), X), path)


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file" / "model", tmp_path / "file" / "deep" / "model", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError, match=r"cannot be written: .* Choose another place"):
            save(trace(small(), X), place)
    assert os.listdir(tmp_path) == ["file"]


def test_foreign_files_and_empty_folders_are_no_saved_models(tmp_path: Path) -> None:
    torch.save(small().state_dict(), tmp_path / "weights.pt")
    save_file({"weight": X}, tmp_path / "weights.safetensors")
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07")
    (tmp_path / "folder").mkdir()
    for name in ("weights.pt", "weights.safetensors", "model.onnx"):
        with pytest.raises(ArtifactError, match=r"is a file; load\(\) reads"):
            load(tmp_path / name)
    with pytest.raises(ArtifactError, match=r"no saved model at .*: graph.json is missing"):
        load(tmp_path / "folder")


def test_a_folder_without_digests_says_what_to_do(saved: Path) -> None:
    (saved / "digests.json").unlink()
    with pytest.raises(ArtifactError, match=r"digests.json is missing. Copy the whole folder; .* save it"):
        load(saved)


def test_modules_for_islands_come_as_a_mapping(saved: Path) -> None:
    wrong: Any = [nn.ReLU()]
    with pytest.raises(ConfigError, match="modules maps the names of islands to modules"):
        load(saved, modules=wrong)


def test_a_loaded_model_is_saved_as_it_was(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    for number, plan in enumerate((INT8[:3], ["insert-fake-quant"], INT8)):
        save(PassManager(plan).run(model, X, [X]), tmp_path / f"first-{number}")
        save(load(tmp_path / f"first-{number}"), tmp_path / f"second-{number}")
        first, second = ((tmp_path / f"{name}-{number}" / "graph.json").read_text() for name in ("first", "second"))
        assert first == second


def sign(saved: Path) -> None:
    """Give a folder that was changed on purpose the digests of what it holds now."""
    names = ("graph.json", "tensors.safetensors", "history.json")
    found = {name: hashlib.sha256((saved / name).read_bytes()).hexdigest() for name in names}
    (saved / "digests.json").write_text(json.dumps(found))


def edit(saved: Path, change: Any) -> None:
    document = json.loads((saved / "graph.json").read_text())
    change(document)
    (saved / "graph.json").write_text(json.dumps(document))
    sign(saved)


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


class TakesMapping(nn.Module):
    """A model that iterates over a mapping it is given, so that its graph has the mapping's structure."""

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return torch.cat([value.mul(value.shape[0]) for value in inputs.values()])


CODE = "exec('raise SystemExit')"


def respell(document: Any, change: Any) -> None:
    """Change the structure of what a saved graph takes."""
    tree = document["module"]["pytree"]
    version, structure = json.loads(tree["in"])
    change(*structure["children_spec"])
    tree["in"] = json.dumps([version, structure])


def a_key(first: Any, entry: Any) -> None:
    """Make them what fx takes for arguments by position and by keyword."""
    first.update(type="builtins.tuple", context="null")
    entry.update(context=json.dumps([f"a': {CODE}, 'b", "b"]))


def an_enum(first: Any, entry: Any) -> None:
    entry.update(type="builtins.list", context='{"\\u005f_enum__": true, "fqn": "this:s", "name": "a"}', children_spec=[])


def a_factory(first: Any, entry: Any) -> None:
    context = {"default_factory_module": "this", "default_factory_name": "s", "dict_context": ["a", "b"]}
    entry.update(type="collections.defaultdict", context=context)


WRITTEN: dict[str, Any] = {
    "an argument": lambda d: d["module"]["nodes"][0].update(target=f"x={CODE}"),
    "an argument of a call": lambda d: d["module"]["nodes"][-2].update(kwargs={"dict": [[f"x={CODE}, dim", 0]]}),
    "an argument with a mapping": lambda d: d["module"]["pytree"].update(names=["self", f"inputs={CODE}"]),
    "a key of a mapping": lambda d: respell(d, a_key),
    "a layer": lambda d: d["module"]["nodes"][-2].update(op="get_attr", target=f'x"), {CODE}, ("'),
    "a private attribute": lambda d: d["module"]["nodes"][2].update(args={"tuple": [{"node": "inputs_1"}, "__class__"]}),
    "an enum": lambda d: respell(d, an_enum),
    "a factory": lambda d: respell(d, a_factory),
    "an operator that writes files": lambda d: d["module"]["nodes"][-2].update(target="aten.save.default"),
}


@pytest.mark.parametrize("what", WRITTEN)
def test_no_word_of_a_saved_model_becomes_code(what: str, tmp_path: Path) -> None:
    save(trace(TakesMapping(), {"inputs": {"a": X, "b": X}}), tmp_path / "model")
    assert torch.equal(load(tmp_path / "model")({"a": X, "b": X}), torch.cat([2 * X, 2 * X]))
    edit(tmp_path / "model", WRITTEN[what])
    sys.modules.pop("this", None)
    with pytest.raises(ArtifactError, match=r"no name|no part of a model|none of a tensor|not read|not an operator"):
        load(tmp_path / "model")
    assert "this" not in sys.modules


class Quoted(nn.Module):
    """Names that code cannot write as they are, and a module that its own code does not call ``self``."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"it's": nn.Linear(4, 4), "a b": nn.Linear(4, 4)})

    def forward(me, pair: Any, named: dict[str, Tensor]) -> dict[str, Tensor]:  # noqa: N805
        left, right = pair
        found = me.parts["it's"](left) + me.parts["a b"](right)
        return {name: found + value for name, value in named.items()}


def test_names_that_are_no_words_are_saved_as_any_other(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, (left, right) = Quoted().eval(), torch.randn(2, 3, 4)
    for keys in (("plain", "two words"), ('a "b"', "größe")):
        call = ((left, right), dict.fromkeys(keys, left))
        save(trace(model, call), tmp_path / "model")
        again = load(tmp_path / "model")(*call)
        assert all(torch.equal(again[key], value) for key, value in model(*call).items())


@pytest.mark.parametrize(
    "change",
    [
        lambda history: history.append(3),
        lambda history: history[0].update(plan=["fold-batchnorm"]),
        lambda history: history[0]["ledger"].update(rows=[]),
        lambda history: history[0]["ledger"]["rows"][0].update(snr="loud"),
        lambda history: history[0]["ledger"]["rows"][0].update(macs=None),
        lambda history: history[0]["ledger"]["rows"][0].update(remarks=[{"node": 3}]),
    ],
)
def test_a_history_that_is_none_is_refused(saved: Path, change: Any) -> None:
    history = json.loads((saved / "history.json").read_text())
    change(history)
    (saved / "history.json").write_text(json.dumps(history))
    sign(saved)
    with pytest.raises(ArtifactError, match=r"history.json' is damaged: "):
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
    sign(saved)
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


class Calling(nn.Module):
    """A layer and a function of torch that is seldom seen."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(4, 4), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer(x))


SELDOM: dict[str, Any] = {
    "vector_norm": lambda x: torch.linalg.vector_norm(x, ord=2, dim=-1, keepdim=True),
    "linalg.norm": lambda x: torch.linalg.norm(x, dim=1),
    "clamp_min": lambda x: torch.clamp_min(x, 0.25),
    "clamp_max": lambda x: x.clamp_max(0.25),
    "atan2": lambda x: torch.atan2(x, x + 3).nan_to_num(),
    "addcdiv": lambda x: torch.addcdiv(x, x, x.cosh(), value=0.5),
    "triu": lambda x: torch.triu(x) + x.tril(-1),
    "outer": lambda x: torch.outer(x[:, 0], x[0]),
    "tensordot": lambda x: torch.tensordot(x, x, dims=([1], [1])),
    "meshgrid": lambda x: torch.meshgrid(x[0], x[1], indexing="ij"),
    "hstack": lambda x: torch.hstack((x, x.ravel()[None].expand(3, -1))),
    "one_hot": lambda x: torch.nn.functional.one_hot(x.argmax(1), 4),
    "diff": lambda x: x.diff(dim=1),
}


@pytest.mark.parametrize("name", SELDOM)
def test_functions_seldom_seen_are_saved_by_name(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Calling(SELDOM[name]).eval(), torch.randn(3, 4)
    save(trace(model, x), tmp_path / "model")
    again = load(tmp_path / "model")
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
