"""The manager: needs, failures, reproducers, promises, the ledger, diffs."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

from fxcompress import Context, Ledger, Pass, PassManager, Plan, coverage, library, trace
from fxcompress.__main__ import main
from fxcompress.errors import DataError, PassError, PlanError, PromiseError, VerificationError
from fxcompress.graph import edit, ops, verify
from fxcompress.pass_base import EXACT, Promise, close


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Identity()).eval()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Negate(Pass):
    """Break its promise."""

    name: ClassVar[str] = "negate"
    promise: ClassVar[Promise] = EXACT

    def run(self, module: fx.GraphModule, context: Context) -> None:
        for node in list(module.graph.nodes):
            if ops.kind(node) == "conv2d":
                made = edit.insert_after(node, torch.neg, (node,))
                node.replace_all_uses_with(made, lambda user, made=made: user is not made)  # type: ignore[misc]


@dataclass(frozen=True)
class Nearly(Negate):
    """Break a promise within tolerances."""

    name: ClassVar[str] = "nearly"
    promise: ClassVar[Promise] = close(rtol=1e-4)


@dataclass(frozen=True)
class Explode(Pass):
    """Fail."""

    name: ClassVar[str] = "explode"

    def run(self, module: fx.GraphModule, context: Context) -> None:
        raise KeyError("boom")


@dataclass(frozen=True)
class Retrain(Pass):
    """Change a training flag behind the verifier's back."""

    name: ClassVar[str] = "retrain"

    def run(self, module: fx.GraphModule, context: Context) -> None:
        next(iter(module.children())).train()


@dataclass(frozen=True)
class Unsettle(Pass):
    """Write wrong metadata."""

    name: ClassVar[str] = "unsettle"

    def run(self, module: fx.GraphModule, context: Context) -> None:
        for node in module.graph.nodes:
            if ops.kind(node) == "relu":
                node.meta["tensor_meta"] = node.meta["tensor_meta"]._replace(shape=torch.Size([1]))
                with module.graph.inserting_after(node):
                    node.replace_all_uses_with(copy := module.graph.call_function(torch.clone, (node,)))
                    copy.args = (node,)


def manager(*steps: Any, **options: Any) -> PassManager:
    return PassManager(list(steps), reproducer=False, **options)


def test_a_broken_promise_is_an_error_and_the_model_stays() -> None:
    original = model()
    before = {name: value.clone() for name, value in original.state_dict().items()}
    with pytest.raises(PromiseError, match="'negate' promised outputs exact"):
        manager(Negate()).run(original, X)
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    manager(Negate(), verify=False).run(original, X)


class Wild(nn.Module):
    """Multiplies errors by 50, ``times`` times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.sin(50 * x)
        return x


def test_a_promise_that_no_rounding_would_keep_says_so() -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)]
    layers[1].running_var.fill_(3.0)  # type: ignore[union-attr,operator]
    said = "'fold-batchnorm' promised .* One rounding of its inputs moves them by .* give the model and its inputs in double"
    with pytest.raises(PromiseError, match=said):
        manager("fold-batchnorm").run(nn.Sequential(*layers, Wild(8)).eval(), torch.randn(2, 3, 8, 8))
    manager("fold-batchnorm").run(nn.Sequential(*layers, Wild(1)).eval(), torch.randn(2, 3, 8, 8))


def test_a_pass_that_is_wrong_is_not_excused_by_rounding() -> None:
    with pytest.raises(PromiseError) as raised:
        manager(Nearly()).run(model(), X)
    assert "One rounding" not in str(raised.value)


def test_a_changed_training_flag_is_an_error() -> None:
    with pytest.raises(VerificationError, match="same_training_flags: '0' was training=False"):
        manager(Retrain()).run(model(), X)


def test_a_tensor_at_the_address_of_one_that_is_gone_is_another() -> None:
    module = trace(nn.Sequential(nn.Linear(4, 4, bias=False)), X[..., :4])
    edit.set_tensor(module, "0.weight", torch.ones(4, 4))
    before = verify.fingerprint(module)
    assert verify.fingerprint(module) == before
    layer = module.get_submodule("0")
    address = id(layer.weight)
    zeros = torch.zeros(4, 4)
    del layer._parameters["weight"]
    others = [nn.Parameter(zeros)]
    while id(others[-1]) != address and len(others) < 100_000:
        others.append(nn.Parameter(zeros))
    assert id(others[-1]) == address
    layer.register_parameter("weight", others[-1])
    assert verify.fingerprint(module) != before


def test_metadata_that_disagrees_with_a_real_run_is_an_error() -> None:
    with pytest.raises(VerificationError, match="metadata of"):
        manager(Unsettle()).run(model(), X)


def test_a_failing_pass_leaves_a_reproducer_that_replays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library.passes()["explode"] = Explode
    try:
        with pytest.raises(PassError, match=r"step 2 'explode' failed: KeyError: 'boom'") as caught:
            PassManager(["fold-batchnorm", Explode()], reproducer=tmp_path / "failure").run(model(), X)
        assert f"python -m fxcompress replay {tmp_path / 'failure'}" in str(caught.value)
        assert main(["replay", str(tmp_path / "failure")]) == 1
        assert "'explode' failed" in capsys.readouterr().err
    finally:
        del library.passes()["explode"]


def test_a_failing_pass_without_inputs_still_leaves_the_plan(tmp_path: Path) -> None:
    with pytest.raises(PassError):
        PassManager([Explode()], reproducer=tmp_path / "failure").run(model())
    assert (tmp_path / "failure" / "plan.yaml").is_file()


def test_needs_are_checked_before_any_work() -> None:
    with pytest.raises(PlanError, match="step 2 'calibrate' needs data"):
        manager("insert-observers", "calibrate").run(model(), X)


def test_a_pass_that_cannot_take_the_stage_is_refused() -> None:
    with pytest.raises(PlanError, match="the model is float"):
        manager("lower").run(model(), X)


def test_the_ledger_has_a_row_per_pass_and_survives_json(tmp_path: Path) -> None:
    m = manager({"remove-dead": {"dropout": True}}, "fold-batchnorm", "fuse-activations")
    m.run(model(), X)
    assert [row.step for row in m.ledger.rows] == ["trace", "remove-dead", "fold-batchnorm", "fuse-activations"]
    assert [row.nodes for row in m.ledger.rows] == [5, 3, 2, 1]
    assert m.ledger.rows[0].macs == 2 * 6 * 6 * 4 * 27
    assert "fold-batchnorm" in str(m.ledger)
    m.ledger.save(tmp_path / "ledger.json")
    assert Ledger.from_data(json.loads((tmp_path / "ledger.json").read_text())) == m.ledger


def test_multiplications_that_no_example_tells_are_unknown_and_not_none() -> None:
    m = manager("fold-batchnorm")
    m.run(model())
    assert not m.ledger.rows[0].counted and "unknown" in str(m.ledger) and "0.0M" not in str(m.ledger)
    assert Ledger.from_data(m.ledger.as_data()) == m.ledger
    assert "an unknown share of the MACs" in str(coverage(trace(model())))
    with pytest.raises(VerificationError, match="is not known: give example_inputs"):
        manager({"require": {"int8_macs": 0.5}}).run(model())
    known = manager("fold-batchnorm")
    known.run(model(), X)
    assert known.ledger.rows[0].counted and "unknown" not in str(known.ledger)
    bare = manager("fold-batchnorm")
    bare.run(nn.Sequential(nn.ReLU()))
    assert bare.ledger.rows[0].counted


def test_what_is_left_alone_is_said_with_the_reason() -> None:
    m = manager("fold-batchnorm")
    m.run(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)).eval(), X)
    assert [(r.node, "follows 'relu'" in r.reason) for r in m.ledger.remarks("fold-batchnorm")] == [("1", True)]
    m.run(model().train(), X)
    assert "training mode" in m.ledger.remarks("fold-batchnorm")[0].reason


def test_changes_are_printed_only_where_there_are_any(capsys: pytest.CaptureFixture[str]) -> None:
    manager("remove-dead", "fold-batchnorm", show="changes").run(model(), X)
    shown = capsys.readouterr().out
    assert "--- fold-batchnorm" in shown and "-%_1" in shown
    manager("fold-batchnorm", show="changes").run(nn.Sequential(nn.Linear(8, 1)), X)
    assert capsys.readouterr().out == ""


def test_a_plan_without_inputs_runs_with_structural_checks_only() -> None:
    m = manager("fold-batchnorm")
    result = m.run(model())
    assert m.ledger.rows[-1].snr is None
    assert torch.allclose(result(X), model()(X), atol=1e-5)


def test_an_empty_dataloader_and_bad_batches_are_refused() -> None:
    steps: list[Any] = ["insert-observers", "calibrate"]
    with pytest.raises(DataError, match="empty"):
        manager(*steps).run(model(), data=[])
    with pytest.raises(DataError, match="batch 1 holds NaN"):
        manager(*steps).run(model(), data=[X, torch.full_like(X, torch.nan)])
    with pytest.raises(DataError, match="batch 1 is empty"):
        manager(*steps).run(model(), data=[X, X[:0]])
    with pytest.raises(DataError, match="batch 1 does not run"):
        manager(*steps).run(model(), data=[X, torch.randn(1, 4, 8, 8)])
    with pytest.raises(DataError, match="a batch is a str"):
        manager(*steps).run(model(), X, data=["images"])
    with pytest.raises(DataError, match="the data is a int"):
        manager(*steps).run(model(), X, data=7)  # type: ignore[arg-type]


def test_an_iterator_tells_the_shapes_and_keeps_all_its_batches() -> None:
    deep = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    pruned = {"prune-channels": {"sparsity": 0.5, "round_to": 1}}
    steps: list[Any] = [pruned, "insert-observers", {"calibrate": {"num_batches": 2}}, "fold-quantization"]
    once, again = manager(*steps).run(deep, data=iter([X, 9 * X])), manager(*steps).run(deep, data=[X, 9 * X])
    assert torch.equal(once(X), again(X)) and not torch.equal(manager(*steps).run(deep, data=[X, X])(X), again(X))
    with pytest.raises(DataError, match="the dataloader is empty"):
        manager("insert-observers", "calibrate").run(model(), data=iter([]))


def test_a_run_computes_as_outside_of_the_callers_autocast_and_threads_wait_for_each_other() -> None:
    steps: list[Any] = ["fold-batchnorm", "insert-observers", {"calibrate": {"num_batches": 1}}, "fold-quantization"]
    expected, models = manager(*steps).run(model(), data=[X])(X), [model() for _ in range(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = manager(*steps).run(model(), data=[X])
    assert torch.equal(narrow(X), expected)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda given: manager(*steps).run(given, data=[X])(X), models))
    assert all(torch.equal(one, expected) for one in found)


def test_an_iterator_that_two_steps_read_is_said_to_be_read() -> None:
    with pytest.raises(DataError, match="can be read once, and an earlier step has read it"):
        manager("recalibrate-batchnorm", "insert-observers", "calibrate").run(model(), data=iter([X, X]))


def test_a_mapping_of_which_the_model_takes_nothing_is_named_by_its_keys() -> None:
    with pytest.raises(DataError, match="takes none of the keys of a batch, 'imput', 'target'; a dict is passed by keyword"):
        manager("insert-observers", "calibrate").run(model(), X, data=[{"imput": X, "target": X}])


def test_fewer_batches_than_asked_is_a_warning_with_both_numbers(caplog: pytest.LogCaptureFixture) -> None:
    m = manager("insert-observers", {"calibrate": {"num_batches": 9}})
    m.run(model(), data=[X, X])
    assert "9 batches were asked for and the data has 2" in {r.reason for r in m.ledger.remarks("calibrate")}
    assert caplog.messages == ["calibrate: 9 batches were asked for and the data has 2"]


def test_data_comes_as_tensors_pairs_or_dicts() -> None:
    for batch in (X, (X, torch.zeros(2)), [X, torch.zeros(2)], {"input": X}):
        manager("insert-observers", "calibrate").run(model(), data=[batch])


def test_the_library_takes_passes_from_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name, value = "negate", "somewhere:Negate"

        def load(self) -> Any:
            return Negate

    monkeypatch.setattr(library, "entry_points", lambda group: [Point()])
    library.passes.cache_clear()
    try:
        assert Plan.parse(["negate"]).steps == (Negate(),)
    finally:
        library.passes.cache_clear()
