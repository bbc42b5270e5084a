"""The last rung: a module whose own code stays Python, while its traceable children are compiled in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

__all__ = ["TOP", "Island", "regions"]

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
    found = {name: m for name, m in model.named_modules() if isinstance(m, fx.GraphModule)}
    if "" in found and isinstance(getattr(model, TOP, None), Island):
        del found[""]
    return {name: m for name, m in found.items() if not _inside(name, found)}


def _inside(name: str, found: dict[str, torch.fx.GraphModule]) -> bool:
    return any(name.startswith(outer + ".") for outer in found if outer and outer != name) and name != ""
