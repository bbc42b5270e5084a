"""Models as libraries of transformers write them: decorated code, results of classes of their own, hooks of their own."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxcompress import PTQQuantizer, coverage
from fxcompress.graph import trace


def captures(function: Callable[..., Any]) -> Any:
    """A decorator that reads and takes away an argument of its own, with another signature than what it wraps."""

    @functools.wraps(function)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        as_tuple = kwargs.pop("as_tuple", False)
        result = function(self, *args, **kwargs)
        return (result,) if as_tuple else result

    return wrapper


class Decorated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    @captures
    def forward(self, values: Tensor, mask: Tensor | None = None, *, scale: float = 2.0, **kwargs: Any) -> Tensor:
        flat = values.ndim == 2
        if values.dtype != self.first.weight.dtype:
            values = values.to(self.first.weight.dtype)
        if not flat:
            values = values.mean(1)
        values = self.first(values) * scale
        return self.second(values if mask is None else values * mask)


def lower_rungs(model: Any) -> list[str]:
    return [rung.module for rung in model.meta["rungs"] if rung.rung != "note"]


@pytest.mark.parametrize("shape", [(5, 8), (5, 3, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decorated_forward_is_traced_by_its_own_parameters(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Decorated().eval(), torch.randn(shape, dtype=dtype)
    graph = trace(model, {"values": x})
    assert not lower_rungs(graph)
    more = torch.randn((7, *shape[1:]), dtype=dtype)
    assert torch.equal(graph(values=more), model(values=more))
    assert torch.equal(graph(more), model(more))
    said = [rung.reason for rung in graph.meta["rungs"] if "type and the number of dimensions" in rung.reason]
    assert len(said) == 1 and "'values'" in said[0]


def test_arguments_of_a_decorated_forward_are_given_by_position_and_by_name() -> None:
    torch.manual_seed(0)
    model, x, mask = Decorated().eval(), torch.randn(5, 8), torch.rand(5, 16)
    graph = trace(model, {"values": x, "mask": mask, "scale": 3.0})
    assert torch.equal(graph(x, mask, scale=3.0), model(x, mask, scale=3.0))
    assert type(model) is Decorated
    fixed = trace(model, {"values": x})
    assert [node.target for node in fixed.graph.nodes if node.op == "placeholder"] == ["values", "mask", "scale"]
    assert "**kwargs is not taken any more" in {rung.reason for rung in fixed.meta["rungs"]}


def test_a_decorated_model_quantizes_whole() -> None:
    torch.manual_seed(0)
    model = Decorated().eval()
    quantized = PTQQuantizer(num_calibration_batches=1).quantize(model, [{"values": torch.randn(5, 8)}])
    assert coverage(quantized).mac_share == 1.0


@dataclass
class Result(OrderedDict):  # type: ignore[type-arg]
    """A result that is read by name and by key, registered with torch's trees as such libraries do."""

    hidden: Any = None
    pooled: Any = None

    def __post_init__(self) -> None:
        for name in ("hidden", "pooled"):
            self[name] = getattr(self, name)


pytree.register_pytree_node(
    Result,
    lambda result: ([result.hidden, result.pooled], None),
    lambda values, _: Result(*values),
    serialized_type_name="tests.Result",
)


class Branching(nn.Module):
    """Code that asks how a tensor lies in memory defeats symbolic tracing; its result is of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Result:
        if not x.is_contiguous() or x.shape[-1] != 8:
            raise ValueError("the last dimension must be 8")
        hidden = self.inner(x)
        return Result(hidden, hidden.mean(1))


def test_a_result_of_an_exported_part_keeps_its_class() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Branching(), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            found = self.body(x)
            return self.head(found.pooled) + found["hidden"].mean()

    torch.manual_seed(0)
    model, x = Reading().eval(), torch.randn(3, 5, 8)
    graph = trace(model, x)
    assert lower_rungs(graph) == ["body"]
    assert torch.allclose(graph(x), model(x))


def test_hooks_that_a_model_gives_itself_when_it_is_called_come_once() -> None:
    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 8), Branching())
            self.watched = False
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen = []
            if not self.watched:
                self.layers[0].register_forward_hook(lambda module, args, result: self.seen.append(result))
                self.watched = True
            return self.layers(x).hidden + torch.stack(self.seen).sum(0)

    torch.manual_seed(0)
    model, x = Watching().eval(), torch.randn(3, 5, 8)
    graph = trace(model, x)
    assert not model.layers[0]._forward_hooks
    assert torch.allclose(graph(x), model(x))
    assert len(model.layers[0]._forward_hooks) == 1


def test_control_flow_by_sizes_is_not_decided_by_the_example() -> None:
    class BySize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            return x * 2 if x.shape[0] > 4 else x

    graph = trace(BySize().eval(), torch.randn(3, 8))
    assert lower_rungs(graph) == [""]
