"""Schedules: the formulas, exact ends, monotone steps, frequency, resuming, and driving masks."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from torch import nn

from fxcompress import load, save
from fxcompress.components import steps_of
from fxcompress.errors import ConfigError
from fxcompress.graph.cost import cost
from fxcompress.manager import PassManager
from fxcompress.pruning import (
    AGPScheduler,
    CubicScheduler,
    GradualPruner,
    IterativeScheduler,
    MagnitudePruner,
    OneShotScheduler,
    PruningScheduler,
    StructuredPruner,
)
from fxcompress.training import OnEpoch, Recipe, train

ALL = [PruningScheduler, OneShotScheduler, IterativeScheduler, CubicScheduler, AGPScheduler]
settings = st.builds(
    lambda a, b, start, span, frequency: {
        "initial_sparsity": min(a, b),
        "target_sparsity": max(a, b),
        "start_epoch": start,
        "end_epoch": start + span,
        "frequency": frequency,
    },
    st.floats(0, 0.99),
    st.floats(0, 0.99),
    st.integers(0, 20),
    st.integers(0, 50),
    st.integers(1, 9),
)


@pytest.mark.parametrize("cls", ALL)
@given(options=settings)
def test_schedules_are_monotone_exact_at_the_ends_and_change_only_when_due(cls: Any, options: dict[str, Any]) -> None:
    schedule = cls(**options)
    values = [schedule.step(epoch) for epoch in range(80)]
    assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(values))
    assert all(value == options["initial_sparsity"] for value in values[: options["start_epoch"]])
    assert all(value == options["target_sparsity"] for value in values[options["end_epoch"] :])
    for epoch in range(1, 80):
        if values[epoch] != values[epoch - 1]:
            assert schedule.should_prune(epoch)


@given(settings)
def test_agp_follows_the_formula_at_every_pruning_epoch(options: dict[str, Any]) -> None:
    schedule = AGPScheduler(**options)
    t0, tn = options["start_epoch"], options["end_epoch"]
    si, sf = options["initial_sparsity"], options["target_sparsity"]
    for t in range(t0, tn, options["frequency"]):
        assert schedule.sparsity_at(t) == pytest.approx(sf + (si - sf) * (1 - (t - t0) / (tn - t0)) ** 3, abs=1e-12)


def test_iterative_takes_equal_steps() -> None:
    schedule = IterativeScheduler(0.0, 0.5, 0, 10)
    assert [schedule.step(epoch) for epoch in (0, 5, 10)] == [0.0, 0.25, 0.5]


@pytest.mark.parametrize("cls", ALL)
def test_a_schedule_resumes_where_it_stood(cls: Any) -> None:
    first, second = cls(0.1, 0.8, 2, 20, 3), cls(0.1, 0.8, 2, 20, 3)
    first.step(9)
    second.load_state_dict(first.state_dict())
    assert second.get_current_sparsity() == first.get_current_sparsity()
    assert [first.step(e) for e in range(10, 25)] == [second.step(e) for e in range(10, 25)]


@pytest.mark.parametrize("cls", ALL)
def test_a_saved_schedule_brings_what_it_was_built_with(cls: Any, caplog: pytest.LogCaptureFixture) -> None:
    first, second = cls(0.1, 0.8, 2, 20, 3), cls()
    first.step(9)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert "target_sparsity is 0.8, as it was saved, and no longer 0.5" in caplog.messages
    assert [first.step(e) for e in range(10, 25)] == [second.step(e) for e in range(10, 25)]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda s: s.load_state_dict({}), "no saved schedule: it has no epoch"),
        (lambda s: s.load_state_dict(None), "no saved schedule"),
        (lambda s: s.load_state_dict({**s.state_dict(), "target_sparsity": 2.0}), "sparsity is 2.0"),
        (lambda s: s.load_state_dict({**s.state_dict(), "epoch": -2}), "epoch is -2"),
        (lambda s: s.step(-1), "epoch is -1"),
        (lambda s: s.step("first"), "epoch is 'first'"),
        (lambda s: s.should_prune(1.5), "epoch is 1.5"),
        (lambda s: type(s)(frequency=0.5), "frequency is 0.5"),
        (lambda s: type(s)(end_epoch=True), "end_epoch is True"),
    ],
)
def test_what_is_no_epoch_or_state_is_refused(call: Any, match: str) -> None:
    schedule = AGPScheduler()
    with pytest.raises(ConfigError, match=match):
        call(schedule)
    assert schedule.state_dict() == AGPScheduler().state_dict()


def test_a_schedule_drives_masks_during_training_and_ends_exact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    pruner = MagnitudePruner()
    schedule = AGPScheduler(0.0, 0.75, 0, 6, 2, pruner=pruner, model=model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    reached = []
    for epoch in range(8):
        asked = schedule.step(epoch)
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        reached.append(pruner.get_sparsity(model))
        assert reached[-1] == pytest.approx(asked, abs=1 / 192)
    assert reached[-1] == 0.75


@pytest.mark.parametrize("cls", ALL)
def test_epochs_passed_over_are_made_up_for_at_the_next_one_entered(cls: Any) -> None:
    model, pruner = small(), MagnitudePruner()
    schedule = cls(0.0, 0.75, 2, 8, 2, pruner=pruner, model=model)
    for epoch in (5, 7, 20):
        asked = schedule.step(epoch)
        assert asked > 0.0 and pruner.get_sparsity(model) == pytest.approx(asked, abs=0.01)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))


BATCHES = [(torch.randn(8, 8, generator=torch.Generator().manual_seed(s)), torch.arange(8) % 4) for s in range(4)]


@pytest.mark.parametrize("killed_in", [1, 3, 5])
def test_interrupted_training_under_masks_ends_bit_for_bit_like_one_that_was_not(tmp_path: Path, killed_in: int) -> None:
    class KilledError(Exception):
        pass

    def run(checkpoint: Path | None, die: int | None = None, resume: bool = False) -> dict[str, torch.Tensor]:
        model = small()
        pruner = MagnitudePruner()
        schedule = AGPScheduler(0.0, 0.75, 0, 5, 2, pruner=pruner, model=model)

        def enter(epoch: int) -> None:
            schedule.step(epoch)
            if epoch == die and not resume:
                raise KilledError

        recipe = Recipe(epochs=7, lr=0.01, optimizer="adamw", optimizer_options={"weight_decay": 0.1})
        options: Any = {} if checkpoint is None else {"checkpoint": checkpoint, "resume": resume}
        train(model, BATCHES, recipe, loss="cross_entropy", callbacks=[OnEpoch(enter)], progress=False, **options)
        assert pruner.get_sparsity(model) == 0.75
        return model.state_dict()

    whole = run(None)
    with pytest.raises(KilledError):
        run(tmp_path / "run.pt", die=killed_in)
    resumed = run(tmp_path / "run.pt", resume=True)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def widths(model: nn.Module) -> list[int]:
    return [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("cls", ALL)
def test_a_schedule_drives_channel_pruning_and_ends_exact(cls: Any) -> None:
    pruner = GradualPruner(StructuredPruner(round_to=1), torch.randn(2, 8))
    schedule = cls(0.0, 0.6, 0, 5, 2, pruner=pruner, model=small().eval())
    seen = []
    for epoch in range(7):
        asked = schedule.step(epoch)
        first, second, last = widths(schedule.model)
        assert (first, second, last) == (16 - round(16 * asked), 24 - round(24 * asked), 4)
        seen.append(first)
        schedule.model(torch.randn(4, 8)).square().mean().backward()
    assert seen == sorted(seen, reverse=True) and seen[-1] == 16 - round(9.6)


def test_gradual_channel_pruning_resumes_from_saved_model_and_state(tmp_path: Path) -> None:
    def schedule(model: nn.Module) -> AGPScheduler:
        return AGPScheduler(
            0.1, 0.7, 0, 4, pruner=GradualPruner(StructuredPruner(round_to=1), torch.randn(2, 8)), model=model
        )

    whole, first = schedule(small().eval()), schedule(small().eval())
    for epoch in range(6):
        whole.step(epoch)
    for epoch in range(3):
        first.step(epoch)
    save(first.model, tmp_path / "model")  # type: ignore[arg-type]
    second = schedule(load(tmp_path / "model"))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for epoch in range(3, 6):
        second.step(epoch)
    assert whole.model is not None and second.model is not None
    assert widths(whole.model) == widths(second.model) == [5, 7, 4]
    state = whole.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in second.model.state_dict().items())


KINDS = ["AGPScheduler", "CubicScheduler", "IterativeScheduler"]
WIDTHS = st.lists(st.sampled_from([8, 12, 16, 20, 24, 32, 40]), min_size=2, max_size=3)


def chain(widths: list[int], groups: int = 1) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 1)]
    for before, after in itertools.pairwise(widths):
        layers += [nn.ReLU(), nn.Conv2d(before, after, 1, groups=groups)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 4, 3)).eval()


def made(model: nn.Module) -> list[int]:
    return [layer.out_channels for layer in model.children() if isinstance(layer, nn.Conv2d)]


def cuts(config: dict[str, Any]) -> list[Any]:
    """The steps of a pruning stage without the training between them."""
    return [step for step in steps_of({"type": "StructuredPruner", "prove": False, **config}, ()) if step.name != "train"]


@pytest.mark.parametrize("asked", [{}, {"global_pruning": True}, {"layers": {"2": 0.25}}, {"uniform_across_layers": True}])
@given(WIDTHS, st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9]), st.sampled_from(KINDS), st.integers(1, 5), st.integers(1, 5))
@limits(max_examples=8, deadline=None)
def test_channels_that_go_by_and_by_end_on_multiples_where_a_single_cut_would(
    asked: dict[str, Any], widths: list[int], share: float, kind: str, end: int, stop: int
) -> None:
    x, own = torch.randn(2, 3, 2, 2), {"sparsity": share, "round_to": 8, **asked}
    steps = cuts({**own, "scheduler": {"type": kind, "end_epoch": end, "frequency": 2}})
    half = PassManager(steps[:stop]).run(chain(widths), x)
    with tempfile.TemporaryDirectory() as folder:
        save(half, f"{folder}/model")
        model = PassManager(steps[stop:]).run(load(f"{folder}/model"), x)
    once = PassManager(cuts(own)).run(chain(widths), x)
    for before, middle, after in zip(widths, made(half), made(model), strict=True):
        assert before >= middle >= after >= 1
        assert after == before or after % 8 == 0 or before <= 8
    if "global_pruning" in asked:  # two ways to round may be as near
        asked_for = (1 - share) * sum(widths)
        assert abs(sum(made(model)) - asked_for) < abs(sum(made(once)) - asked_for) + 8
    else:
        assert made(model) == made(once)


@pytest.mark.parametrize("what", ["macs", "parameters"])
@given(widths=WIDTHS, left=st.sampled_from([0.3, 0.5, 0.75, 0.9]), end=st.integers(1, 5))
@limits(max_examples=8, deadline=None)
def test_a_target_by_and_by_counts_the_dense_model(what: str, widths: list[int], left: float, end: int) -> None:
    x, own = torch.randn(2, 3, 2, 2), {"target": {what: left}, "round_to": 1}
    model = PassManager(cuts({**own, "scheduler": {"type": "IterativeScheduler", "end_epoch": end}})).run(chain(widths), x)
    once = PassManager(cuts(own)).run(chain(widths), x)
    dense, many, single = (getattr(cost(PassManager([]).run(each, x)), what) for each in (chain(widths), model, once))
    largest = max(widths) * 2 + 3 * 4 + 2  # what one channel costs at most, at one of four places
    assert abs(many - left * dense) <= max(abs(single - left * dense), largest * (4 if what == "macs" else 1))


def test_whole_groups_that_go_by_and_by_are_those_that_a_single_cut_takes() -> None:
    x, own = torch.randn(2, 3, 2, 2), {"sparsity": 0.5, "round_to": 8}
    model = PassManager(cuts({**own, "scheduler": {"type": "AGPScheduler", "end_epoch": 5}})).run(chain([64, 64, 32], 8), x)
    assert made(model) == made(PassManager(cuts(own)).run(chain([64, 64, 32], 8), x)) == [32, 32, 16]


def test_a_pruner_that_is_driven_rounds_as_it_does_alone() -> None:
    schedule = AGPScheduler(
        0.0, 0.6, 0, 5, pruner=GradualPruner(StructuredPruner(), torch.randn(2, 8)), model=small().eval()
    )
    seen = []
    for epoch in range(6):
        schedule.step(epoch)
        assert schedule.model is not None
        seen.append(widths(schedule.model))
    assert all(width % 8 == 0 for found in seen for width in found[:-1]) and seen[-1] == [8, 8, 4]


def test_a_schedule_that_ends_elsewhere_than_its_target_is_refused() -> None:
    with pytest.raises(ConfigError, match="contradicts the pruner's target"):
        cuts({"target": {"macs": 0.5}, "scheduler": {"type": "AGPScheduler", "target_sparsity": 0.7}})


def test_a_schedule_that_leaves_nothing_to_take_goes_on() -> None:
    x, steps = (
        torch.randn(2, 3, 2, 2),
        cuts({"sparsity": 0.95, "round_to": 1, "scheduler": {"type": "AGPScheduler", "end_epoch": 6}}),
    )
    assert made(PassManager(steps).run(chain([8, 8]), x)) == [1, 1]


def test_a_pruner_that_cannot_be_driven_is_refused() -> None:
    with pytest.raises(ConfigError, match="neither apply_mask nor prune_step"):
        AGPScheduler(pruner=StructuredPruner(), model=small())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"initial_sparsity": 0.6},
        {"target_sparsity": 1.0},
        {"start_epoch": -1},
        {"start_epoch": 5, "end_epoch": 4},
        {"frequency": 0},
        {"pruner": MagnitudePruner()},
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        AGPScheduler(**options)
