"""What of a run's weights is kept: a moving average of them, and the best epoch's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from fxcompress.errors import ConfigError
from fxcompress.training.recipe import Recipe

__all__ = ["Average", "Best"]


class Average:
    """An exponential moving average of parameters, a ← decay·a + (1 − decay)·p after every step; nothing for decay None."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float | None) -> None:
        self.parameters = parameters
        self.values = [] if decay is None else [p.detach().clone() for p in parameters]
        self._update = swa_utils.get_ema_multi_avg_fn(decay or 0.0)

    def update(self) -> None:
        """Take in the parameters as they are now."""
        if self.values:
            with torch.no_grad():
                self._update(self.values, self.parameters, 0)

    def swap(self) -> None:
        """Exchange the parameters with their averages."""
        for parameter, value in zip(self.parameters, self.values, strict=False):
            parameter.data, value.data = value.data, parameter.data

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averages as its parameters inside a ``with``."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for value, saved in zip(self.values, state["values"], strict=True):
            value.copy_(saved)


class Best:
    """The weights of the best epoch, and for how many epochs there has been no better one."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.value: float | None = None
        self.waited = 0
        self.tensors: dict[str, Tensor] | None = None

    def watch(self, row: dict[str, float], model: nn.Module) -> str:
        """Look at an epoch; why training should stop, or an empty string."""
        patience, metric = self.recipe.patience, self.recipe.metric
        if patience is None:
            return ""
        if metric not in row:
            raise ConfigError(f"metric is {metric!r}, and an epoch gives: {', '.join(row)}. Give evaluate=...")
        if self.recipe.better(row[metric], self.value):
            self.value, self.waited = row[metric], 0
            self.tensors = {name: value.detach().clone() for name, value in _tensors(model).items()}
        else:
            self.waited += 1
        return f"{metric} has not improved on {self.value:.6g} for {self.waited} epochs" if self.waited >= patience else ""

    def give_back(self, model: nn.Module) -> None:
        """Put the best epoch's weights into the model, where one was kept."""
        if self.tensors is None:
            return
        with torch.no_grad():
            for name, value in _tensors(model).items():
                value.copy_(self.tensors[name])

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "waited": self.waited, "tensors": self.tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.waited, self.tensors = state["value"], state["waited"], state["tensors"]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
