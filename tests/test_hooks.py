"""Forward hooks, wrappers and autocast: a graph computes what the model computes with them, or its own code stays."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress import PTQQuantizer, StructuredPruner, trace
from fxcompress.errors import TraceError

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(1)
    layers = (
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()),
        nn.Conv2d(8, 4, 1),
    )
    return nn.Sequential(*layers).eval()


HOOKS: dict[str, Any] = {
    "replaces a result": lambda m: m.register_forward_hook(lambda m, given, found: 3 * found + 1),
    "replaces an argument": lambda m: m.register_forward_pre_hook(lambda m, given: given[0] + 2),
    "replaces arguments": lambda m: m.register_forward_pre_hook(lambda m, given: (given[0] * 0.5,)),
    "takes keywords": lambda m: m.register_forward_pre_hook(
        lambda m, given, named: ((given[0] - 1,), named), with_kwargs=True
    ),
    "takes keywords after": lambda m: m.register_forward_hook(lambda m, given, named, found: found - 1, with_kwargs=True),
    "only looks": lambda m: m.register_forward_hook(lambda m, given, found: None),
    "defeats a proxy": lambda m: m.register_forward_hook(lambda m, given, found: found * float(found.shape[-1] > 2)),
    "reads values": lambda m: m.register_forward_hook(lambda m, given, found: found / found.abs().max().item()),
}


@pytest.mark.parametrize("where", ["", "0", "1", "2", "3", "4"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_graph_computes_what_hooks_compute(hook: str, where: str) -> None:
    model = net()
    HOOKS[hook](model.get_submodule(where))
    expected = model(X)
    graph = trace(model, X)
    assert torch.equal(graph(X), expected)
    assert torch.equal(model(X), expected)  # the caller's model keeps its hooks
    assert any("hooks" in rung.reason or rung.rung == "island" for rung in graph.meta["rungs"])


@pytest.mark.parametrize("where", ["", "0", "1", "3", "4"])
@pytest.mark.parametrize("hook", HOOKS)
def test_no_pass_drops_a_hook(hook: str, where: str) -> None:
    model = net()
    HOOKS[hook](model.get_submodule(where))
    expected = model(X)
    quantized = PTQQuantizer(num_calibration_batches=1, progress=False).quantize(model, [X])
    assert (quantized(X) - expected).norm() < 0.1 * expected.norm()


def test_channels_are_removed_through_a_hook_that_handles_them_alike() -> None:
    model = net()
    model[0].register_forward_pre_hook(lambda m, given: (given[0] + 1,))
    model[3].register_forward_hook(lambda m, given, found: 2 * found)
    small = StructuredPruner(sparsity=0.5, round_to=1, example_inputs=X).prune(model)
    assert small.get_submodule("0").out_channels == 4  # its proof is held against the dense model by the pruner


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled, lambda model: nn.DataParallel(compiled(model))])
def test_wrappers_are_taken_off(wrap: Any) -> None:
    model = net()
    graph = trace(wrap(model), X)
    assert set(graph.state_dict()) == set(model.state_dict())
    assert "was taken off" in graph.meta["rungs"][0].reason
    assert torch.equal(graph(X), model(X))


class Loose(nn.Module):
    """What transformers are like: any keyword goes, and the result is of a class of its own."""

    class Result(OrderedDict[str, Tensor]):
        pass

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, values: Tensor | None = None, labels: Tensor | None = None, **options: Any) -> Any:
        assert values is not None
        result = self.Result(logits=self.body(values) if values.sum() else values)
        return result if labels is None else self.Result(loss=labels.sum(), **result)


@dataclasses.dataclass
class Made(OrderedDict[str, Tensor]):
    logits: Tensor
    other: Tensor | None = None

    def __post_init__(self) -> None:
        self["logits"] = self.logits


class Dataclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x: Tensor) -> Any:
        return Made(logits=self.body(x))


def test_a_result_keeps_its_class() -> None:
    model = Dataclass().eval()
    found = PTQQuantizer(num_calibration_batches=1, progress=False).quantize(model, [X])(X)
    assert isinstance(found, Made) and found.logits is found["logits"]
    expected = model(X).logits
    assert (found.logits - expected).norm() < 0.1 * expected.norm()


def test_keywords_that_nobody_gives_stop_nobody() -> None:
    model = Loose().eval()
    graph = trace(model, {"values": X})
    assert graph.meta["rungs"][0].rung == "island"
    found = graph(values=X)
    assert isinstance(found, Loose.Result) and torch.equal(found["logits"], model(X)["logits"])
    with pytest.raises(TypeError):
        graph(values=X, output_attentions=True)
    with pytest.raises(TraceError, match="options"):
        trace(model, {"values": X, "output_attentions": True})


class Cast(nn.Module):
    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.body, self.head, self.enabled = net(), nn.Conv2d(4, 4, 1), enabled

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            x = self.head(self.body(x))
        return x.float()


class Careful(nn.Module):
    """Defeats symbolic tracing, and switches autocast off for a part."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = net(), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if x.is_contiguous():
            with torch.autocast("cpu", enabled=False):
                x = x * x.mean((2, 3), keepdim=True)
        return self.head(x)


def test_autocast_that_the_code_switches_off_is_no_obstacle_to_export() -> None:
    model = Careful().eval()
    graph = trace(model, X)
    assert torch.equal(graph(X), model(X))
    assert [rung.rung for rung in graph.meta["rungs"]] == ["exported"]


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_that_the_code_switches_on_is_not_forgotten(enabled: bool) -> None:
    model = Cast(enabled).eval()
    graph = trace(model, X)
    assert torch.equal(graph(X), model(X))
    reasons = " ".join(rung.reason for rung in graph.meta["rungs"])
    assert ("autocast" in reasons) is enabled
