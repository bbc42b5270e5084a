"""Weights files: tensors by name, read without running anything that a file holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fxcompress.errors import ConfigError, shown

__all__ = ["load_weights"]


def load_weights(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Load a weights file (safetensors, or torch's format with tensors only) into ``model``.

    A mapping that holds the weights under ``state_dict`` or ``model`` is opened, and ``module.`` before names is dropped.
    Raises ConfigError where the file is missing, is not such a file, or does not fit, naming every key.
    """
    place = Path(file)
    if not os.path.isfile(place):  # unlike Path.is_file, it takes names that no file can have
        raise ConfigError(f"there is no weights file {shown(str(file))}.")
    try:
        found: Any = load_file(place) if place.suffix == ".safetensors" else torch.load(place, "cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file breaks means the same
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"the weights file {str(file)!r} cannot be read: {reason}") from error
    for key in ("state_dict", "model"):
        found = found[key] if isinstance(found, Mapping) and isinstance(found.get(key), Mapping) else found
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ConfigError(f"the weights file {str(file)!r} holds no tensors by name.")
    weights = {str(name).removeprefix("module."): value for name, value in found.items()}
    wrong = _mismatches(model, weights)
    if wrong:
        raise ConfigError(f"the weights file {str(file)!r} does not fit: {'; '.join(wrong)}.")
    model.load_state_dict(weights, assign=any(t.is_meta for t in model.state_dict().values()))


def _mismatches(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    wanted = model.state_dict()
    wrong = [f"{name} is missing" for name in wanted if name not in weights]
    wrong += [f"{name} is not in the model" for name in weights if name not in wanted]
    for name in wanted.keys() & weights.keys():
        if wanted[name].shape != weights[name].shape:
            wrong.append(f"{name} has shape {tuple(weights[name].shape)}, not {tuple(wanted[name].shape)}")
    return sorted(wrong)
