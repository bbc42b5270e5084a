"""An analysis that is wrong about some channels: an oracle objects, they stay, the others go."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxcompress.errors import DataError, VerificationError
from fxcompress.graph import ops
from fxcompress.graph.channels.walk import RULES, Count, Walk
from fxcompress.pruning import apply_recipe, get_recipe
from tests.channel_cases import X, c3, error, image, lived_in, net, prune, remarks, shapes, silenced


def joined_beside_plain() -> Any:
    """Channels of two layers side by side, then others of one."""
    return net(
        lambda self, x: self.e(F.relu(self.d(F.relu(self.c(F.relu(torch.cat([self.a(x), self.b(x)], 1))))))),
        a=c3(3, 8),
        b=c3(3, 6),
        c=c3(14, 10),
        d=c3(10, 4),
        e=c3(4, 2),
    )


def grouped_norm_beside_plain() -> Any:
    return nn.Sequential(c3(3, 8), nn.LayerNorm([8, 10, 10]), nn.ReLU(), c3(8, 6), nn.ReLU(), c3(6, 2))


def the_wrong_way_round(walk: Walk, call: ops.Call) -> Any:
    """A rule that joins tensors in the wrong order."""
    return CAT(walk, replace(call, arguments={**call.arguments, "tensors": call["tensors"][::-1]}))


CAT = RULES["cat"]
WRONG = {"cat": the_wrong_way_round}


def holds_against_the_eager_model(model: Any, small: Any) -> bool:
    truth = silenced(copy.deepcopy(model), small)
    with torch.no_grad():
        return error(truth(image(size=13, batch=3)), small(image(size=13, batch=3))) <= 1e-10


def test_channels_that_a_wrong_rule_pairs_stay_and_the_others_go() -> None:
    model = lived_in(joined_beside_plain())
    with mock.patch.dict(RULES, WRONG):
        small, pruner = prune(model, X)
    found = shapes(small)
    assert {name: found[f"{name}.weight"][0] for name in "abcde"} == {"a": 8, "b": 6, "c": 5, "d": 2, "e": 2}
    said = remarks(pruner)
    for name in "ab":
        assert f"node='{name}', reason='it stays, for the permutation oracle finds a relative error of" in said
    assert "first at cat" in said
    assert "proved: permutation error" in remarks(pruner)
    assert holds_against_the_eager_model(model, small)


def test_the_same_model_loses_them_all_by_the_right_rule() -> None:
    model = lived_in(joined_beside_plain())
    small, _ = prune(model, X)
    assert [shapes(small)[f"{name}.weight"][0] for name in "abcde"] == [4, 3, 5, 2, 2]
    assert holds_against_the_eager_model(model, small)


def test_a_model_whose_own_rounding_explains_the_error_is_told_so_and_no_rule_is_blamed() -> None:
    def wild(self: Any, x: Any) -> Any:
        x = self.b(F.relu(self.a(x)))
        for _ in range(8):
            x = torch.sin(50 * x)
        return x

    model = lived_in(net(wild, a=c3(3, 8), b=c3(8, 4))).float()
    with pytest.raises(VerificationError, match="a rounding of the inputs moves the outputs of the model itself by"):
        prune(model, image().float())


def test_a_number_that_nobody_counted_is_laid_to_the_channels_that_it_counts() -> None:
    class Forgetful(list[Count]):
        def append(self, count: Count) -> None:
            if not count.name.startswith("normalized_shape"):
                super().append(count)

    def forget(walk: Walk, call: ops.Call) -> Any:
        walk.counts = Forgetful(walk.counts)
        return rule(walk, call)

    rule = RULES["layer_norm"]
    model = lived_in(grouped_norm_beside_plain())
    with mock.patch.dict(RULES, {"layer_norm": forget}):
        small, pruner = prune(model, X)
    found = shapes(small)
    assert (found["0.weight"][0], found["3.weight"][0]) == (8, 3)
    assert any(
        "node='0'" in line and "silence oracle" in line and "first at 1" in line for line in remarks(pruner).split("\n")
    )
    with torch.no_grad():
        assert error(silenced(copy.deepcopy(model), small)(*X), small(*X)) <= 1e-10


def test_a_recipe_of_what_is_left_is_applied_as_ever() -> None:
    model = lived_in(joined_beside_plain())
    with mock.patch.dict(RULES, WRONG):
        small, _ = prune(model, X)
    again = apply_recipe(copy.deepcopy(model), get_recipe(small), X)
    assert shapes(again) == shapes(small)
    assert error(small(*X), again(*X)) == 0


def test_a_model_whose_every_group_is_wrong_is_refused() -> None:
    model = lived_in(net(lambda self, x: self.c(torch.cat([self.a(x), self.b(x)], 1)), a=c3(3, 8), b=c3(3, 6), c=c3(14, 2)))
    before = copy.deepcopy(model.state_dict())
    with mock.patch.dict(RULES, WRONG), pytest.raises(VerificationError, match="permutation oracle"):
        prune(model, X)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_groups_that_are_wrong_only_together_are_refused() -> None:
    model = lived_in(joined_beside_plain())
    with (
        mock.patch.dict(RULES, WRONG),
        mock.patch("fxcompress.graph.channels.blame._Judge.search", return_value=[]),
        pytest.raises(VerificationError, match="permutation oracle"),
    ):
        prune(model, X)


def test_a_model_that_computes_nan_cannot_be_proved_and_says_so() -> None:
    model = lived_in(net(lambda self, x: self.b(torch.log(self.a(x))), a=c3(3, 8), b=c3(8, 2)))
    with pytest.raises(DataError, match="the model itself computes NaN for the example inputs"):
        prune(model, X)


def test_infinite_results_are_compared_as_they_are() -> None:
    def masked(self: Any, x: Any) -> Any:
        y = self.b(F.relu(self.a(x)))
        return y.masked_fill(y < 0, -torch.inf)

    small, pruner = prune(lived_in(net(masked, a=c3(3, 8), b=c3(8, 2))), X)
    assert shapes(small)["a.weight"][0] == 4
    assert "proved" in remarks(pruner)


def test_rounding_inside_a_model_is_no_mistake_of_the_analysis() -> None:
    model = lived_in(
        net(
            lambda self, x: self.c(self.b(F.relu(self.a(x)).float().softmax(1).double())), a=c3(3, 8), b=c3(8, 8), c=c3(8, 2)
        )
    )
    small, pruner = prune(model, X)
    assert [shapes(small)[f"{name}.weight"][0] for name in "abc"] == [4, 4, 2]
    assert "it stays" not in remarks(pruner)
