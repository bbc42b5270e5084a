"""Schedules: the formulas, exact ends, monotone steps, frequency, resuming, and driving masks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxcompress.errors import ConfigError
from fxcompress.pruning import (
    AGPScheduler,
    CubicScheduler,
    IterativeScheduler,
    MagnitudePruner,
    OneShotScheduler,
    PruningScheduler,
)

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
    with pytest.raises(ConfigError, match="differs in target_sparsity"):
        cls(0.1, 0.7, 2, 20, 3).load_state_dict(first.state_dict())


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
    with pytest.raises(ConfigError, match="epochs count from 0"):
        AGPScheduler().step(-1)
