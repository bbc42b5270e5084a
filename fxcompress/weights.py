"""Weights files: tensors by name, read without running anything that a file holds."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fxcompress.errors import ConfigError, brief, shown
from fxcompress.files import path_of

__all__ = ["load_weights", "read_saved", "unreadable"]


def load_weights(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Load a weights file (safetensors, or torch's format with tensors only) into ``model``.

    A mapping that holds the weights under ``state_dict`` or ``model`` is opened, and ``module.`` before names is dropped.
    Raises ConfigError where the file is missing, is not such a file, or does not fit, naming every key.
    """
    place = path_of(file, "a weights file")
    if not os.path.isfile(place):  # unlike Path.is_file, it takes names that no file can have
        raise ConfigError(f"there is no weights file {shown(str(file))}.")
    try:
        found: Any = load_file(place) if place.suffix == ".safetensors" else read_saved(place)
    except Exception as error:  # whatever a damaged or hostile file breaks means the same
        raise ConfigError(f"the weights file {str(file)!r} cannot be read: {unreadable(error)}") from error
    for key in ("state_dict", "model"):
        found = found[key] if isinstance(found, Mapping) and isinstance(found.get(key), Mapping) else found
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ConfigError(f"the weights file {str(file)!r} holds no tensors by name.")
    weights = {str(name).removeprefix("module."): value for name, value in found.items()}
    wrong = _mismatches(model, weights)
    if wrong:
        raise ConfigError(f"the weights file {str(file)!r} does not fit: {'; '.join(wrong)}.")
    model.load_state_dict(weights, assign=any(t.is_meta for t in model.state_dict().values()))


def read_saved(place: Path) -> Any:
    """Tensors and plain data that ``torch.save`` wrote; whatever they raise where it is damaged or holds more."""
    if zipfile.is_zipfile(place):
        with zipfile.ZipFile(place) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(damaged)
    return torch.load(place, "cpu", weights_only=True)


def unreadable(error: Exception) -> str:
    """Why ``torch.load(weights_only=True)``, or reading safetensors, refused a file, and what to do about it."""
    if isinstance(error, SafetensorError):
        return f"{brief(error)}."
    if isinstance(error, pickle.UnpicklingError) and "nsupported " in str(error):
        return "it holds more than tensors, which is not read, since that could run code: save model.state_dict() alone."
    return f"it is damaged, or is not what torch.save() writes of model.state_dict() ({type(error).__name__})."


def _mismatches(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    wanted = model.state_dict()
    wrong = [f"{name} is missing" for name in wanted if name not in weights]
    wrong += [f"{name} is not in the model" for name in weights if name not in wanted]
    for name in wanted.keys() & weights.keys():
        if wanted[name].shape != weights[name].shape:
            wrong.append(f"{name} has shape {tuple(weights[name].shape)}, not {tuple(wanted[name].shape)}")
    return sorted(wrong)
