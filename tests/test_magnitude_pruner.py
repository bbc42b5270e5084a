"""Masks: exact counts under ties, N:M, what they survive, and composition with the other passes."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxcompress import CRITERIA, PassManager, load, save
from fxcompress.errors import ConfigError, PlanError
from fxcompress.pruning import L1UnstructuredPruner, MagnitudePruner, RandomPruner
from fxcompress.pruning.masks import n_of_m, smallest

common = settings(deadline=None, max_examples=60)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.Flatten(),
        nn.Linear(32, 6),
    ).eval()


X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
tied = st.lists(st.lists(st.sampled_from([0.0, 0.5, 0.5, 1.0, 3.0, 1e-30]), min_size=1, max_size=30), min_size=1, max_size=4)


@given(tied, st.floats(0, 0.999))
@common
def test_exactly_the_smallest_go_and_ties_go_in_order(lists: list[list[float]], sparsity: float) -> None:
    tensors = [torch.tensor(values) for values in lists]
    kept = np.concatenate([mask.numpy() for mask in smallest(tensors, sparsity)])
    flat = np.concatenate([np.array(values, dtype=np.float32) for values in lists])
    expected = np.ones(len(flat), dtype=bool)
    expected[np.argsort(flat, kind="stable")[: round(sparsity * len(flat))]] = False
    assert (kept == expected).all()


@given(st.integers(0, 2**16), st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)]), st.booleans())
@common
def test_n_of_every_m_stay_whatever_the_ties(seed: int, n_m: tuple[int, int], ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(5, 16, 3, generator=generator)
    scores = (scores * 3).floor() if ties else scores
    mask = n_of_m(scores, *n_m).movedim(1, -1).reshape(-1, n_m[1])
    rows = scores.movedim(1, -1).reshape(-1, n_m[1]).numpy()
    assert (mask.sum(1) == n_m[0]).all()
    for row, kept in zip(rows, mask.numpy(), strict=True):
        assert set(np.flatnonzero(kept)) == set(np.argsort(-row, kind="stable")[: n_m[0]])


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("pruner", [MagnitudePruner, L1UnstructuredPruner, RandomPruner])
def test_the_sparsity_reached_is_the_one_asked_to_one_weight(pruner: type[MagnitudePruner], sparsity: float) -> None:
    original = model()
    made = pruner(sparsity)
    result = made.prune(original)
    total = sum(m.weight.numel() for m in original.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    assert round(made.get_sparsity(result) * total) == round(sparsity * total)
    assert made.get_sparsity(original) == 0.0
    baked = PassManager(["bake-masks"]).run(result, X)
    assert made.get_sparsity(baked) == made.get_sparsity(result)
    assert torch.equal(baked(X), result(X))


def test_a_registered_criterion_ranks_single_weights() -> None:
    @CRITERIA.register("test-nearest-to-half")
    def nearest(slices: Tensor, name: str) -> Tensor:
        return (slices.flatten(1) - 0.5).abs().sum(1)

    @CRITERIA.register("test-signed")
    def signed(slices: Tensor, name: str) -> Tensor:
        return slices.flatten(1).sum(1)

    dense = model()
    small = MagnitudePruner(0.3, criterion="test-nearest-to-half").prune(dense)
    weights = [
        (m.weight.detach(), small.get_submodule(n).weight)
        for n, m in dense.named_modules()
        if isinstance(m, (nn.Conv2d, nn.Linear))
    ]
    kept = torch.cat([(w - 0.5).abs()[masked != 0] for w, masked in weights])
    gone = torch.cat([(w - 0.5).abs()[masked == 0] for w, masked in weights])
    assert len(gone) == round(0.3 * (len(gone) + len(kept))) and gone.max() <= kept.min()
    mask = MagnitudePruner(pruning_type="semi_structured", criterion="test-nearest-to-half").compute_mask(nn.Linear(8, 2))
    assert mask.unflatten(1, (-1, 4)).sum(2).eq(2).all()
    with pytest.raises(ConfigError, match="gave scores below 0 for"):
        MagnitudePruner(0.3, criterion="test-signed").prune(dense)
    with pytest.raises(ConfigError, match=r"'taylor' for single weights. That one ranks whole channels"):
        MagnitudePruner(criterion="taylor")


def test_l1_and_l2_rank_alike_and_random_is_reproducible() -> None:
    masks = [MagnitudePruner(criterion=c).compute_mask(model()[0]) for c in ("l1", "l2")]
    assert torch.equal(*masks)
    layer = model()[5]
    assert torch.equal(RandomPruner(seed=3).compute_mask(layer), RandomPruner(seed=3).compute_mask(layer))
    assert not torch.equal(RandomPruner(seed=3).compute_mask(layer), RandomPruner(seed=4).compute_mask(layer))


def test_two_of_four_along_inputs_and_what_does_not_divide_stays_dense() -> None:
    pruner = MagnitudePruner(pruning_type="semi_structured")
    result: Any = pruner.prune(model())
    for layer in (result.get_submodule("0"), result.get_submodule("5")):
        groups = layer.weight.movedim(1, -1).reshape(-1, 4)
        assert ((groups != 0).sum(1) == 2).all()
    assert (result.get_submodule("3").weight != 0).all()
    assert [(r.node, "not a multiple of 4" in r.reason) for r in pruner.ledger.remarks("mask-weights")] == [("3", True)]


def test_masks_survive_training_deepcopy_state_and_growing_sparsity() -> None:
    net, pruner = model().train(), MagnitudePruner(0.5)
    pruner.apply_mask(net)
    optimizer = torch.optim.Adam(net.parameters(), 0.1)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(X).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert pruner.get_sparsity(net) >= 0.5
    before = {name: layer.weight == 0 for name, layer in net.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    pruner.apply_mask(net, 0.75)
    after = {name: layer.weight == 0 for name, layer in net.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    assert all((after[name] | ~before[name]).all() for name in before)
    again = model().train()
    pruner.apply_mask(again)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.eval()(X), net.eval()(X))
    assert torch.equal(copy.deepcopy(net)(X), net(X))
    pruner.remove_mask(net)
    assert set(net.state_dict()) == set(model().state_dict())
    assert torch.equal(again(X), net(X))


def test_tied_weights_are_counted_and_masked_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    result = MagnitudePruner(0.5).prune(Tied())
    assert MagnitudePruner().get_sparsity(result) == 0.5


def test_masked_then_baked_then_quantized_keeps_its_zeros_and_saves(tmp_path: Any) -> None:
    plan = [{"mask-weights": {"sparsity": 0.5}}, "bake-masks", "fold-batchnorm", "fuse-activations"]
    plan += ["insert-observers", "calibrate", "fold-quantization", "lower"]
    manager = PassManager(plan)
    result = manager.run(model(), data=[X])
    assert manager.ledger.rows[-1].sparsity >= 0.5
    save(result, tmp_path / "model")
    assert torch.equal(load(tmp_path / "model")(X), result(X))


def test_masks_that_are_not_baked_stay_in_float_by_name_when_quantized() -> None:
    plan = [{"mask-weights": {"include_layers": ["5"]}}, "insert-observers", "calibrate", "fold-quantization", "lower"]
    manager = PassManager(plan)
    result = manager.run(model(), data=[X])
    reasons = {remark.node: remark.reason for remark in manager.ledger.remarks("insert-observers")}
    assert "'settle-weights' makes that permanent" in reasons["5"]
    assert MagnitudePruner(include_layers=["5"]).get_sparsity(result) == 0.5


def test_selection_takes_only_what_is_named() -> None:
    result: Any = MagnitudePruner(0.5, exclude_layers=["0", "3"]).prune(model())
    assert (result.get_submodule("0").weight != 0).all()
    assert (result.get_submodule("5").weight == 0).sum() == 96
    with pytest.raises(ConfigError, match="no layer is called 'head'"):
        MagnitudePruner(exclude_layers=["head"]).prune(model())


@pytest.mark.parametrize(
    "options",
    [{"sparsity": 1.0}, {"sparsity": -0.1}, {"sparsity": True}, {"pruning_type": "blocks"}, {"criterion": "l3"}, {"n": 4}],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        MagnitudePruner(**options)


def test_weights_that_are_not_finite_and_models_without_weights_are_refused() -> None:
    broken = model()
    with torch.no_grad():
        broken[0].weight[0] = torch.nan  # type: ignore[operator, index]
    with pytest.raises(ConfigError, match="NaN"):
        MagnitudePruner().prune(broken)
    with pytest.raises(ConfigError, match="no chosen layer has a weight that can be masked"):
        MagnitudePruner().prune(nn.ReLU())
    with pytest.raises(ConfigError, match="no prunable weight"):
        MagnitudePruner().compute_mask(nn.ReLU())
    with pytest.raises(PlanError, match="less than 1"):
        PassManager([{"mask-weights": {"sparsity": 1.0}}])


@pytest.mark.parametrize("made", [MagnitudePruner, L1UnstructuredPruner, RandomPruner])
def test_what_a_pruner_was_made_with_can_be_read(made: type[MagnitudePruner]) -> None:
    names = {"exclude_layers": ["a"], "include_layers": ["b*"]}
    given: dict[str, Any] = {"sparsity": 0.25, "pruning_type": "semi_structured", "criterion": "l2", **names}
    pruner = made(**given)
    assert {name: getattr(pruner, name) for name in given} == given
    default = "random" if made is RandomPruner else "l1"
    assert made().criterion == inspect.signature(made).parameters["criterion"].default == default
    with pytest.raises(ConfigError, match="exclude_layers is 'conv1'; it is a list of layer names"):
        made(exclude_layers="conv1")
    with pytest.raises(ConfigError, match="whole numbers"):
        made(n=1.5, m=4)  # type: ignore[arg-type]
    for call in (made().apply_mask, made().remove_mask, made().get_sparsity, made().compute_mask):
        with pytest.raises(ConfigError, match="the model is a NoneType"):
            call(None)  # type: ignore[arg-type]
