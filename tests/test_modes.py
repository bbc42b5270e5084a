"""Code that asks for training mode: what it switches still switches in the graph, and nothing else is lost silently."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress import QATQuantizer, coverage, load, save
from fxcompress.graph import ops, trace


class NormAct(nn.BatchNorm2d):
    """Batch normalisation with its activation, written out as libraries of vision models do."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4 dimensions, got {x.ndim}")
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        live = True if self.training else self.running_mean is None
        momentum: Any = self.momentum
        mean, variance = self.running_mean, self.running_var
        return self.act(F.batch_norm(x, mean, variance, self.weight, self.bias, live, momentum, self.eps))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, bias=False), NormAct(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 1), NormAct(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        x = 0 + self.norm2(self.conv2(x)) * 1
        return self.head(x.mean((2, 3)))


class Dropping(nn.Module):
    def __init__(self, function: Any = F.dropout) -> None:
        super().__init__()
        self.function, self.inner = function, nn.Linear(8, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner(x), 0.25, training=self.training)


def images(seed: int = 0, count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def lived(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model.train()
    for seed in range(3):
        model(images(seed))
    return model.eval()


def notes(model: Any) -> list[str]:
    return [rung.module for rung in model.meta["rungs"] if "mode" in rung.reason]


@pytest.mark.parametrize("training", [False, True])
def test_a_graph_trains_as_the_model_whose_normalisation_is_code(training: bool) -> None:
    model = lived(Net()).double().train(training)
    graph = trace(model, images().double())
    assert list(graph.state_dict()) == list(model.state_dict())
    assert not notes(graph)
    for mode in (True, False):
        model.train(mode), graph.train(mode)
        for seed in (5, 6):
            batch = images(seed).double()
            results = [part(batch) for part in (model, graph)]
            assert torch.allclose(results[0], results[1], rtol=1e-12, atol=1e-12)
        grads = [
            torch.autograd.grad(r.square().sum(), list(m.parameters())) for r, m in zip(results, (model, graph), strict=True)
        ]
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*grads, strict=True))
    kept = graph.state_dict()
    assert all(torch.allclose(value, kept[name], rtol=1e-12) for name, value in model.state_dict().items())
    assert kept["norm.num_batches_tracked"] == 5


def test_normalisation_that_is_code_folds_past_a_question_about_its_shape() -> None:
    model = lived(Net())
    graph = fxcompress.PassManager(["remove-dead", "fold-batchnorm", "fuse-activations"]).run(model, images())
    kinds = [ops.kind(node) for node in graph.graph.nodes]
    assert "batch_norm" not in kinds and "relu" not in kinds and "add" not in kinds and "mul" not in kinds
    assert torch.allclose(graph(images(7)), model(images(7)), atol=1e-5)


def test_it_is_live_in_quantization_aware_training_and_all_integers_afterwards() -> None:
    model, quantizer = lived(Net()), QATQuantizer()
    prepared = quantizer.prepare(model.train(), images())
    before = prepared.get_buffer("norm.running_mean").clone()
    for seed in range(4):
        prepared(images(seed)).square().mean().backward()
    assert not torch.equal(before, prepared.get_buffer("norm.running_mean"))
    converted = quantizer.convert(prepared)
    assert coverage(converted).mac_share == 1.0
    assert "batch_norm" not in {ops.kind(node) for node in converted.graph.nodes}


def test_it_is_pruned_and_saved(tmp_path: Any) -> None:
    model = lived(Net())
    small = fxcompress.PassManager([{"prune-channels": {"sparsity": 0.5}}]).run(model, images())
    assert small.get_submodule("norm").num_features == 3
    fxcompress.save(small, tmp_path / "small")
    again = fxcompress.load(tmp_path / "small")
    assert torch.equal(again(images(3)), small(images(3)))
    assert not torch.equal(again.train()(images(3)), again.eval()(images(3)))


@pytest.mark.parametrize(
    ("function", "layer"),
    [
        (F.dropout, nn.Dropout),
        (F.dropout1d, nn.Dropout1d),
        (F.alpha_dropout, nn.AlphaDropout),
        (lambda x, p, training: torch.dropout(x, p, training), nn.Dropout),
    ],
)
def test_dropout_that_is_code_drops_in_training_only(function: Any, layer: type[nn.Module]) -> None:
    model = nn.Sequential(Dropping(function), nn.ReLU()).eval()
    batch = torch.ones(3, 5, 8)
    graph = trace(model, batch)
    assert type(graph.get_submodule("0.dropout")) is layer
    assert graph.get_submodule("0.dropout").p == 0.25
    assert torch.equal(graph(batch), model(batch))
    graph.train(), model.train()
    results = []
    for part in (graph, model):
        torch.manual_seed(3)
        results.append(part(batch))
    assert torch.equal(*results) and not torch.equal(results[0], graph.eval()(batch))
    assert not notes(graph)


def test_dropout_of_the_model_itself_and_twice() -> None:
    class Twice(Dropping):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.inner(F.dropout(x, training=self.training)), 0.1, self.training)

    graph = trace(Twice().eval(), torch.ones(3, 8)).train()
    found = {name: part.p for name, part in graph.named_modules() if isinstance(part, nn.Dropout)}
    assert found == {"dropout": 0.5, "dropout_1": 0.1}


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Dropping(), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        return (self.second(x), x) if self.training else self.second(x)


def test_what_else_differs_between_the_modes_is_said() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return x + torch.randn_like(x) if self.training else x

    assert notes(trace(nn.Sequential(Noisy(8, 8), nn.Linear(8, 2)).eval(), torch.ones(3, 8))) == ["0"]
    assert notes(trace(nn.Sequential(nn.Dropout(), nn.BatchNorm1d(8), nn.Linear(8, 2)).eval(), torch.ones(3, 8))) == []


def test_a_mode_that_cannot_be_traced_is_said() -> None:
    class Demanding(nn.Linear):
        def forward(self, x: Tensor, targets: Any = None) -> Tensor:
            if self.training and targets is None:
                raise ValueError("training needs targets")
            return super().forward(x)

    assert notes(trace(Demanding(8, 2).eval(), torch.ones(3, 8))) == [""]


def test_a_constant_flag_stays_what_it_is() -> None:
    class Sampling(Dropping):
        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(self.inner(x), 0.5, training=True)
            return x * 1 if self.training else x

    graph = trace(Sampling().eval(), torch.ones(3, 8))
    assert not [part for part in graph.modules() if isinstance(part, nn.Dropout)]
    assert not torch.equal(graph(torch.ones(3, 8)), graph(torch.ones(3, 8)))


def test_a_model_that_freezes_its_normalisation_in_train_is_heeded() -> None:
    class Frozen(Net):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self.norm.training = self.norm2.training = False
            return self

    model = Frozen().eval()
    graph = trace(model, images()).train()
    before = copy.deepcopy(graph.state_dict())
    graph(images(1))
    assert all(torch.equal(value, before[name]) for name, value in graph.state_dict().items())
    assert not hasattr(nn.Module, "training")


class DropPath(nn.Module):
    """Stochastic depth as timm writes it."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)


class FlooredDropPath(DropPath):
    """Stochastic depth as transformers writes it."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = keep + torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype)
        return x.div(keep) * mask.floor_()


class UnscaledDropPath(DropPath):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(x.shape[0], 1).ge(self.drop_prob) if self.training else x


class Residual(nn.Module):
    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.inner, self.drop = nn.Linear(8, 8), drop

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.inner(x))


@pytest.mark.parametrize("cls", [DropPath, FlooredDropPath])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_stochastic_depth_that_is_code_drops_in_training_only(cls: Any, share: float, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, batch = Residual(cls(share)).eval(), torch.rand(2000, 8) + 1
    graph = trace(model, batch)
    assert graph.get_submodule("drop").p == share and not notes(graph)
    assert torch.equal(graph(batch), model(batch))
    prepared = QATQuantizer().prepare(model.train(), batch)
    save(prepared, tmp_path / "model")
    for training in (graph.train(), prepared.train(), load(tmp_path / "model").train()):
        added = (training(batch) - batch).abs().amax(1)
        kept = (added > 0.05).float().mean()
        assert abs(float(kept) - (1 - share)) < 0.06
    quantized = QATQuantizer().convert(prepared.eval())
    assert torch.equal(quantized(batch), quantized(batch))


def test_stochastic_depth_of_timm_drops_the_very_same_samples() -> None:
    model = Residual(DropPath(0.3)).train()
    graph, batch = trace(model, torch.rand(64, 8)), torch.rand(64, 8)
    torch.manual_seed(5)
    expected = model(batch)
    torch.manual_seed(5)
    assert torch.equal(graph(batch), expected)


def test_what_only_looks_like_stochastic_depth_is_said() -> None:
    assert notes(trace(Residual(UnscaledDropPath(0.5)).eval(), torch.rand(4, 8)))
