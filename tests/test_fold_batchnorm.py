"""fold-batchnorm and fuse-activations: every layer kind and spelling, against float64, and what must be left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress import PassManager, QATQuantizer
from fxcompress.graph import kind

LAYERS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 7, 7)),
    "conv3d": (nn.Conv3d(2, 3, 3), nn.BatchNorm3d(3, affine=False), (1, 2, 5, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "linear": (nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), (3, 5)),
}


def settled(norm: nn.Module) -> nn.Module:
    for name, tensor in norm.state_dict().items():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5) if "var" in name or "weight" in name else nn.init.normal_(tensor)
    return norm.eval()


def run(model: nn.Module, x: Tensor, *steps: Any) -> tuple[Any, PassManager]:
    manager = PassManager(list(steps), reproducer=False)
    return manager.run(model, x), manager


def kinds(module: Any) -> list[str]:
    return [kind(node) for node in module.graph.nodes if node.op.startswith("call")]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("spelling", ["module", "functional"])
def test_folded_weights_compute_what_float64_computes(name: str, spelling: str) -> None:
    torch.manual_seed(0)
    layer, norm, shape = LAYERS[name]
    settled(norm)
    x = torch.randn(shape)

    class Spelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = layer, norm

        def forward(self, x: Tensor) -> Tensor:
            if spelling == "module":
                return self.norm(self.layer(x))
            own: Any = self.layer
            stats: Any = self.norm
            if name == "linear":
                y = F.linear(x, own.weight, own.bias)
            elif name == "transposed":
                y = F.conv_transpose2d(x, own.weight, own.bias, 2, 0, 0, 2)
            else:
                y = getattr(F, name)(x, own.weight, own.bias, groups=own.groups)
            return F.batch_norm(y, stats.running_mean, stats.running_var, stats.weight, stats.bias, eps=stats.eps)

    folded, _ = run(Spelled().eval(), x, "fold-batchnorm")
    assert "batch_norm" not in kinds(folded)
    with torch.no_grad():
        exact = norm.double()(layer.double()(x.double()))
    layer.float(), norm.float()
    assert torch.allclose(folded(x).double(), exact, rtol=1e-5, atol=1e-5)
    assert "layer.weight" in dict(folded.named_parameters())


class Twice(nn.Module):
    """One convolution called twice, its results normalised by one norm or by two."""

    def __init__(self, norms: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norms = nn.ModuleList(settled(nn.BatchNorm2d(3)) for _ in range(norms))

    def forward(self, x: Tensor) -> Tensor:
        return self.norms[0](self.conv(x)) + self.norms[-1](self.conv(x + 1))


def test_weights_that_calls_share_are_folded_only_where_all_agree() -> None:
    x = torch.randn(1, 3, 4, 4)
    same, _ = run(Twice(1).eval(), x, "fold-batchnorm")
    assert kinds(same).count("batch_norm") == 0
    different, manager = run(Twice(2).eval(), x, "fold-batchnorm")
    assert kinds(different).count("batch_norm") == 2
    assert all("also used by" in remark.reason for remark in manager.ledger.remarks("fold-batchnorm"))


def test_tied_weights_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), settled(nn.BatchNorm2d(3)), nn.Conv2d(3, 3, 1))
    model[2].weight = model[0].weight
    result, manager = run(model.eval(), torch.randn(1, 3, 2, 2), "fold-batchnorm")
    assert kinds(result).count("batch_norm") == 1
    assert "tied" in manager.ledger.remarks("fold-batchnorm")[0].reason


LEFT: dict[str, tuple[nn.Module, str]] = {
    "training": (nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).train(), "training mode"),
    "no statistics": (
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)).eval(),
        "keeps no running",
    ),
    "after relu": (nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)).eval(), "follows 'relu'"),
    "parametrized": (
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)).eval(),
        "computed, not stored",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_folded_is_left_with_its_reason(name: str) -> None:
    model, reason = LEFT[name]
    result, manager = run(model, torch.randn(2, 3, 4, 4), "fold-batchnorm")
    assert kinds(result).count("batch_norm") == 1
    assert any(reason in remark.reason for remark in manager.ledger.remarks("fold-batchnorm"))


class Moved(nn.Module):
    """A layer and a normalisation with something between them, or behind both."""

    def __init__(self, layer: nn.Module, norm: nn.Module, code: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.norm, self.code = layer, settled(norm), code

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, x)


def levit(m: Any, x: Tensor) -> Tensor:
    y = m.layer(x)
    return m.norm(y.flatten(0, 1)).reshape_as(y)


MOVED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear, flattened, and back": (lambda: Moved(nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), levit), (3, 4, 5)),
    "linear, transposed": (
        lambda: Moved(nn.Linear(5, 6), nn.BatchNorm1d(6), lambda m, x: m.norm(m.layer(x).transpose(1, 2))),
        (3, 4, 5),
    ),
    "convolution, flattened": (
        lambda: Moved(nn.Conv2d(3, 6, 4), nn.BatchNorm1d(6), lambda m, x: m.norm(m.layer(x).flatten(1))),
        (2, 3, 4, 4),
    ),
    "convolution, its channels shuffled": (
        lambda: Moved(
            nn.Conv2d(3, 6, 1, bias=False),
            nn.BatchNorm2d(6),
            lambda m, x: m.norm(m.layer(x).unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2)),
        ),
        (2, 3, 4, 4),
    ),
    "transposed convolution, without a bias": (
        lambda: Moved(nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False), nn.BatchNorm1d(6), lambda m, x: m.norm(m.layer(x))),
        (2, 4, 5),
    ),
    "twice": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), settled(nn.BatchNorm2d(4)), settled(nn.BatchNorm2d(4))),
        (2, 3, 4, 4),
    ),
    "before a linear layer": (
        lambda: nn.Sequential(nn.ReLU(), settled(nn.BatchNorm1d(5)), nn.Dropout(), nn.Linear(5, 3, bias=False)),
        (4, 5),
    ),
    "before a grouped convolution": (
        lambda: nn.Sequential(nn.ReLU(), settled(nn.BatchNorm2d(4)), nn.Conv2d(4, 6, 3, groups=2)),
        (2, 4, 5, 5),
    ),
    "before a convolution that pads with what is there": (
        lambda: nn.Sequential(nn.ReLU(), settled(nn.BatchNorm2d(3)), nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect")),
        (2, 3, 5, 5),
    ),
    "before a linear layer on flattened images": (
        lambda: nn.Sequential(nn.ReLU(), settled(nn.BatchNorm2d(3)), nn.Flatten(), nn.Linear(48, 5)),
        (2, 3, 4, 4),
    ),
    "before a linear layer on tokens": (
        lambda: Moved(nn.Linear(5, 6), nn.BatchNorm1d(5), lambda m, x: m.layer(m.norm(x.relu().mT).mT)),
        (2, 4, 5),
    ),
}


@pytest.mark.parametrize("name", MOVED)
def test_normalisation_folds_past_what_moves_values_and_into_the_layer_after_it(name: str) -> None:
    torch.manual_seed(0)
    build, shape = MOVED[name]
    model, x = build().eval(), torch.randn(shape)
    folded, _ = run(model, x, {"remove-dead": {"dropout": True}}, "fold-batchnorm")
    assert "batch_norm" not in kinds(folded)
    for batch in (x, torch.randn(5, *shape[1:])):
        found = folded(batch).double()
        torch.testing.assert_close(found, model.double()(batch.double()), rtol=1e-5, atol=1e-5)
        model.float()


STAYS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "before zeros at the edges": (
        lambda: nn.Sequential(nn.ReLU(), settled(nn.BatchNorm2d(3)), nn.Conv2d(3, 4, 3, padding=1)),
        (2, 3, 5, 5),
        "pads with zeros",
    ),
    "before a transposed convolution": (
        lambda: nn.Sequential(nn.ReLU(), settled(nn.BatchNorm2d(3)), nn.ConvTranspose2d(3, 4, 3)),
        (2, 3, 5, 5),
        "no convolution or linear layer alone follows it",
    ),
    "over tokens": (
        lambda: nn.Sequential(nn.Linear(5, 6), settled(nn.BatchNorm1d(4))),
        (2, 4, 5),
        "another axis",
    ),
    "over more than channels": (
        lambda: nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), settled(nn.BatchNorm1d(32))),
        (2, 3, 4, 4),
        "several channels for an output",
    ),
    "read twice on the way": (
        lambda: Moved(nn.Linear(5, 6), nn.BatchNorm1d(6), lambda m, x: m.norm((y := m.layer(x)).mT) + y.mT),
        (2, 4, 5),
        "also used elsewhere",
    ),
    "its result read twice": (
        lambda: Moved(nn.Linear(5, 5), nn.BatchNorm1d(5), lambda m, x: m.layer(y := m.norm(x.relu())) + y),
        (4, 5),
        "no convolution or linear layer alone follows it",
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_normalisation_that_no_weight_can_take_stays(name: str) -> None:
    torch.manual_seed(0)
    build, shape, reason = STAYS[name]
    model, x = build().eval(), torch.randn(shape)
    result, manager = run(model, x, "fold-batchnorm")
    assert kinds(result).count("batch_norm") == 1
    assert torch.equal(result(x), model(x))
    assert any(reason in remark.reason for remark in manager.ledger.remarks("fold-batchnorm"))


@pytest.mark.parametrize("name", MOVED)
def test_conversion_keeps_what_training_saw_of_normalisation_that_is_not_beside_its_layer(name: str) -> None:
    torch.manual_seed(0)
    build, shape = MOVED[name]
    quantizer, x = QATQuantizer(), torch.randn(8, *shape[1:])
    prepared = quantizer.prepare(build().train(), x)
    prepared(x).square().mean().backward()
    prepared.eval()
    with torch.no_grad():
        expected, found = prepared(x), quantizer.convert(prepared, x)(x)
    assert ((expected - found).abs() <= expected.abs().max() / 60).double().mean() >= 0.999


def test_frozen_normalisation_folds() -> None:
    ops = pytest.importorskip("torchvision.ops")
    model = nn.Sequential(nn.Conv2d(3, 4, 1), settled(ops.FrozenBatchNorm2d(4)))
    x = torch.randn(2, 3, 4, 4)
    result, _ = run(model.eval(), x, "fold-batchnorm")
    assert kinds(result) == ["conv2d"]
    assert torch.allclose(result(x), model(x), atol=1e-5)


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "in place": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(0.0, 6.0),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(3, 4, 3), nn.Linear(6, 4)])
def test_an_activation_joins_its_layer_bit_for_bit(name: str, layer: nn.Module) -> None:
    x = 5 * torch.randn(2, 3, 6, 6)
    model = nn.Sequential(layer, ACTIVATIONS[name])
    result, _ = run(model, x, "fuse-activations")
    assert len(kinds(result)) == 1
    assert torch.equal(result(x), model(x))
    assert set(dict(result.named_parameters())) == {"0.weight", "0.bias"}


def test_an_activation_stays_where_the_value_before_it_is_needed() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return F.relu(y) + y

    result, manager = run(Both(), torch.randn(1, 3, 2, 2), "fuse-activations")
    assert kinds(result).count("relu") == 1
    assert "also used elsewhere" in manager.ledger.remarks("fuse-activations")[0].reason


def test_a_hook_on_a_joined_activation_keeps_it_apart() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    model[1].register_forward_hook(lambda module, args, result: result + 1)
    x = torch.randn(1, 3, 2, 2)
    result, _ = run(model, x, "fuse-activations")
    assert torch.equal(result(x), model(x))
