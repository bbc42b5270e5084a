"""Groups of a convolution: equal numbers from every group, or whole groups where that comes nearer to the share."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress import PassManager
from fxcompress.errors import ConfigError
from fxcompress.pruning import StructuredPruner, apply_recipe, get_recipe


class Bottleneck(nn.Module):
    """``groups`` groups of ``width`` channels between two pointwise layers."""

    def __init__(self, groups: int = 13, width: int = 8, functional: bool = False, transposed: bool = False) -> None:
        super().__init__()
        channels, self.groups, self.functional = groups * width, groups, functional
        self.a = nn.Conv2d(3, channels, 1)
        kind: Any = nn.ConvTranspose2d if transposed else nn.Conv2d
        self.b = kind(channels, channels, 3, padding=1, groups=groups)
        self.c = nn.Conv2d(channels, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.a(x))
        x = F.conv2d(x, self.b.weight, self.b.bias, 1, 1, 1, self.groups) if self.functional else self.b(x)
        return self.c(F.relu(x))


CALL = torch.randn(2, 3, 6, 6, dtype=torch.float64)


def build(**options: Any) -> Any:
    torch.manual_seed(0)
    return Bottleneck(**options).double().eval()


def pruned(model: Any, **options: Any) -> tuple[Any, PassManager]:
    manager = PassManager([{"prune-channels": {"round_to": 8, **options}}], progress=False)
    return manager.run(model, CALL), manager


def kept_groups(model: Any, small: Any, width: int) -> list[int]:
    """Which groups of the dense convolution are left in the small one, by their weights."""
    dense, left = (part.b.weight.detach().reshape(-1, width, *part.b.weight.shape[1:]) for part in (model, small))
    return [next(i for i, block in enumerate(dense) if torch.equal(block, group)) for group in left]


@pytest.mark.parametrize(("functional", "transposed"), [(False, False), (True, False), (False, True)])
def test_thirteen_groups_of_eight_lose_six_whole_groups(functional: bool, transposed: bool) -> None:
    model = build(functional=functional, transposed=transposed)
    small, _ = pruned(model, sparsity=0.5)
    kept = kept_groups(model, small, 8)
    assert len(kept) == 7 and small.a.out_channels == 56 == small.c.in_channels
    if not functional:
        assert (small.b.groups, small.b.in_channels, small.b.out_channels) == (7, 56, 56)
    gone = [channel for group in set(range(13)) - set(kept) for channel in range(8 * group, 8 * group + 8)]
    with torch.no_grad():
        expected_input = model.c.weight.clone()
        expected_input[:, gone] = 0
        expected = F.conv2d(_hidden(model), expected_input, model.c.bias)
        assert torch.allclose(small(CALL), expected, rtol=1e-12, atol=1e-12)


def _hidden(model: Any) -> Tensor:
    x = F.relu(model.a(CALL))
    return F.relu(model.b(x))


def test_the_groups_that_go_have_the_least_weights() -> None:
    model = build()
    with torch.no_grad():
        for group in (1, 4, 5, 7, 11, 12):
            for part in (model.a, model.b):
                part.weight[8 * group : 8 * group + 8] *= 0.01
    assert kept_groups(model, pruned(model, sparsity=0.5)[0], 8) == [0, 2, 3, 6, 8, 9, 10]


@pytest.mark.parametrize(("groups", "width", "left"), [(17, 24, 9), (7, 24, 4), (38, 24, 19)])
def test_groups_that_rounding_would_leave_too_large_go_whole(groups: int, width: int, left: int) -> None:
    small, _ = pruned(build(groups=groups, width=width), sparsity=0.5)
    assert (small.b.groups, small.b.in_channels) == (left, left * width)


@pytest.mark.parametrize(("groups", "width", "options"), [(10, 16, {}), (13, 8, {"round_to": 1}), (17, 24, {"round_to": 1})])
def test_groups_that_can_lose_the_share_lose_it_one_by_one(groups: int, width: int, options: dict[str, Any]) -> None:
    small, _ = pruned(build(groups=groups, width=width), sparsity=0.5, **options)
    assert (small.b.groups, small.b.in_channels) == (groups, groups * width // 2)


def test_what_is_left_is_a_multiple_of_round_to() -> None:
    small, _ = pruned(build(groups=15, width=12), sparsity=0.5)
    assert small.b.in_channels % 8 == 0 and small.b.in_channels == small.a.out_channels


def test_whole_groups_are_chosen_or_refused_by_name() -> None:
    assert pruned(build(groups=10, width=16), sparsity=0.5, whole_groups=["b"])[0].b.groups == 5
    assert pruned(build(), sparsity=0.5, whole_groups=[])[0].b.groups == 13
    with pytest.raises(ConfigError, match="no grouped convolution is called 'bb'"):
        pruned(build(), whole_groups=["bb"])


def test_a_plan_and_a_recipe_with_whole_groups_fit_a_fresh_model() -> None:
    pruner = StructuredPruner(sparsity=0.5, example_inputs=CALL, progress=False)
    plan = pruner.get_pruning_plan(build())
    assert plan.options["whole_groups"] == ["b"]
    small: Any = pruner.prune(build(), type(plan).from_data(plan.as_data()))
    again: Any = apply_recipe(build(), get_recipe(small), CALL)
    assert small.b.groups == again.b.groups == 7
    assert torch.equal(small(CALL), again(CALL)) and torch.equal(small(CALL), pruned(build(), sparsity=0.5)[0](CALL))


def test_groups_that_a_residual_ties_to_the_input_of_the_model_stay_as_they_are() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.b = Bottleneck(), nn.Conv2d(104, 104, 1, groups=13)

        def forward(self, x: Tensor) -> Any:
            y = self.b(x)
            return self.inner(x[:, :3]) + y.mean((1, 2, 3), keepdim=True)

    x = torch.randn(2, 104, 6, 6, dtype=torch.float64)
    model: Any = Residual().double().eval()
    small: Any = PassManager([{"prune-channels": {"sparsity": 0.5}}], progress=False).run(model, x)
    assert small.inner.b.groups == 7 and small(x).shape == model(x).shape


def test_groups_of_channels_in_any_order_go_whole_and_are_proved() -> None:
    class Picked(Bottleneck):
        order: Tensor

        def __init__(self) -> None:
            super().__init__(groups=8, width=4)
            self.register_buffer("order", torch.randperm(32))

        def forward(self, x: Tensor) -> Any:
            return self.c(F.relu(self.b(F.relu(self.a(x))[:, self.order])))

    torch.manual_seed(0)
    model: Any = Picked().double().eval()
    small, manager = pruned(model, sparsity=0.5, whole_groups=["b"], round_to=1)
    left = kept_groups(model, small, 4)
    assert small.b.groups == 4 and any("proved" in remark.reason for remark in manager.ledger.remarks("prune-channels"))
    rows = torch.cat([model.order[4 * group : 4 * group + 4] for group in left]).sort().values
    assert torch.equal(small.a.weight, model.a.weight[rows])
    gone = [4 * group + i for group in range(8) if group not in left for i in range(4)]
    with torch.no_grad():
        model.c.weight[:, gone] = 0
    assert torch.allclose(small(CALL), model(CALL), rtol=0, atol=1e-12)
