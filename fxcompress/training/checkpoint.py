"""Checkpoints: everything a training run needs to go on as if it had never stopped, in one file that appears whole."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.errors import ArtifactError, ConfigError

__all__ = ["load_model_state", "model_state", "read", "write"]


def write(state: Mapping[str, Any], path: Path) -> None:
    """Write ``state`` to ``path``; a process killed at any moment leaves the previous file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read(path: Path) -> dict[str, Any]:
    """What :func:`write` wrote. Only tensors and plain data are read; ArtifactError for anything else, or damage."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ArtifactError(f"the checkpoint {str(path)!r} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or "recipe" not in state:
        raise ArtifactError(f"{str(path)!r} is not a checkpoint of a training run.")
    return state


def model_state(model: nn.Module) -> dict[str, Any]:
    """Parameters and buffers (those that ``state_dict`` leaves out too), and which modules are in eval mode."""
    state = model.state_dict()
    hidden = {name: buffer for name, buffer in model.named_buffers() if name not in state}
    resting = [name for name, module in model.named_modules() if not module.training]
    return {"state": state, "hidden": hidden, "eval": resting}


def load_model_state(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Take up a :func:`model_state`; ConfigError where the model is another."""
    try:
        model.load_state_dict(saved["state"])
    except RuntimeError as error:
        raise ConfigError(f"the checkpoint is of another model: {' '.join(str(error).split())}") from error
    buffers: dict[str, Tensor] = dict(model.named_buffers())
    with torch.no_grad():
        for name, value in saved["hidden"].items():
            buffers[name].copy_(value)
    resting = set(saved["eval"])
    for name, module in model.named_modules():
        module.training = name not in resting
