"""A run borrows the caller's parameters while it replaces them; what it returns shares no memory with the caller's model."""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxcompress import Context, Pass, PassManager, trace
from fxcompress.errors import FxCompressError
from fxcompress.graph.copying import copied_model
from fxcompress.graph.sharing import alone, borrowed, own


class Net(nn.Module):
    """Channels that go, channels that stay, statistics, a table that is also a head, a recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.fixed = nn.Conv2d(3, 3, 1)
        self.table = nn.Embedding(5, 8)
        self.reader = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("shift", torch.ones(1, 16, 1, 1))

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x + self.fixed(x))
        x = F.relu(self.norm(self.body(x)) + x + self.shift)
        return self.head(self.reader(x).mean((2, 3)))


CALL = torch.randn(4, 3, 8, 8)
PLANS: dict[str, list[Any]] = {
    "half": [{"prune-channels": {"sparsity": 0.5, "round_to": 1}}],
    "nothing": [{"prune-channels": {"sparsity": 0.0}}],
    "trace": [],
    "opened": ["open-attention"],
    "written": [{"prune-channels": {"sparsity": 0.5, "round_to": 1}}, "mask-weights", "bake-masks"],
}


def tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(module: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def memory(module: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors(module)}


def learn(module: Any, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        module(CALL).square().mean().backward()
        optimizer.step()


@pytest.fixture(params=sorted(PLANS))
def pair(request: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model: Any = Net()
    return model, PassManager(PLANS[request.param], progress=False).run(model, CALL)


def test_a_result_shares_no_memory_and_no_tensor_with_the_model(pair: tuple[Any, Any]) -> None:
    model, small = pair
    assert not memory(model) & memory(small)
    assert not {id(t) for t in tensors(model)} & {id(t) for t in tensors(small)}


def test_training_the_result_leaves_the_model_as_it_is(pair: tuple[Any, Any]) -> None:
    model, small = pair
    before = state(model)
    learn(small.train())
    assert same(model, before) and all(p.grad is None for p in model.parameters())


def test_training_the_model_leaves_the_result_as_it_is(pair: tuple[Any, Any]) -> None:
    model, small = pair
    before = state(small)
    learn(model.train())
    assert same(small, before) and all(p.grad is None for p in small.parameters())


def test_loading_a_state_into_either_leaves_the_other_as_it_is(pair: tuple[Any, Any]) -> None:
    model, small = pair
    ours, theirs = state(small), state(model)
    model.load_state_dict({name: torch.ones_like(tensor) for name, tensor in theirs.items()})
    assert same(small, ours)
    model.load_state_dict(theirs)
    small.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in ours.items()})
    assert same(model, theirs)


def test_buffers_written_in_place_are_apart(pair: tuple[Any, Any]) -> None:
    model, small = pair
    before = state(model)
    with torch.no_grad():
        for tensor in tensors(small):
            tensor.add_(1) if tensor.is_floating_point() else tensor.zero_()
    assert same(model, before)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.once, self.twice = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head, self.twice.weight = nn.Linear(8, 2), self.once.weight

    def forward(self, x: Tensor) -> Any:
        return self.head(self.twice(self.once(self.first(x)).relu()))


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_tied_weights_stay_tied_in_the_result_and_apart_from_the_model(sparsity: float) -> None:
    model: Any = Tied()
    before = state(model)
    small: Any = PassManager([{"prune-channels": {"sparsity": sparsity, "round_to": 1}}], progress=False).run(
        model, torch.randn(3, 6)
    )
    assert small.twice.weight is small.once.weight and small.once.weight is not model.once.weight
    with torch.no_grad():
        small.once.weight.fill_(3.0)
    assert same(model, before) and model.twice.weight is model.once.weight


def test_an_unfinished_backward_pass_of_the_model_survives_training_the_result() -> None:
    model: Any = Net().eval()
    loss = model(CALL).square().mean()
    small: Any = PassManager(PLANS["nothing"], progress=False).run(model, CALL)
    learn(small)
    loss.backward()  # would raise had a tensor it saved been written to


def test_flags_and_gradients_are_apart() -> None:
    model: Any = Net()
    learn(model, 1)
    model.fixed.weight.requires_grad_(False)
    small: Any = PassManager(PLANS["nothing"], progress=False).run(model, CALL)
    assert all(p.grad is None for p in small.parameters())
    assert not small.fixed.weight.requires_grad and small.body.weight.requires_grad
    small.requires_grad_(False)
    assert model.body.weight.requires_grad


def test_a_compiled_result_trains_without_touching_the_model() -> None:
    model: Any = Net()
    before = state(model)
    small: Any = PassManager(PLANS["half"], progress=False).run(model, CALL)
    learn(torch.compile(small, backend="eager"))
    assert same(model, before)


def test_lists_that_hold_parameters_follow_when_they_get_memory_of_their_own() -> None:
    model: Any = nn.LSTM(4, 6)
    copied: Any = copied_model(model, shared=True)
    before = state(model)
    own(copied, model)
    assert not memory(model) & memory(copied)
    copied(torch.randn(2, 3, 4))[0].sum().backward()
    with torch.no_grad():
        for parameter in copied._flat_weights:
            parameter.zero_()
    assert same(model, before) and not copied.weight_hh_l0.any()


def test_a_borrowed_copy_has_no_memory_of_its_own_until_it_is_asked_for() -> None:
    model: Any = Net()
    copied: Any = copied_model(model, shared=True)
    assert copied.body.weight.data_ptr() == model.body.weight.data_ptr()
    assert copied.norm.running_mean.data_ptr() != model.norm.running_mean.data_ptr()
    assert copied.head.weight is copied.table.weight
    own(copied, model)
    assert copied.body.weight.data_ptr() != model.body.weight.data_ptr()
    assert copied.head.weight is copied.table.weight and torch.equal(copied.body.weight, model.body.weight)


def test_parameters_on_one_memory_or_of_a_class_of_their_own_are_not_lent() -> None:
    class Named(nn.Parameter):
        pass

    model: Any = nn.Module()
    table = torch.randn(2, 3)
    model.first, model.second = nn.Parameter(table[0]), nn.Parameter(table[1])
    model.third, model.fourth = Named(torch.ones(3)), nn.Parameter(torch.ones(3))
    assert set(borrowed(alone(model))) == {id(model.fourth)}


@dataclass(frozen=True)
class Writes(Pass):
    """Writes ones into every parameter."""

    name: ClassVar[str] = "writes"

    def run(self, module: fx.GraphModule, context: Context) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(1.0)


@dataclass(frozen=True)
class Fails(Writes):
    """Writes ones into every parameter, and fails."""

    def run(self, module: fx.GraphModule, context: Context) -> None:
        super().run(module, context)
        raise ValueError("on purpose")


@pytest.mark.parametrize("step", [Writes(), Fails()])
def test_a_pass_that_says_nothing_may_write_to_parameters(step: Pass) -> None:
    model: Any = Net()
    before = state(model)
    manager = PassManager([*PLANS["nothing"], step], verify=False, progress=False, reproducer=False)
    if isinstance(step, Fails):
        with pytest.raises(FxCompressError):
            manager.run(model, CALL)
    else:
        written: Any = manager.run(model, CALL)
        assert (written.body.weight == 1).all()
    assert same(model, before)


class Odd(nn.Module):
    """Attributes of every sort that copies must not share."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.pair = (self.layer, [1])
        self.listed = [self.layer.weight]
        self.table = {"a": torch.ones(2)}
        self.inner = nn.Sequential(self.layer, nn.ReLU())
        self.size, self.name, self.act = (1, 2), "odd", F.relu
        self.register_buffer("kept", torch.ones(2), persistent=False)


class Careful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.copies = nn.Linear(2, 2), 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = type(self)()
        made.layer, made.copies = copy.deepcopy(self.layer, memo), self.copies + 1
        return made


@pytest.mark.parametrize("shared", [False, True])
def test_a_copy_is_what_deepcopy_makes(shared: bool) -> None:
    model: Any = nn.Sequential(Odd(), nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)), Careful())
    model.add_module("again", model[0].layer)
    made: Any = copied_model(model, shared)
    expected = copy.deepcopy(model)
    odd = made[0]
    assert odd.pair[0] is odd.layer is odd.inner[0] is made.again and odd.layer is not model[0].layer
    assert odd.pair[1] is not model[0].pair[1] and odd.table["a"] is not model[0].table["a"]
    assert odd.listed[0] is odd.layer.weight and odd.size == (1, 2) and odd.act is F.relu
    assert made[2].copies == 1 and list(made.state_dict()) == list(expected.state_dict())
    assert [type(m) for m in made.modules()] == [type(m) for m in expected.modules()]
    assert all(torch.equal(a, b) for a, b in zip(tensors(made), tensors(expected), strict=True))
    made[1].eval()
    made[1].register_forward_hook(print)
    assert model[1].training and not model[1]._forward_hooks and "kept" in odd._non_persistent_buffers_set


def test_a_public_trace_shares_nothing() -> None:
    model: Any = Net()
    assert not memory(model) & memory(trace(model, CALL))
