"""settle-weights: weights that are computed from others become plain, and are quantized like any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from fxcompress import DynamicQuantizer, PassManager, PTQQuantizer, QATQuantizer, coverage
from fxcompress.graph.results import output_snr
from fxcompress.pruning import MagnitudePruner

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
DOUBLE = torch.float64


def ptq(model: nn.Module, **options: Any) -> Any:
    return PTQQuantizer(num_calibration_batches=1, progress=False, verify=True, **options).quantize(model, [X])


def network(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    body = (wrap(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8), nn.ReLU(), wrap(nn.Conv2d(8, 8, 3)), nn.ReLU())
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), wrap(nn.Linear(8, 5))).eval()


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight.tanh()


def doubled(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.5)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": doubled,
    "old weight norm": old_weight_norm,
    "old spectral norm": nn.utils.spectral_norm,
    "pruned by torch": pruned,
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("backend", ["fbgemm", "onnxruntime", "openvino"])
def test_computed_weights_run_in_integers(name: str, backend: str) -> None:
    if backend != "fbgemm":
        pytest.importorskip(backend)
    model = network(WRAPPERS[name])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(X)
    quantized = ptq(model, backend=backend)
    assert coverage(quantized).mac_share == 1.0
    assert output_snr(expected, quantized(X)) > 25
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("name", WRAPPERS)
def test_computed_weights_are_quantized_without_data(name: str) -> None:
    model = nn.Sequential(WRAPPERS[name](nn.Linear(12, 16)), nn.ReLU(), WRAPPERS[name](nn.Linear(16, 4))).eval()
    quantized = DynamicQuantizer().quantize(model, example_inputs=X)
    assert coverage(quantized).mac_share == 1.0
    assert output_snr(model(X), quantized(X)) > 25


def test_the_levels_of_a_normed_weight_are_those_of_its_formula() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 4))).eval()
    parts: Any = model[0].parametrizations
    magnitude, direction = (p.detach().to(DOUBLE) for p in (parts.weight.original0, parts.weight.original1))
    exact = magnitude * direction / direction.square().sum(1, keepdim=True).sqrt()
    plan = ["settle-weights", {"quantize-dynamic": {"reduce_range": False}}]
    found = PassManager(plan).run(model, torch.randn(2, 6)).state_dict()
    scale = exact.abs().amax(1, keepdim=True) / 127
    assert torch.allclose(found["0.weight_scale"].to(DOUBLE), scale.flatten(), rtol=1e-6)
    assert (found["0.weight"].to(DOUBLE) * scale - exact).abs().max() <= 0.5001 * scale.max()


def test_the_levels_of_a_spectrally_normed_weight_are_those_of_its_formula() -> None:
    torch.manual_seed(2)
    layer = parametrizations.spectral_norm(nn.Linear(6, 4), n_power_iterations=200).eval()
    original: Any = layer.parametrizations
    weight = original.weight.original.detach().to(DOUBLE)
    exact = weight / torch.linalg.svdvals(weight)[0]
    found = PassManager(["settle-weights"]).run(nn.Sequential(layer), torch.randn(2, 6)).state_dict()
    assert torch.allclose(found["0.weight"].to(DOUBLE), exact, atol=1e-5)


class Standardized(nn.Conv2d):
    """Weight standardization (Qiao et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.weight.mean((1, 2, 3), keepdim=True), self.weight.var((1, 2, 3), keepdim=True, unbiased=False)
        weight = (self.weight - mean) / (variance + 1e-6).sqrt()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class ByBatchNorm(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias)


@pytest.mark.parametrize("cls", [Standardized, ByBatchNorm])
def test_a_weight_that_code_standardizes_is_quantized(cls: type[nn.Conv2d]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(cls(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), cls(8, 4, 3)).eval()
    settled = PassManager(["settle-weights"]).run(model, X)
    weight = model.get_parameter("0.weight").detach().to(DOUBLE)
    rows = weight.flatten(1)
    exact = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    assert torch.allclose(settled.get_parameter("0.weight").to(DOUBLE), exact.reshape(weight.shape), atol=1e-5)
    quantized = ptq(model)
    assert coverage(quantized).mac_share == 1.0
    assert output_snr(model(X), quantized(X)) > 25


class JoinedBias(nn.Module):
    """A projection whose bias has learned parts and a part that is zero; another reader of one part."""

    zero: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(12, 6))
        self.first, self.last = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.register_buffer("zero", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat((self.first, self.zero, self.last))
        return F.linear(
            F.linear(x, self.weight, joined)[..., :6] * self.first[0], 0.5 * self.weight.t()[:, :6].t(), joined[:6]
        )


def test_a_bias_that_is_joined_from_parts_is_settled_and_the_parts_stay_for_others() -> None:
    model, x = JoinedBias().eval(), torch.randn(3, 6, generator=torch.Generator().manual_seed(3))
    settled = PassManager(["settle-weights"]).run(model, x)
    assert torch.allclose(settled(x), model(x), atol=1e-5)
    assert {"weight", "first"} <= set(dict(settled.named_parameters()))
    assert torch.equal(settled.get_parameter("weight"), model.weight)
    quantized = DynamicQuantizer().quantize(model, example_inputs=x)
    assert coverage(quantized).mac_share == 1.0


class MadeByTheInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * x.mean())


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.dropout(self.weight, 0.5, True))


@pytest.mark.parametrize("build", [MadeByTheInput, Random])
def test_a_weight_that_changes_from_call_to_call_stays_computed(build: type[nn.Module]) -> None:
    model, x = build().eval(), torch.randn(3, 6)
    settled = PassManager(["settle-weights"], verify=False).run(model, x)
    assert not torch.equal(settled(x), settled(2 * x) / 2)


def test_masks_of_a_pruner_are_settled_after_training_and_kept_before() -> None:
    model = MagnitudePruner(sparsity=0.5).prune(network(lambda layer: layer))
    quantizer = PTQQuantizer(num_calibration_batches=1, progress=False)
    quantized = quantizer.quantize(model, [X])
    assert coverage(quantized).mac_share == 1.0
    levels = quantized.get_buffer("3.weight")
    assert (levels == 0).float().mean() > 0.3
    assert "masks are now part of their weights" in str(quantizer.ledger)
    trained = QATQuantizer()
    assert "parametrizations" in str(dict(trained.prepare(model.train(), X).named_parameters()).keys())
    assert "settle-weights" in str(trained.ledger)


@pytest.mark.parametrize("name", ["weight norm", "spectral norm", "own", "old weight norm"])
def test_a_settled_weight_trains_rounded(name: str) -> None:
    model, quantizer = network(WRAPPERS[name]).train(), QATQuantizer()
    prepared = quantizer.prepare(model, X)
    assert "is now part of the weight" in str(quantizer.ledger)
    optimizer = torch.optim.SGD(prepared.parameters(), 0.01)
    before = prepared.get_parameter("0.weight").clone()
    prepared(X).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, prepared.get_parameter("0.weight"))
    quantized = quantizer.convert(prepared.eval())
    assert coverage(quantized).mac_share == 1.0
    assert output_snr(prepared(X), quantized(X)) > 30


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.up(x)), self.up.weight.t())


def test_a_weight_that_another_layer_owns_is_settled_beside_it_and_stays_tied_where_it_trains() -> None:
    torch.manual_seed(0)
    model = Transposed().eval()
    settled = PassManager(["settle-weights"]).run(model, X)
    assert torch.equal(settled.get_parameter("up.weight"), model.up.weight)
    assert torch.equal(settled(X), model(X))
    trained = PassManager([{"settle-weights": {"trains": True}}]).run(model, X)
    assert dict(trained.named_parameters()).keys() == {"up.weight", "up.bias"}
