"""How much goes: nothing, almost everything, multiples, global and local shares, criteria, repeated pruning, schedules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fxcompress.errors import ConfigError, FxCompressError
from fxcompress.pruning import AGPScheduler, CubicScheduler, IterativeScheduler, StructuredPruner
from tests.channel_cases import c3, error, image, lived_in, net, prune, remarks, shapes, tokens

X = (image(),)


def network(*widths: int) -> Any:
    layers: list[nn.Module] = []
    for before, after in zip((3, *widths), widths, strict=False):
        layers += [c3(before, after), nn.BatchNorm2d(after), nn.ReLU()]
    return lived_in(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 5)))


def widths(model: nn.Module) -> list[int]:
    return [part.weight.shape[0] for part in model.modules() if isinstance(part, nn.Conv2d)]


def test_nothing_asked_is_nothing_done_bit_by_bit() -> None:
    model = network(8, 12)
    small, _ = prune(model, X, sparsity=0.0)
    assert shapes(small) == shapes(model)
    assert torch.equal(small(*X), model(*X))


@pytest.mark.parametrize("global_pruning", [False, True])
def test_almost_everything_asked_leaves_one_channel_everywhere(global_pruning: bool) -> None:
    small, _ = prune(network(8, 12), X, sparsity=0.99, global_pruning=global_pruning)
    assert widths(small) == [1, 1]


@pytest.mark.parametrize(("option", "left"), [({"min_kept": 5}, [5, 5]), ({"max_ratio": 0.25}, [6, 9])])
def test_no_layer_falls_below_its_floor(option: dict[str, Any], left: list[int]) -> None:
    small, pruner = prune(network(8, 12), X, sparsity=0.9, **option)
    assert widths(small) == left
    assert "units removed where" in remarks(pruner)


def test_a_global_share_does_not_collapse_a_layer_of_small_weights() -> None:
    model = network(8, 12)
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
    raw, _ = prune(model, X, global_pruning=True, normalisation="none", criterion="l1_norm")
    assert widths(raw) == [1, 9]
    fair, _ = prune(model, X, global_pruning=True, criterion="l1_norm")
    assert sum(widths(fair)) == 10 and min(widths(fair)) > 1


@pytest.mark.parametrize(("width", "left"), [(20, 8), (3, 2), (12, 8), (64, 32), (8, 4), (24, 16)])
def test_what_is_left_is_a_multiple_where_the_layer_is_wider(width: int, left: int) -> None:
    small, _ = prune(network(width), X, round_to=8)
    assert widths(small) == [left]


def test_multiples_hold_in_groups_heads_and_sums_of_parts() -> None:
    grouped = lived_in(nn.Sequential(c3(3, 32), c3(32, 32, groups=2), nn.ReLU(), c3(32, 2)))
    small, _ = prune(grouped, X, sparsity=0.4, round_to=8)
    assert widths(small) == [16, 16, 2] or widths(small) == [24, 24, 2]
    joined = lived_in(
        net(lambda self, x: self.head(torch.cat([self.a(x), self.b(x)], 1)), a=c3(3, 16), b=c3(3, 32), head=c3(48, 2))
    )
    small, _ = prune(joined, X, sparsity=0.4, round_to=8)
    assert small.get_parameter("head.weight").shape[1] % 8 == 0


@pytest.mark.parametrize("share", [0.125, 0.25, 0.5, 0.75])
def test_a_share_is_met_exactly_through_gates_and_unflattened_maps(share: float) -> None:
    gate = lived_in(
        net(
            lambda self, x: self.head((lambda a, b: a * b.sigmoid())(*self.conv(x).chunk(2, 1))),
            conv=c3(3, 32),
            head=c3(16, 2),
        )
    )
    small, _ = prune(gate, X, sparsity=share)
    assert small.get_parameter("conv.weight").shape[0] == round(32 * (1 - share))
    lift = lived_in(
        nn.Sequential(nn.Linear(6, 128), nn.Unflatten(1, (32, 2, 2)), nn.ConvTranspose2d(32, 16, 2), nn.ReLU(), c3(16, 2))
    )
    small, _ = prune(lift, (torch.randn(2, 6, dtype=torch.float64),), sparsity=share)
    assert small.get_parameter("0.weight").shape[0] == round(128 * (1 - share))
    assert small.get_parameter("2.weight").shape[:2] == (round(32 * (1 - share)), round(16 * (1 - share)))


def test_shares_of_single_layers_go_by_name_and_glob() -> None:
    model = network(8, 12, 16)
    small, _ = prune(model, X, sparsity=0.0, layers={"0": 0.25, "[36]": 0.5})
    assert widths(small) == [6, 6, 8]
    with pytest.raises(FxCompressError, match="no channel group is called '7x'"):
        prune(model, X, layers={"7x": 0.5})


@pytest.mark.parametrize("pattern", ["b", "b*", "[b]"])
def test_excluding_one_member_keeps_everything_tied_to_it_and_says_so(pattern: str) -> None:
    model = lived_in(
        net(lambda self, x: self.head(self.c(self.a(x) + self.b(x))), a=c3(3, 8), b=c3(3, 8), c=c3(8, 12), head=c3(12, 2))
    )
    small, pruner = prune(model, X, exclude_layers=[pattern])
    assert widths(small) == [8, 8, 6, 2]
    said = remarks(pruner).splitlines()
    assert any("node='a'" in line and "excluded by name" in line for line in said)


def test_hrank_falls_back_where_no_layer_makes_feature_maps_and_says_so() -> None:
    model = lived_in(
        net(lambda self, x: self.o(self.r(self.a(x))[0].mean(1)), a=nn.Linear(6, 8), r=nn.LSTM(8, 10), o=nn.Linear(10, 3))
    )
    pruner = StructuredPruner(criterion="hrank", round_to=1, progress=False)
    small = pruner.prune(model, data=[(tokens(), torch.zeros(2))])
    assert "no layer makes feature maps of its channels: l1_norm is used" in remarks(pruner)
    norms = model.r.weight_ih_l0.abs().sum(1) + model.r.weight_hh_l0.abs().sum(1)
    kept = norms.reshape(4, 10).sum(0).argsort()[5:].sort().values
    assert torch.equal(small.get_parameter("r.bias_ih_l0"), model.r.bias_ih_l0.reshape(4, 10)[:, kept].flatten())


def test_bn_scale_falls_back_where_there_is_no_batchnorm_and_says_so() -> None:
    model = lived_in(nn.Sequential(c3(3, 8), nn.BatchNorm2d(8), nn.ReLU(), c3(8, 12), nn.ReLU(), c3(12, 2)))
    small, pruner = prune(model, X, criterion="bn_scale")
    kept = model[1].weight.detach().abs().argsort(descending=True)[:4].sort().values
    assert torch.equal(small.get_parameter("1.weight"), model[1].weight[kept])
    assert widths(small) == [4, 6, 2]
    assert "no BatchNorm scales its channels" in remarks(pruner)


def test_equal_scores_go_by_position_every_time() -> None:
    model = network(8)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    pruner = StructuredPruner(criterion="l1_norm", round_to=1, progress=False)
    plans = [pruner.get_pruning_plan(model, example_inputs=X) for _ in range(2)]
    assert plans[0] == plans[1]
    assert plans[0].groups["0"].remove == [0, 1, 2, 3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(bad: float) -> None:
    model = network(8, 12)
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = bad
    with pytest.raises(ConfigError, match=r"3\.weight holds NaN or infinite"):
        prune(model, X)


def test_half_and_half_again_is_three_quarters() -> None:
    model = network(16, 32)
    once, _ = prune(model, X, criterion="l1_norm", sparsity=0.75)
    half, _ = prune(model, X, criterion="l1_norm", sparsity=0.5)
    twice, _ = prune(half, X, criterion="l1_norm", sparsity=0.5)
    assert widths(twice) == widths(once) == [4, 8]


def test_two_groups_one_after_the_other_in_either_order_are_both_at_once() -> None:
    model, pruner = network(16, 32), StructuredPruner(round_to=1, progress=False)
    plan = pruner.get_pruning_plan(model, example_inputs=X)

    def only(name: str) -> Any:
        part = copy.deepcopy(plan)
        return part.veto(*(other for other in part.groups if other != name))

    def again(small: Any, name: str) -> Any:
        later = only(name)
        for other, group in later.groups.items():
            if other != name:
                group.size -= len(plan.groups[other].remove)
        return pruner.prune(small, later, example_inputs=X)

    both = pruner.prune(model, plan, example_inputs=X)
    for first, second in (("0", "3"), ("3", "0")):
        other = again(pruner.prune(model, only(first), example_inputs=X), second)
        assert shapes(other) == shapes(both)
        assert error(both(*X), other(*X)) <= 1e-12


@pytest.mark.parametrize("kind", [IterativeScheduler, CubicScheduler, AGPScheduler])
def test_a_schedule_of_channel_pruning_only_grows_and_ends_at_its_target(kind: Any) -> None:
    schedule = kind(target_sparsity=0.75, end_epoch=4)
    asked = [schedule.sparsity_at(epoch) for epoch in range(6)]
    assert asked == sorted(asked) and asked[4] == asked[5] == 0.75
    model, counts = network(16, 32), []
    for share in asked:
        counts.append(sum(widths(prune(model, X, sparsity=share, criterion="l1_norm")[0])))
    assert counts == sorted(counts, reverse=True) and counts[-1] == 12
