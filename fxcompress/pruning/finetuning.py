"""Training after pruning."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from torch import nn

from fxcompress.errors import ConfigError, did_you_mean
from fxcompress.training import History, Recipe, Trainer, train

__all__ = ["finetune"]


def finetune(model: nn.Module, dataloader: Iterable[Any], *, loss: Any = "cross_entropy", **options: Any) -> History:
    """Train a pruned model in place; returns its history.

    ``options`` are those of a :class:`fxcompress.training.Recipe`, or of :func:`fxcompress.training.train`.
    """
    names = {field.name for field in fields(Recipe)}
    known = names | (set(inspect.signature(Trainer).parameters) - {"model", "data", "recipe", "loss"})
    for key in options:
        if key not in known:
            raise ConfigError(f"training has no option {key!r}.{did_you_mean(key, known)}")
    recipe = Recipe(**{key: value for key, value in options.items() if key in names})
    return train(model, dataloader, recipe, loss=loss, **{k: v for k, v in options.items() if k not in names})
