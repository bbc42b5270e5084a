"""recalibrate-batchnorm: the statistics are those of the data, and nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxcompress import PassManager
from fxcompress.errors import DataError, PlanError

DATA = [torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) * 2 + seed for seed in range(3)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.BatchNorm2d(3, momentum=0.3), nn.Dropout(0.5), nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()
    )


def recalibrated(model: nn.Module, data: Any = DATA, **options: Any) -> tuple[Any, PassManager]:
    manager = PassManager([{"recalibrate-batchnorm": options}], reproducer=False)
    return manager.run(model, data=data), manager


def statistics(values: list[np.ndarray[Any, Any]]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The mean over batches of each batch's mean and unbiased variance, in float64."""
    means = [v.mean(axis=(0, 2, 3)) for v in values]
    variances = [v.var(axis=(0, 2, 3), ddof=1) for v in values]
    return np.mean(means, axis=0), np.mean(variances, axis=0)


def test_statistics_are_those_of_the_data_in_float64() -> None:
    result, _ = recalibrated(network().eval())
    model = network()
    first = [x.double().numpy() for x in DATA]
    mean, variance = statistics(first)
    assert np.allclose(result.get_buffer("0.running_mean"), mean, atol=1e-5)
    assert np.allclose(result.get_buffer("0.running_var"), variance, rtol=1e-5)
    normed = [
        (x - x.mean(axis=(0, 2, 3), keepdims=True)) / np.sqrt(x.var(axis=(0, 2, 3), keepdims=True) + 1e-5) for x in first
    ]
    weight: Any = model[2].weight
    second = [torch.nn.functional.conv2d(torch.tensor(x), weight.detach().double()).numpy() for x in normed]
    mean, variance = statistics(second)
    assert np.allclose(result.get_buffer("3.running_mean"), mean, atol=1e-5)
    assert np.allclose(result.get_buffer("3.running_var"), variance, rtol=1e-4)
    assert int(result.get_buffer("3.num_batches_tracked")) == 3


@pytest.mark.parametrize("training", [False, True])
def test_weights_flags_momenta_and_the_original_stay(training: bool) -> None:
    model = network().train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result, _ = recalibrated(model)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    changed = {name for name, tensor in result.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all("running" in name or "tracked" in name for name in changed)
    assert [m.momentum for m in result.modules() if isinstance(m, nn.BatchNorm2d)] == [0.3, 0.1]
    assert all(m.training is training for m in result.modules() if not hasattr(m, "graph"))


def test_once_is_enough_and_the_number_of_batches_is_a_ceiling() -> None:
    result, manager = recalibrated(network().eval(), num_batches=2)
    again, _ = recalibrated(result, num_batches=2)
    assert all(torch.equal(a, b) for a, b in zip(result.buffers(), again.buffers(), strict=True))
    assert int(result.get_buffer("0.num_batches_tracked")) == 2
    assert not manager.ledger.remarks("recalibrate-batchnorm")
    _, manager = recalibrated(network().eval(), num_batches=9)
    assert [r.reason for r in manager.ledger.remarks("recalibrate-batchnorm")] == [
        "9 batches were asked for and the data has 3"
    ]


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.batch_norm(self.norm(x), self.mean, self.var)  # type: ignore[arg-type]


def test_what_has_no_statistics_of_its_own_is_named() -> None:
    _, manager = recalibrated(Functional().eval())
    reasons = {remark.node: remark.reason for remark in manager.ledger.remarks("recalibrate-batchnorm")}
    assert reasons["norm"] == "it keeps no running statistics"
    assert reasons["batch_norm"] == "its statistics are constants of the graph"
    assert "there is no batch normalisation" in reasons[""]


def test_missing_empty_and_unfit_data_are_refused() -> None:
    with pytest.raises(PlanError, match="needs data"):
        PassManager(["recalibrate-batchnorm"]).run(network(), DATA[0])
    with pytest.raises(DataError, match="empty"):
        PassManager(["recalibrate-batchnorm"]).run(network(), DATA[0], data=iter([]))
    with pytest.raises(DataError, match="batch 1 holds NaN"):
        recalibrated(network(), [DATA[0], DATA[0] * torch.nan])
    with pytest.raises(DataError, match="batch 1 does not run through"):
        recalibrated(network(), [DATA[0], torch.randn(4, 2, 5, 5)])
