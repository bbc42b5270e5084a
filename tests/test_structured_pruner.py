"""Structured pruners: importance, plans, budgets, and what they refuse."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxcompress import CRITERIA, build_pruner
from fxcompress.errors import ConfigError, FxCompressError, PassError
from fxcompress.pruning import ChannelPruner, FilterPruner, PruningPlan, StructuredPruner

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def network(width: int = 16) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 5),
    ).eval()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_importance_is_the_norm_of_the_filters() -> None:
    model = network()
    found = StructuredPruner().compute_importance(model, X)
    expected = model[0].weight.detach().double().abs().sum((1, 2, 3))
    close(found["0"], expected)
    squared = StructuredPruner(criterion="l2_norm").compute_importance(model, X)
    close(squared["3"], model[3].weight.detach().double().square().sum((1, 2, 3)).sqrt())
    inputs = ChannelPruner().compute_importance(model, X)
    close(inputs["3"], model[3].weight.detach().double().abs().sum((0, 2, 3)))
    scales = StructuredPruner(criterion="bn_scale").compute_importance(model, X)
    close(scales["0"], model[1].weight.detach().double().abs())


def test_criteria_of_ones_own_are_registered_and_ranked_by() -> None:
    @CRITERIA.register()
    def widest_entry(slices: torch.Tensor, name: str) -> torch.Tensor:
        return slices.abs().amax(1)

    @CRITERIA.register()
    def one_for_all(slices: torch.Tensor, name: str) -> torch.Tensor:
        return slices.abs().sum()

    model = network()
    found = StructuredPruner(criterion="widest_entry").compute_importance(model, X)
    close(found["0"], model[0].weight.detach().double().abs().amax((1, 2, 3)))
    small = build_pruner({"type": "StructuredPruner", "criterion": "widest_entry", "round_to": 1}).prune(
        model, example_inputs=X
    )
    kept = found["0"].argsort(descending=True)[:8].sort().values
    assert torch.equal(small.get_parameter("0.weight"), model[0].weight[kept])
    with pytest.raises(FxCompressError, match=r"'one_for_all' gave \(\) for 0.weight; it gives a tensor of 16 scores"):
        StructuredPruner(criterion="one_for_all").compute_importance(model, X)


def test_scores_stand_in_the_positions_of_a_plan_in_blocks_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.ReLU(), nn.Conv2d(16, 4, 1)
    ).eval()
    pruner = StructuredPruner(0.5, round_to=1, example_inputs=torch.randn(1, 3, 8, 8))
    scores, plan = pruner.compute_importance(model), pruner.get_pruning_plan(model)
    assert scores.keys() == plan.groups.keys() and any(group.blocks == 4 for group in plan.groups.values())
    for name, group in plan.groups.items():
        assert scores[name].shape == (group.size,)
        each = group.size // group.blocks
        for block in range(0, group.size, each):
            gone = [i for i in group.remove if block <= i < block + each]
            kept = [i for i in range(block, block + each) if i not in gone]
            assert scores[name][gone].max() <= scores[name][kept].min()


def test_the_smallest_filters_go_and_the_rest_keep_their_values() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    small = StructuredPruner(sparsity=0.25, round_to=1).prune(model, example_inputs=X)
    norms = model[0].weight.detach().abs().sum((1, 2, 3))
    kept = norms.argsort(descending=True)[:12].sort().values
    assert torch.equal(small.get_parameter("0.weight"), model[0].weight[kept])
    assert small.get_submodule("0").out_channels == 12
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_plan_prints_saves_loads_and_applies_to_a_fresh_copy(tmp_path: Path) -> None:
    model, pruner = network(), StructuredPruner(sparsity=0.5)
    plan = pruner.get_pruning_plan(model, example_inputs=X)
    assert "channel group" in str(plan)
    plan.groups["3"].remove = [0, 5, 7]
    plan.save(tmp_path / "plan.yaml")
    again = PruningPlan.load(tmp_path / "plan.yaml")
    assert again == plan
    small = pruner.prune(network(), again, example_inputs=X)
    assert small.get_parameter("3.weight").shape == (29, 8, 3, 3)
    assert pruner.prune(network(), plan.veto("0"), example_inputs=X).get_parameter("0.weight").shape[0] == 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("groups: []", "is a mapping with 'groups'"),
        ("groups: {}\noptions: [dimension]", "they are a mapping"),
        ("groups: {}\noption: {}", "Did you mean 'options'"),
        ("groups: {a: {size: 4, removed: [1]}}", "groups.a.removed: there is no such key. Did you mean 'remove'"),
    ],
)
def test_a_plan_that_cannot_be_meant_is_refused_by_file_and_key(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        PruningPlan.load(file)
    assert "plan.yaml" in str(caught.value) and message in str(caught.value)


def test_a_plan_that_does_not_fit_names_every_mismatch() -> None:
    plan = StructuredPruner().get_pruning_plan(network(), example_inputs=X)
    with pytest.raises(ConfigError, match=r"(?s)'0' has 12 units.*'3' has 24 units"):
        StructuredPruner().prune(network(12), plan, example_inputs=X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"criterion": "l3_norm"}, "Did you mean 'l"),
        ({"pruning_dim": 2}, "pruning_dim"),
        ({"round_to": 0}, "round_to"),
        ({"target": {"macs": 0.0}}, "target"),
        ({"layers": {"0": 1.5}}, "layers"),
        ({"layers": 3}, "layers is 3"),
        ({"target": 0.5}, "target is 0.5"),
        ({"whole_groups": 3}, "whole_groups is 3"),
        ({"progress": "no"}, "progress is 'no'"),
    ],
)
def test_bad_numbers_are_refused_when_they_enter(options: dict[str, object], message: str) -> None:
    with pytest.raises(FxCompressError, match=message):
        StructuredPruner(**options)  # type: ignore[arg-type]


def test_what_is_missing_is_said() -> None:
    with pytest.raises(FxCompressError, match="no layer is called 'hed'"):
        StructuredPruner(exclude_layers=["hed"]).prune(network(), example_inputs=X)
    with pytest.raises(FxCompressError, match="taylor needs"):
        StructuredPruner(criterion="taylor").prune(network(), example_inputs=X)
    with pytest.raises(FxCompressError, match="hrank needs data"):
        StructuredPruner(criterion="hrank").prune(network(), example_inputs=X)
    with pytest.raises(FxCompressError, match="batch 0 is empty"):
        StructuredPruner(criterion="hrank").prune(network(), example_inputs=X, data=[X[:0]])
    with pytest.raises(FxCompressError, match="example_inputs"):
        StructuredPruner().prune(nn.Bilinear(2, 3, 4))
    broken = network()
    with torch.no_grad():
        broken[0].weight[3, 0, 0, 0] = float("nan")
    with pytest.raises(FxCompressError, match=r"0\.weight"):
        StructuredPruner().prune(broken, example_inputs=X)


def test_a_model_that_is_all_frozen_is_loud_and_says_why() -> None:
    with pytest.raises(PassError, match="it is an output of the model"):
        StructuredPruner().prune(nn.Sequential(nn.Conv2d(3, 8, 3)), example_inputs=X)


@pytest.mark.parametrize("what", ["parameters", "macs"])
def test_targets_are_met_to_the_nearest_unit(what: str) -> None:
    model = network(32)
    pruner = StructuredPruner(target={what: 0.5}, round_to=1, global_pruning=True)
    small = pruner.prune(model, example_inputs=X)
    first, last = pruner.ledger.rows[0], pruner.ledger.rows[-1]
    share = last.parameters / first.parameters if what == "parameters" else last.macs / first.macs
    assert abs(share - 0.5) < 0.02
    assert any(f"{share:.1%} of its {what} are left where 50.0% was asked" in str(remark) for remark in last.remarks)
    assert last.parameters == sum(p.numel() for p in small.parameters())


def test_what_a_structured_pruner_was_made_with_can_be_read() -> None:
    given: dict[str, Any] = {
        "sparsity": 0.25,
        "criterion": "l2_norm",
        "global_pruning": True,
        "exclude_layers": ["a*"],
        "round_to": 4,
    }
    for made, dimension in ((StructuredPruner, 0), (FilterPruner, 0), (ChannelPruner, 1)):
        pruner = made(**given)
        assert {name: getattr(pruner, name) for name in given} == given and pruner.pruning_dim == dimension


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (
            nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 13 * 13, 10)),
            (1, 28, 28),
        ),
        (nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10)), (20,)),
        (nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)), None),
    ],
)
def test_what_a_model_takes_is_tried_where_nobody_says_it(model: nn.Module, x: tuple[int, ...] | None) -> None:
    pruner = StructuredPruner(0.5)
    scores = pruner.compute_importance(model)
    small = pruner.prune(model, pruner.get_pruning_plan(model, 0.5))
    assert "no example inputs were given: random ones of shape" in str(pruner.ledger) or x is None
    inputs = torch.zeros(3, 5, dtype=torch.long) if x is None else torch.randn(3, *x)
    assert small(inputs).shape == model(inputs).shape and model.training and scores
    count = sum(p.numel() for p in small.parameters())
    assert count < 0.6 * sum(p.numel() for p in model.parameters())


def test_what_is_no_model_plan_or_data_is_refused() -> None:
    pruner, model = StructuredPruner(), nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    calls: list[tuple[Any, str]] = [
        (lambda: pruner.prune("model"), "the model is a str"),  # type: ignore[arg-type]
        (lambda: pruner.compute_importance(None), "the model is a NoneType"),  # type: ignore[arg-type]
        (lambda: pruner.prune(model, 3), "the plan is a int"),  # type: ignore[arg-type]
        (lambda: pruner.compute_importance(nn.Bilinear(2, 3, 4)), "give example_inputs or data"),
        (lambda: pruner.finetune_after_prune(model, 5), "the data is a int"),  # type: ignore[arg-type]
        (lambda: pruner.finetune_after_prune("model", []), "the model is a str"),  # type: ignore[arg-type]
        (lambda: pruner.finetune_after_prune(model, [], epoch=2), "no option 'epoch'. Did you mean 'epochs'"),
    ]
    for call, message in calls:
        with pytest.raises(FxCompressError, match=message):
            call()
