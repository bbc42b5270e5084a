"""After pruning: saved without code, done again to a fresh original, optimizers carried over, exported, compiled."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxcompress
from fxcompress import PassManager, PTQQuantizer
from fxcompress.errors import ConfigError
from fxcompress.pruning import StructuredPruner, apply_recipe, carry_optimizer, get_recipe

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Residual, grouped, with a hard-coded view: numbers in the graph change."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.last = nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + F.relu(self.grouped(x))
        x = F.adaptive_avg_pool2d(self.last(x), 2)
        out: torch.Tensor = self.fc(x.view(-1, 64))
        return out


def network() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def pruned(**options: Any) -> Any:
    return StructuredPruner(round_to=1, example_inputs=X, **options).prune(network())


def test_a_recipe_does_it_again_to_a_fresh_original() -> None:
    small = pruned()
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(0.01)
    file = io.BytesIO()
    torch.save({"recipe": get_recipe(small), "state": small.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    again = apply_recipe(network(), json.loads(json.dumps(loaded["recipe"])))
    again.load_state_dict(loaded["state"])
    assert torch.equal(again(X), small(X))
    assert again.get_submodule("grouped").in_channels == small.get_submodule("grouped").in_channels == 8


def test_two_prunings_make_a_recipe_of_two_steps() -> None:
    small = pruned(sparsity=0.25)
    smaller = StructuredPruner(round_to=1, sparsity=0.5).prune(small)
    assert len(get_recipe(smaller)["regions"][""]) == 2
    assert len(get_recipe(small)["regions"][""]) == 1
    again = apply_recipe(network(), get_recipe(smaller))
    again.load_state_dict(smaller.state_dict())
    assert torch.equal(again(X), smaller(X))


def test_a_recipe_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="no channels were pruned"):
        get_recipe(network())
    with pytest.raises(ConfigError, match="does not fit the model"):
        apply_recipe(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)), get_recipe(pruned()))
    with pytest.raises(ConfigError, match="not a pruning recipe"):
        apply_recipe(network(), {"format": 7})


def test_a_pruned_model_saves_without_code_and_keeps_its_recipe(tmp_path: Path) -> None:
    small = pruned()
    fxcompress.save(small, tmp_path / "small")
    loaded = fxcompress.load(tmp_path / "small")
    assert torch.equal(loaded(X), small(X))
    again = apply_recipe(network(), get_recipe(loaded))
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(X), small(X))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_an_optimizer_keeps_the_state_of_channels_that_stay(kind: str) -> None:
    model = network().train()
    make: Any = {"sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), "adam": lambda p: torch.optim.AdamW(p, 0.01)}[kind]
    optimizer = make(model.parameters())
    model(X).square().mean().backward()
    optimizer.step()
    small = StructuredPruner(round_to=1, example_inputs=X).prune(model)
    carried = carry_optimizer(optimizer, model, small)
    key = "momentum_buffer" if kind == "sgd" else "exp_avg_sq"
    old, new = optimizer.state[model.stem.weight][key], carried.state[small.get_parameter("stem.weight")][key]
    # a channel of the smaller weight is a channel of the larger one, and its momentum goes with it
    rows = [int((model.stem.weight == row).flatten(1).all(1).nonzero()) for row in small.get_parameter("stem.weight")]
    assert torch.equal(new, old[rows])
    before = small.get_parameter("stem.weight").detach().clone()
    small(X).square().mean().backward()
    carried.step()
    assert not torch.equal(before, small.get_parameter("stem.weight"))
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


def test_a_pruned_model_exports_and_runs_at_other_sizes() -> None:
    small = pruned()
    program = torch.export.export(small, (X,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2, max=64)}})
    other = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(program.module()(other), small(other))


def test_a_pruned_model_runs_in_onnx_runtime(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    small = pruned()
    fxcompress.export_onnx(small, tmp_path / "small.onnx", X)
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    torch.testing.assert_close(torch.from_numpy(session.run(None, {name: X.numpy()})[0]), small(X), rtol=1e-4, atol=1e-5)


def test_a_pruned_model_compiles() -> None:
    small = pruned()
    compiled = torch.compile(small, backend="aot_eager")
    torch.testing.assert_close(compiled(X), small(X))


def test_pruning_composes_with_masks_and_quantization() -> None:
    manager = PassManager(
        [
            {"mask-weights": {"sparsity": 0.3}},
            {"prune-channels": {"sparsity": 0.5, "round_to": 1}},
            "bake-masks",
        ],
        progress=False,
    )
    small = manager.run(network(), X)
    assert small.get_parameter("stem.weight").shape[0] == 8
    assert float((small.get_parameter("last.weight") == 0).float().mean()) > 0.1
    quantized = PTQQuantizer(calibration_method="minmax", num_calibration_batches=1).quantize(small, [X])
    assert quantized.meta["stage"] == "lowered"
    with pytest.raises(fxcompress.FxCompressError, match="lowered"):
        StructuredPruner(example_inputs=X).prune(quantized)


def test_deepcopies_and_originals_stay_apart() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    small = StructuredPruner(round_to=1, example_inputs=X).prune(model)
    twin = copy.deepcopy(small)
    StructuredPruner(round_to=1).prune(twin)
    assert len(small.meta["pruning"]) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
