"""The last rung: a module whose own code stays Python, while its traceable children are compiled in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, fx, nn

from fxcompress.graph.module import TracedModule
from fxcompress.graph.rungs import Rung
from fxcompress.graph.signatures import (
    forwarded,
    placeholders,
)

__all__ = ["TOP", "Island", "around_island", "regions"]

TOP = "_island"


class Island(nn.Module):
    """Calls a model whose parameters are registered elsewhere.

    The graph module around it owns the model's children, parameters and buffers under their own names; this holds the
    model's code, so that names, checkpoints and layer selections written for the model still fit.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._held = [model]

    @property
    def model(self) -> nn.Module:
        """The model whose code runs."""
        return self._held[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        self.model.training = mode
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for name, buffer in self.model._buffers.items():
            if buffer is not None:
                self.model._buffers[name] = fn(buffer)
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return type(self.model).__name__


def regions(model: nn.Module) -> dict[str, fx.GraphModule]:
    """Every compiled part by qualified name: the root (``""``) unless it only calls an island, and parts inside islands."""
    found: dict[str, fx.GraphModule] = {}
    if isinstance(model, fx.GraphModule) and not isinstance(model._modules.get(TOP), Island):
        found[""] = model
    _find(model, "", found, {id(model)})
    return found


def _find(module: nn.Module, prefix: str, found: dict[str, fx.GraphModule], seen: set[int]) -> None:
    for name, child in module._modules.items():
        if child is None or not (child._modules or isinstance(child, fx.GraphModule)) or id(child) in seen:
            continue
        seen.add(id(child))
        if isinstance(child, fx.GraphModule):
            found[prefix + name] = child
        else:
            _find(child, f"{prefix}{name}.", found, seen)


def around_island(model: nn.Module, rungs: list[Rung]) -> fx.GraphModule:
    """A graph module that owns the model's tensors and children, and whose graph calls the model's code."""
    root = nn.Module()
    for name, child in model._modules.items():
        root.add_module(name, child)
    for name, parameter in model._parameters.items():
        root.register_parameter(name, parameter)
    for name, buffer in model._buffers.items():
        root.register_buffer(name, buffer, persistent=name not in model._non_persistent_buffers_set)
    island = Island(model)
    island.training = model.training
    root.add_module(TOP, island)
    graph = fx.Graph()
    nodes = placeholders(graph, model)
    graph.output(graph.call_module(TOP, *forwarded(model, nodes)))
    module = TracedModule(root, graph, type(model).__name__)
    for name, value in {**root._modules, **root._parameters, **root._buffers}.items():
        if not hasattr(module, name):
            setattr(module, name, value)
    module.training = model.training
    module.meta.update(rungs=tuple(rungs), stage="float")
    return module
