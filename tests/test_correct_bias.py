"""Bias correction: the mean error of every layer is gone, and what plain quantization broke is better."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress import PassManager
from fxcompress.errors import DataError, PlanError
from fxcompress.graph import qdq
from fxcompress.graph.results import output_snr
from fxcompress.quantization.lockstep import vouched_mean
from tests.imbalanced import imbalanced, mobile

OBSERVE: list[Any] = [
    "fold-batchnorm",
    "fuse-activations",
    {"insert-observers": {"calibrator": "minmax", "per_channel": False}},
    "calibrate",
]


def quantized(model: nn.Module, data: list[Tensor], *more: Any) -> Any:
    plan = [*OBSERVE, *more, "fold-quantization"]
    return PassManager(plan, reproducer=False, progress=False).run(model, data=data)


def data() -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randn(8, 3, 12, 12) for _ in range(4)]


def test_one_layer_is_the_formula_written_out() -> None:
    """b + m·t²/(t² + c²), m = E[W·x] − E[Ŵ·x̂], c² its variance by chance, t² = E[m² − c²], in float64 over every batch."""
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), [x + 1 for x in data()]
    plain, corrected = quantized(model, batches), quantized(model, batches, "correct-bias")
    quantize = next(n for n in plain.graph.nodes if n.target is qdq.quantize)
    scale, zero = quantize.args[1:3]
    x = torch.cat(batches).double()
    rounded = ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale
    weight = plain.get_buffer("0.weight").double() * plain.get_buffer("0.weight_scale").double()
    exact = model[0].weight.detach().double()  # type: ignore[operator]
    shifts = (torch.conv2d(x, exact) - torch.conv2d(rounded, weight)).mean((2, 3))
    mean, chance = shifts.mean(0), shifts.square().sum(0).sub(32 * shifts.mean(0) ** 2) / 31 / 32
    true = float((mean**2 - chance).mean())
    assert true > 0
    shift = mean * true / (true + chance)
    assert torch.allclose(corrected.get_parameter("0.bias").double(), model[0].bias.detach().double() + shift, atol=1e-6)  # type: ignore[operator]


def test_what_may_be_chance_is_not_corrected() -> None:
    """Means of pure noise are taken for nearly nothing; means far beyond it nearly whole; and a lone sample as it is."""
    torch.manual_seed(0)
    noise = torch.randn(16, 400, dtype=torch.float64)
    assert vouched_mean(noise).square().mean() < 0.1 * noise.mean(0).square().mean()
    assert torch.allclose(vouched_mean(noise + 100 * noise[0]), noise.mean(0) + 100 * noise[0], rtol=1e-3)
    assert torch.equal(vouched_mean(noise[:1]), noise[0])
    assert not vouched_mean(torch.zeros(3, 5)).any()


def test_the_mean_of_the_result_is_that_of_the_float_network() -> None:
    model, batches = imbalanced(mobile()), data()
    with torch.no_grad():
        expected = torch.cat([model(x) for x in batches]).mean(0)
        errors = [
            (torch.cat([m(x) for x in batches]).mean(0) - expected).abs().max()
            for m in (quantized(model, batches), quantized(model, batches, "correct-bias"))
        ]
    assert errors[1] < errors[0] / 10


def test_it_mends_a_network_that_plain_quantization_breaks() -> None:
    model, batches = imbalanced(mobile()), data()
    x = torch.randn(16, 3, 12, 12)
    with torch.no_grad():
        before, after = (output_snr(model(x), quantized(model, batches, *more)(x)) for more in ((), ("correct-bias",)))
    assert after > before + 3


def test_it_corrects_layers_without_a_bias_and_in_functional_spelling() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.weight = nn.Conv2d(3, 6, 1, bias=False), nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(torch.relu(self.conv(x)).mean((2, 3)), self.weight)

    torch.manual_seed(0)
    result = quantized(Functional().eval(), data(), "correct-bias")
    assert {name for name, _ in result.named_parameters()} == {"conv.bias", "linear_bias"}


def test_layers_that_share_a_weight_are_left_alone_and_named() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x))

    manager = PassManager([*OBSERVE, "correct-bias"], reproducer=False, progress=False)
    manager.run(Twice().eval(), data=data())
    assert [r.reason for r in manager.ledger.remarks("correct-bias")] == ["its weight or bias is used elsewhere too"] * 2


def test_it_needs_data() -> None:
    with pytest.raises(PlanError, match="needs data"):
        PassManager([*OBSERVE[:3], "correct-bias"]).run(mobile(), data()[0])
    with pytest.raises(DataError, match="empty"):
        PassManager([*OBSERVE[:3], "correct-bias"], reproducer=False).run(mobile(), data()[0], [])
