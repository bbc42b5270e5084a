"""The classes that a saved model may name, and how a layer of each is made."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from fxcompress.errors import ArtifactError
from fxcompress.graph import recurrent, spellings

__all__ = ["CONSTRUCTED", "is_masked", "known_classes", "plain_class", "resolve_class"]

_RECURRENT = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")

CONSTRUCTED: dict[type, tuple[str, ...]] = {
    nn.LSTM: (*_RECURRENT, "proj_size"),
    nn.GRU: _RECURRENT,
    nn.RNN: (*_RECURRENT, "nonlinearity"),
}
"""Layers that keep more than plain attributes, with the arguments of their constructor."""


@functools.cache
def known_classes() -> dict[str, type[nn.Module]]:
    """Classes that may be built from data: the op table's, plain layers of torch.nn, and our own observers."""
    observer = importlib.import_module("fxcompress.quantization.observer").ActivationObserver
    fake = importlib.import_module("fxcompress.quantization.fake_quant")
    layers = [cls for cls in vars(nn).values() if isinstance(cls, type) and issubclass(cls, nn.Module)]
    named = {
        f"{cls.__module__}.{cls.__qualname__}": cls
        for cls in [*layers, observer, *fake.CLASSES, *recurrent.CLASSES.values()]
    }
    return {**named, **spellings.known_classes()}


def resolve_class(name: str) -> type[nn.Module]:
    """The class of that name, if it is allowed. Raises ArtifactError otherwise."""
    if name in known_classes():
        return known_classes()[name]
    if name in spellings.known_class_names():
        package, _, cls = name.rpartition(".")
        return getattr(importlib.import_module(package), cls)
    raise ArtifactError(f"the saved model has a layer of class {name!r}, which is not in the allow-list.")


def plain_class(module: nn.Module) -> type:
    """The class of a module; of a masked one, the class it had before ``parametrize`` made one for it."""
    return type(module).__mro__[1] if is_masked(module) else type(module)


def is_masked(module: nn.Module) -> bool:
    """Whether a module has parametrizations, all of which can be saved as modules over one original tensor."""
    lists: Any = getattr(module, "parametrizations", None)
    if not parametrize.is_parametrized(module):
        return False
    return all(held.is_tensor and all(spellings.is_known_module(part) for part in held) for held in lists.values())
