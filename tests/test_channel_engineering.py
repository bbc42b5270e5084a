"""Around channel pruning: layouts, types, flags, saved models, other passes, training, inputs and outputs of every form."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress import PassManager, load, save, trace
from fxcompress.errors import FxCompressError, PassError
from fxcompress.pruning import PruningPlan, StructuredPruner
from tests.channel_cases import c3, error, image, lived_in, net, prune, remarks, shapes, silenced

X = (image(),)


TORCH_WARNS_ITSELF = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
"""torch 2.13 calls what it deprecates when it exports."""


def network() -> Any:
    return nn.Sequential(c3(3, 8), nn.BatchNorm2d(8), nn.ReLU(), c3(8, 12), nn.ReLU(), c3(12, 2))


def test_channels_last_stays_channels_last_and_the_rest_contiguous() -> None:
    model = lived_in(network())
    plain, _ = prune(model, X)
    assert all(p.is_contiguous() for p in plain.parameters())
    small, _ = prune(model.to(memory_format=torch.channels_last), X)
    weights = [p for p in small.parameters() if p.dim() == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    assert error(plain(*X), small(*X)) <= 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10), (torch.bfloat16, 5e-2)])
def test_every_precision_is_kept(dtype: torch.dtype, tolerance: float) -> None:
    model = lived_in(network()).to(dtype)
    small, _ = prune(model, (X[0].to(dtype),), criterion="random")
    assert {p.dtype for p in small.parameters()} == {dtype}
    found = small(X[0].to(dtype))
    assert found.dtype == dtype
    assert error(silenced(model, small)(X[0].to(dtype)).double(), found.double()) <= tolerance


def test_training_flags_gradients_persistence_and_random_numbers_are_as_they_were() -> None:
    model = lived_in(network())
    model.register_buffer("extra", torch.ones(1), persistent=False)
    model[1].train()
    model[3].weight.requires_grad_(False)
    state = torch.get_rng_state()
    small, _ = prune(model, X)
    assert torch.equal(state, torch.get_rng_state())
    assert small.get_submodule("1").training and not small.get_submodule("0").training
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    assert set(small.state_dict()) == set(model.state_dict())


def test_a_pruned_model_trains_and_keeps_no_old_gradients() -> None:
    model = lived_in(network())
    model(*X).square().mean().backward()
    small, _ = prune(model, X)
    assert all(p.grad is None or p.grad.shape == p.shape for p in small.parameters())
    optimizer = torch.optim.Adam(small.parameters(), 1e-3)
    optimizer.zero_grad()
    loss = small.train()(*X).square().mean()
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in small.parameters())


def test_a_saved_plan_prunes_a_fresh_model_to_the_same_state(tmp_path: Path) -> None:
    model, pruner = lived_in(network()), StructuredPruner(round_to=1, progress=False)
    plan = pruner.get_pruning_plan(model, example_inputs=X)
    small = pruner.prune(model, plan, example_inputs=X)
    plan.save(tmp_path / "plan.yaml")
    torch.save(small.state_dict(), tmp_path / "state.pt")
    fresh = pruner.prune(lived_in(network(), seed=5), PruningPlan.load(tmp_path / "plan.yaml"), example_inputs=X)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(fresh(*X), small(*X))


def test_a_pruned_model_is_saved_copied_pickled_and_exported(tmp_path: Path) -> None:
    small, _ = prune(lived_in(network()), X)
    expected = small(*X)
    save(small, tmp_path / "small")
    assert torch.equal(load(tmp_path / "small")(*X), expected)
    assert torch.equal(copy.deepcopy(small)(*X), expected)
    assert torch.equal(pickle.loads(pickle.dumps(small))(*X), expected)
    assert torch.equal(torch.export.export(small, X).module()(*X), expected)


@TORCH_WARNS_ITSELF
def test_a_pruned_model_goes_through_onnx(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    small, _ = prune(lived_in(network()).float(), (X[0].float(),))
    program = torch.onnx.export(small, (X[0].float(),), dynamo=True, verbose=False)
    assert program is not None
    program.save(str(tmp_path / "small.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: X[0].float().numpy()})
    assert error(small(X[0].float()), torch.from_numpy(found)) <= 1e-5


@pytest.mark.slow
def test_a_pruned_model_compiles() -> None:
    small, _ = prune(lived_in(network()), X)
    assert error(small(*X), torch.compile(small, backend="aot_eager")(*X)) <= 1e-10


LOWERED = ["fold-batchnorm", "insert-observers", {"calibrate": {"num_batches": 1}}, "fold-quantization", "lower"]


def test_pruning_comes_before_quantization_and_is_refused_after_it() -> None:
    model, images = lived_in(network()).float(), X[0].float()
    plan = [{"prune-channels": {"round_to": 1}}, *LOWERED]
    both = PassManager(plan, progress=False, reproducer=False).run(model, images, [images])
    assert both(images).shape == model(images).shape
    with pytest.raises(FxCompressError, match="takes a float graph"):
        prune(both, (images,))


def test_a_wrapped_model_is_pruned_as_a_part_of_its_wrapper() -> None:
    inner = lived_in(network())
    small, _ = prune(nn.DataParallel(inner).module, X)
    assert shapes(small)["0.weight"] == (4, 3, 3, 3)


@dataclasses.dataclass
class Found:
    maps: Tensor
    score: Tensor


def many_forms(self: Any, x: Tensor, *, scale: Tensor | None = None, extra: dict[str, Tensor] | None = None) -> Any:
    x = self.a(x) if scale is None else self.a(x) * scale
    x = torch.relu(x) if extra is None else torch.relu(x) + self.b(extra["image"])
    return {"maps": self.head(x), "rest": (x.mean((1, 2, 3)), [self.head(x).amax((2, 3))])}


@pytest.mark.parametrize(
    "call",
    [
        {"x": X[0]},
        {"x": X[0], "scale": torch.rand(1, dtype=torch.float64) + 1},
        {"x": X[0], "extra": {"image": image(seed=3)}},
    ],
    ids=["plain", "optional", "nested"],
)
def test_keywords_optional_and_nested_inputs_and_outputs(call: dict[str, Any]) -> None:
    model = lived_in(net(many_forms, a=c3(3, 8), b=c3(3, 8), head=c3(8, 2)))
    small, _ = prune(model, call)
    assert small.get_parameter("a.weight").shape == (4, 3, 3, 3)
    found, expected = small(**call), model(**call)
    assert set(found) == set(expected) and isinstance(found["rest"], tuple) and isinstance(found["rest"][1], list)


def test_an_output_that_is_a_dataclass_does_not_stop_pruning() -> None:
    def forward(self: Any, x: Tensor) -> Found:
        x = self.trunk(x)
        return Found(self.head(x), x.mean())

    model = lived_in(net(forward, trunk=nn.Sequential(c3(3, 8), nn.ReLU(), c3(8, 6)), head=c3(6, 2)))
    small, _ = prune(model, X)
    assert shapes(small)["trunk.0.weight"] == (4, 3, 3, 3)
    found = small(*X)
    assert isinstance(found, Found)


def test_control_flow_on_data_leaves_the_parts_it_steers() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.trunk(x)
        return self.head(x) if bool(x.mean() > 0) else self.head(-x)

    model = lived_in(
        net(forward, trunk=nn.Sequential(c3(3, 8), nn.ReLU(), c3(8, 6)), head=nn.Sequential(c3(6, 4), c3(4, 2)))
    )
    small, pruner = prune(model, X)
    assert shapes(small)["trunk.0.weight"] == (4, 3, 3, 3)
    assert shapes(small)["trunk.2.weight"] == (6, 4, 3, 3)
    assert shapes(small)["head.1.weight"] == (2, 2, 3, 3)
    assert error(silenced(model, small)(*X), small(*X)) <= 1e-10
    assert "control flow" in remarks(pruner) or "island" in remarks(pruner)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.qr(x)[0]


def test_an_operator_without_a_rule_freezes_what_reaches_it_by_name_and_is_an_error_when_strict() -> None:
    model = lived_in(nn.Sequential(c3(3, 8), Unknown(), c3(8, 6), nn.ReLU(), c3(6, 2)))
    small, pruner = prune(model, X)
    assert shapes(small)["0.weight"] == (8, 3, 3, 3)
    assert shapes(small)["2.weight"] == (3, 8, 3, 3)
    assert "qr" in remarks(pruner)
    with pytest.raises(PassError, match="strict=True"):
        prune(model, X, strict=True)


def test_nothing_to_remove_is_loud_and_gives_every_reason() -> None:
    model = lived_in(net(lambda self, x: (self.a(x), self.b(x)), a=c3(3, 8), b=c3(3, 4)))
    with pytest.raises(PassError, match=r"(?s)a: it is an output of the model.*b: it is an output of the model"):
        prune(model, X)


@TORCH_WARNS_ITSELF
def test_pruning_then_exporting_is_exporting_then_pruning() -> None:
    model = lived_in(network())
    small, _ = prune(model, X, criterion="l1_norm")
    exported = torch.export.export(model, X).module()
    other, _ = prune(exported, X, criterion="l1_norm")
    assert error(small(*X), other(*X)) <= 1e-12


def test_a_traced_model_is_pruned_as_the_eager_one() -> None:
    model = lived_in(network())
    assert shapes(prune(trace(model, X), X)[0]) == shapes(prune(model, X)[0])
