"""What masks go on and what they survive: training, copies, processes, saving, tied and functional weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress import PassManager, load, save, trace
from fxcompress.errors import ConfigError
from fxcompress.pruning import MagnitudePruner, RandomPruner
from fxcompress.pruning.masks import smallest
from fxcompress.pruning.prunable import sites
from tests.replicas import on_two

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {name: site.value() == 0 for name, site in sites(model).items()}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 15, *, autocast: bool = False) -> None:
    for step in range(steps):
        batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = (model(batch).float() - batch.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.05, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("mask_first", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_no_optimizer_step_regrows_a_masked_weight(name: str, mask_first: bool, autocast: bool) -> None:
    model, pruner = network(), MagnitudePruner(0.6)
    optimizer = None if mask_first else OPTIMIZERS[name](model.parameters())
    if optimizer is not None:
        train(model, optimizer, 3)  # momentum is there before the masks are
    pruner.apply_mask(model)
    before, weights = zeros(model), {name: site.value().clone() for name, site in sites(model).items()}
    train(model, optimizer or OPTIMIZERS[name](model.parameters()), autocast=autocast)
    for layer, site in sites(model).items():
        value = site.value()
        assert (value[before[layer]] == 0).all()
        kept = ~before[layer]
        assert not torch.equal(value[kept], weights[layer][kept])
    pruner.remove_mask(model)
    assert all((site.value()[before[layer]] == 0).all() for layer, site in sites(model).items())


def test_the_dense_weight_under_a_mask_gets_no_gradient() -> None:
    model = network()
    MagnitudePruner(0.5).apply_mask(model)
    model(X).square().mean().backward()
    for site in sites(model).values():
        gradient = site.dense().grad
        assert gradient is not None
        assert (gradient[~site.masks()[0].mask] == 0).all() and (gradient != 0).any()


def test_a_copy_has_its_own_masks_and_baking_it_leaves_the_original_masked() -> None:
    model, pruner = network().eval(), MagnitudePruner(0.5)
    pruner.apply_mask(model)
    twin = copy.deepcopy(model)
    pruner.remove_mask(twin)
    assert all(site.masks() for site in sites(model).values()) and not any(site.masks() for site in sites(twin).values())
    assert torch.equal(model(X), twin(X))
    third = copy.deepcopy(model)
    pruner.apply_mask(third, 0.9)
    assert pruner.get_sparsity(model) == pytest.approx(0.5, abs=1 / 256)


def test_baking_keeps_the_parameters_and_their_order_so_that_optimizers_go_on() -> None:
    model, pruner = network(), MagnitudePruner(0.5)
    before = [(name, id(p)) for name, p in model.named_parameters()]
    pruner.apply_mask(model)
    assert {id(p) for p in model.parameters()} == {key for _, key in before}
    pruner.remove_mask(model)
    assert [(name, id(p)) for name, p in model.named_parameters()] == before


def test_masked_state_loads_into_a_masked_model_with_weights_only(tmp_path: Path) -> None:
    model, fresh = network().eval(), network().eval()
    MagnitudePruner(0.7).apply_mask(model)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    MagnitudePruner(0.1).apply_mask(fresh)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(fresh(X), model(X))
    assert MagnitudePruner().get_sparsity(fresh) == MagnitudePruner().get_sparsity(model)


def _replica(rank: int, folder: Path) -> None:
    found = {}
    for mask_first in (True, False):
        model: Any = network()
        pruner = MagnitudePruner(0.5, exclude_layers=["5"])
        if mask_first:
            pruner.apply_mask(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
        if not mask_first:
            pruner.apply_mask(wrapped)
        before = zeros(wrapped)
        for step in range(6):
            batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * step + rank))
            wrapped(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 3:
                pruner.apply_mask(wrapped, 0.8)
        assert all((zeros(wrapped)[name] | ~was).all() for name, was in before.items())
        sparsity = pruner.get_sparsity(wrapped)
        pruner.remove_mask(wrapped)
        wrapped(batch).square().mean().backward()
        found[str(mask_first)] = {"state": model.state_dict(), "sparsity": sparsity}
    torch.save(found, folder / f"{rank}.pt")


def test_masks_hold_under_two_ddp_processes_and_agree(tmp_path: Path) -> None:
    on_two(_replica, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for case in ("True", "False"):
        assert first[case]["sparsity"] == second[case]["sparsity"] == pytest.approx(0.8, abs=1 / 224)
        state, other = first[case]["state"], second[case]["state"]
        assert all(torch.equal(state[key], other[key]) for key in state if "running" not in key)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_compiled_models_train_under_masks_and_take_new_masks(backend: str) -> None:
    torch._dynamo.reset()
    model, pruner = network(), MagnitudePruner(0.5)
    pruner.apply_mask(model)
    compiled: Any = torch.compile(model, backend=backend)
    train(compiled, torch.optim.SGD(compiled.parameters(), 0.05, momentum=0.9), 4)
    before = zeros(model)
    pruner.apply_mask(compiled, 0.8)
    assert pruner.get_sparsity(compiled) == pytest.approx(0.8, abs=1 / 256)
    assert all((zeros(model)[name] | ~was).all() for name, was in before.items())
    model.eval()
    assert torch.allclose(compiled(X), model(X), atol=1e-5)


class TiedLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


class TiedHead(nn.Module):
    """An embedding whose weight is the head's, as language models have it."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 6)
        self.mid = nn.Linear(6, 6)
        self.functional = functional
        if not functional:
            self.head = nn.Linear(6, 10, bias=False)
            self.head.weight = self.emb.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.mid(self.emb((x > 0).long().sum(1)))
        return F.linear(h, self.emb.weight) if self.functional else self.head(h)


@pytest.mark.parametrize("make", [TiedLinears, lambda: TiedHead(False), lambda: TiedHead(True)])
@pytest.mark.parametrize("traced", [True, False])
def test_a_tied_weight_counts_once_and_is_masked_wherever_it_is_read(make: Callable[[], nn.Module], traced: bool) -> None:
    torch.manual_seed(0)
    model: Any = make().eval()
    if not traced and isinstance(model, TiedHead) and model.functional:
        pytest.skip("only a graph shows what a function reads")
    original = {id(p): p.detach().clone() for p in model.parameters() if p.dim() > 1}
    total = sum(p.numel() for p in original.values())
    model = trace(model, X) if traced else model
    weights = [p for p in model.parameters() if p.dim() > 1]
    pruner = MagnitudePruner(0.5)
    pruner.apply_mask(model)
    dropped = sum(int((site.value() == 0).sum()) for site in sites(model).values())
    assert dropped == round(0.5 * total) and pruner.get_sparsity(model) == dropped / total
    masked = model(X)
    pruner.remove_mask(model)
    assert torch.equal(model(X), masked)
    assert sum(int((p == 0).sum()) for p in weights) == dropped
    if isinstance(model, TiedLinears):
        assert model.a.weight is model.b.weight


class Functional(nn.Module):
    """Weights that functions read."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 4, 3))
        self.w = nn.Parameter(torch.randn(5, 8))
        self.inner = nn.Linear(5, 4)
        self.m = nn.Parameter(torch.randn(4, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("table", torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv1d(x, self.kernel).mean(2)
        x = self.inner(F.linear(x, self.w))
        return (x @ self.m) * self.scale @ self.table  # type: ignore[operator]


def test_weights_that_functions_read_are_masked_baked_and_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Functional().eval(), torch.randn(2, 4, 9)
    pruner = MagnitudePruner(0.5)
    result = pruner.prune(model)
    expected = {"kernel", "w", "inner", "m"}
    assert set(sites(result)) == expected
    total = 8 * 4 * 3 + 5 * 8 + 5 * 4 + 16
    assert pruner.get_sparsity(result) == round(0.5 * total) / total
    assert pruner.ledger.rows[-1].sparsity > 0
    reference = copy.deepcopy(model)
    for name, site in sites(result).items():
        weight = reference.get_parameter(name if name != "inner" else "inner.weight")
        weight.data.copy_(site.value())
    assert torch.equal(result(x), reference(x))
    assert set(dict(model.named_parameters())) - {"inner.weight"} <= set(dict(result.named_parameters()))
    save(result, tmp_path / "masked")
    loaded = load(tmp_path / "masked")
    assert torch.equal(loaded(x), result(x))
    pruner.apply_mask(loaded, 0.75)
    assert pruner.get_sparsity(loaded) == round(0.75 * total) / total
    baked = PassManager(["bake-masks"]).run(loaded, x)
    assert torch.equal(baked(x), loaded(x))
    assert set(baked.state_dict()) == set(trace(model, x).state_dict())


class Branching(nn.Module):
    """Control flow on a shape, which symbolic tracing cannot take."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.shape[0] > 1 else self.fc(x) * 2


def test_layers_inside_an_exported_part_are_masked_under_their_names() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Branching(), nn.Linear(8, 4)).eval()
    manager = PassManager([{"mask-weights": {"sparsity": 0.5}}])
    result = manager.run(model, X)
    assert set(sites(result)) == {"0.fc", "1"}
    assert MagnitudePruner().get_sparsity(result) == 0.5
    excluding = MagnitudePruner(0.5, exclude_layers=["0.fc"])
    graph = trace(model, X)
    excluding.apply_mask(graph)
    assert (sites(graph)["0.fc"].value() != 0).all()


@pytest.mark.parametrize("sparsity", [0.1, 0.37, 0.5, 0.9])
def test_counts_are_exact_across_dtypes_and_ties(sparsity: float) -> None:
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    model = nn.Sequential(*(nn.Linear(7, 5, dtype=dtype) for dtype in dtypes))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.randint(-2, 3, (5, 7)))  # type: ignore[operator, union-attr]
    for pruner in (MagnitudePruner(sparsity), RandomPruner(sparsity), MagnitudePruner(sparsity, criterion="l2")):
        masked = copy.deepcopy(model)
        pruner.apply_mask(masked)
        dropped = sum(int((~site.masks()[0].mask).sum()) for site in sites(masked).values())
        assert dropped == round(sparsity * 140)
        assert [site.value().dtype for site in sites(masked).values()] == dtypes


def test_float64_scores_rank_beyond_float32_and_tiny_ones_do_not_tie() -> None:
    values = torch.tensor([1.0 + 3e-12, 1.0 + 1e-12, 1.0 + 2e-12, 1.0 + 4e-12], dtype=torch.float64)
    assert smallest([values], 0.5)[0].tolist() == [True, False, False, True]
    layer = nn.Linear(4, 1)
    layer.weight.data = torch.tensor([[1e-30, 3e-30, 2e-30, 4e-30]])
    assert MagnitudePruner(0.5, criterion="l2").compute_mask(layer).tolist() == [[False, True, False, True]]


def test_more_sparsity_keeps_what_is_dropped_and_less_ranks_the_dense_weights_anew() -> None:
    scores = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    present = torch.tensor([False, True, False, True, True, True])
    assert smallest([scores], 0.5, [present])[0].tolist() == [False, False, False, True, True, True]
    assert smallest([scores], 1 / 6, [present])[0].tolist() == [True, False, True, True, True, True]


def test_empty_weights_are_skipped_by_name_and_integer_and_recurrent_ones_too() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Linear(4, 0)
    model = nn.Sequential(nn.Linear(6, 4), empty, nn.LSTM(4, 4), nn.MultiheadAttention(4, 2), nn.Bilinear(2, 2, 2))
    reasons: dict[str, str] = {}
    found = sites(model, skip=reasons.setdefault)  # type: ignore[arg-type]
    assert set(found) == {"0", "3.out_proj"}
    assert set(reasons) == {"1", "2", "3", "4"}
    assert "shape (0, 4)" in reasons["1"]


def test_weights_without_values_are_an_error() -> None:
    with pytest.raises(ConfigError, match="'0' has no values yet"):
        MagnitudePruner().apply_mask(nn.Sequential(nn.Linear(2, 2, device="meta")))
    with pytest.raises(ConfigError, match="'0' has no values yet"):
        MagnitudePruner().apply_mask(nn.Sequential(nn.LazyLinear(2)))


def test_a_weight_that_another_parametrization_computes_is_masked_after_it() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.Linear(4, 2)).eval()
    before = model[0].weight.clone()
    pruner = MagnitudePruner(0.5)
    pruner.apply_mask(model)
    assert pruner.get_sparsity(model) == 0.5
    mask = sites(model)["0"].masks()[0].mask
    assert torch.equal(model[0].weight, torch.where(mask, before, 0))
    masked = model(X)
    pruner.remove_mask(model)
    assert torch.equal(model(X), masked)


def test_a_weight_that_torchs_own_pruning_holds_is_left_alone_by_name() -> None:
    from torch.nn.utils import prune

    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    prune.l1_unstructured(model[0], "weight", 3)
    reasons: dict[str, str] = {}
    assert set(sites(model, skip=reasons.setdefault)) == {"1"}  # type: ignore[arg-type]
    assert "computed by a hook" in reasons["0"]


@pytest.mark.parametrize(
    ("layer", "dim"),
    [
        (nn.Conv2d(8, 4, 3), 1),
        (nn.Conv1d(8, 4, 3, groups=2), 1),
        (nn.ConvTranspose2d(8, 4, 3), 0),
        (nn.ConvTranspose1d(8, 4, 2, groups=2), 0),
        (nn.Linear(8, 4), 1),
    ],
)
def test_n_of_m_runs_along_the_inputs_of_every_kind_of_layer(layer: Any, dim: int) -> None:
    mask = MagnitudePruner(pruning_type="semi_structured").compute_mask(layer)
    assert (mask.movedim(dim, -1).reshape(-1, 4).sum(1) == 2).all()


def test_n_of_m_that_no_layer_can_take_is_an_error_with_the_reasons() -> None:
    with pytest.raises(ConfigError, match=r"'0': its 6 inputs are not a multiple of 4"):
        MagnitudePruner(pruning_type="semi_structured").prune(nn.Sequential(nn.Linear(6, 3)))
    with pytest.raises(ConfigError, match="2 inputs are not a multiple"):
        MagnitudePruner(pruning_type="semi_structured").compute_mask(nn.ConvTranspose1d(4, 4, 2, groups=2))


def test_biases_norms_and_buffers_are_neither_pruned_nor_counted() -> None:
    model: Any = network()
    model[1].running_mean.zero_()
    model[3].bias.data.zero_()
    assert MagnitudePruner().get_sparsity(model) == 0.0
    MagnitudePruner(0.9).apply_mask(model)
    assert (model[1].weight != 0).all() and (model[0].bias != 0).all()


def test_a_masked_model_saves_pickles_and_goes_on_training_when_read_back(tmp_path: Path) -> None:
    result = MagnitudePruner(0.6).prune(network().eval())
    save(result, tmp_path / "masked")
    for again in (load(tmp_path / "masked"), pickle.loads(pickle.dumps(result))):
        assert torch.equal(again(X), result(X))
        assert set(again.state_dict()) == set(result.state_dict())
        before = zeros(again)
        again.train()
        train(again, torch.optim.SGD(again.parameters(), 0.05, momentum=0.9))
        assert all((zeros(again)[name] | ~was).all() for name, was in before.items())
        MagnitudePruner().apply_mask(again, 0.8)
        assert MagnitudePruner().get_sparsity(again) == pytest.approx(0.8, abs=1 / 256)


class Loop(nn.Module):
    """A loop on a value: an island, whatever is tried."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        while x.sum() > 1e3:
            x = x / 2
        return self.fc(x)


def test_masks_inside_an_island_are_saved_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Loop(), nn.Linear(6, 4)).eval()
    result = PassManager([{"mask-weights": {"sparsity": 0.5}}], reproducer=False).run(model, X)
    assert MagnitudePruner().get_sparsity(result) == 0.5
    save(result, tmp_path / "model")
    loaded = load(tmp_path / "model", modules={"0": Loop()})
    assert torch.equal(loaded(X), result(X))
    assert MagnitudePruner().get_sparsity(loaded) == 0.5


def test_a_masked_graph_exports_with_its_zeros() -> None:
    result = MagnitudePruner(0.5).prune(network().eval())
    program: Any = torch.export.export(result, (X,)).module()
    assert torch.equal(program(X), result(X))
