"""accelerate-sparsity: dense with the reason where sparse kernels do not run or are not faster, never an error."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress import PassManager, load, save
from fxcompress.pruning import MagnitudePruner, semi_structured
from fxcompress.pruning.semi_structured import SparseLinear, is_two_of_four

X = torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(0))
PLAN = [{"mask-weights": {"n_m": (2, 4)}}, "bake-masks", "accelerate-sparsity"]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(16, 32, 3)
        self.pointwise = nn.Conv2d(32, 64, 1)
        self.fc = nn.Linear(64, 32)
        self.odd = nn.Linear(32, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.pointwise(torch.relu(self.spatial(x)))).mean((2, 3))
        return self.odd(torch.relu(self.fc(x)))


def network() -> Network:
    torch.manual_seed(0)
    return Network().eval()


def reasons(manager: PassManager) -> dict[str, str]:
    return {remark.node: remark.reason for remark in manager.ledger.remarks("accelerate-sparsity")}


def test_on_a_cpu_everything_stays_dense_with_the_reason_and_nothing_changes() -> None:
    manager = PassManager(PLAN)
    result = manager.run(network(), X)
    found = reasons(manager)
    assert "no sparse kernel for a convolution" in found["spatial"]
    assert all("it is on the cpu" in found[name] for name in ("pointwise", "fc", "odd"))
    assert not any(isinstance(module, SparseLinear) for module in result.modules())
    assert torch.equal(result(X), PassManager(PLAN[:2]).run(network(), X)(X))


def test_dense_and_masked_weights_are_named() -> None:
    manager = PassManager(["accelerate-sparsity"])
    manager.run(network(), X)
    assert "not 2:4" in reasons(manager)["fc"]
    manager = PassManager([PLAN[0], "accelerate-sparsity"])
    manager.run(network(), X)
    assert "its mask is not baked" in reasons(manager)["fc"]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Linear(16, 16), "it is on the cpu"),
        (nn.Linear(6, 4), "not 2:4"),
        (nn.Conv2d(16, 16, 1, stride=2), "not 1×1"),
        (nn.Conv2d(16, 16, 1, padding=1), "not 1×1"),
        (nn.Conv2d(16, 16, 1, groups=2), "not 1×1"),
    ],
)
def test_every_obstacle_has_a_reason(layer: Any, reason: str) -> None:
    if layer.weight.shape[1] % 4 == 0:
        MagnitudePruner(pruning_type="semi_structured").apply_mask(layer)
        MagnitudePruner().remove_mask(layer)
    found = semi_structured.obstacle(layer)
    assert found is not None and reason in found


def test_two_of_four_is_told_from_more() -> None:
    assert is_two_of_four(torch.tensor([[1.0, 0, 0, 2, 0, 3, 0, 0]]))
    assert not is_two_of_four(torch.tensor([[1.0, 1, 0, 2]])) and not is_two_of_four(torch.ones(1, 6))


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Kernels that any machine has: weights are packed as they are, and timed as told."""
    times = {"SparseLinear": 1.0, "dense": 2.0}
    monkeypatch.setattr(semi_structured, "obstacle", lambda layer: None if layer.weight[0].numel() <= 64 else "too big")
    monkeypatch.setattr(semi_structured, "pack", lambda weight: weight.detach().flatten(1))
    monkeypatch.setattr(semi_structured, "measure", lambda layer, shape: times.get(type(layer).__name__, times["dense"]))
    return times


def test_a_packed_layer_computes_what_the_dense_one_did_and_the_dense_form_is_saved(
    pretend: dict[str, float], tmp_path: Path
) -> None:
    manager = PassManager(PLAN)
    result = manager.run(network(), X)
    assert {name for name, m in result.named_modules() if isinstance(m, SparseLinear)} == {"pointwise", "fc", "odd"}
    dense = PassManager(PLAN[:2]).run(network(), X)
    assert torch.allclose(result(X), dense(X), atol=1e-5)
    assert torch.equal(copy.deepcopy(result)(X), result(X))
    save(result, tmp_path / "model")
    assert torch.equal(load(tmp_path / "model")(X), dense(X))


def test_what_is_not_faster_stays_dense_with_both_times(pretend: dict[str, float]) -> None:
    pretend["dense"] = 0.5
    manager = PassManager(PLAN)
    result = manager.run(network(), X)
    assert not any(isinstance(module, SparseLinear) for module in result.modules())
    assert reasons(manager)["fc"] == "sparse takes 1.000 ms and dense 0.500 ms; it stays dense"


def test_a_kernel_that_refuses_is_a_reason_not_an_error(pretend: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(weight: Tensor) -> Tensor:
        raise RuntimeError("dimensions are not supported\nmore")

    monkeypatch.setattr(semi_structured, "pack", refuse)
    manager = PassManager(PLAN)
    manager.run(network(), X)
    assert reasons(manager)["fc"] == "torch cannot run it sparse: dimensions are not supported; it stays dense"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sparse_tensor_cores_agree_with_dense() -> None:
    layer = nn.Linear(1024, 1024, device="cuda", dtype=torch.float16)
    pruner = MagnitudePruner(pruning_type="semi_structured")
    pruner.apply_mask(layer)
    pruner.remove_mask(layer)
    assert semi_structured.obstacle(layer) is None
    x = torch.randn(64, 1024, device="cuda", dtype=torch.float16)
    sparse = SparseLinear(layer, semi_structured.pack(layer.weight))
    assert torch.allclose(sparse(x), layer(x), rtol=1e-2, atol=1e-2)
    assert semi_structured.measure(sparse, x.shape) > 0
