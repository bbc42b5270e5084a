"""Checkpoints: everything a training run needs to go on as if it had never stopped, in one file that appears whole."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxcompress.distributed import rank, world
from fxcompress.errors import ArtifactError, ConfigError, FxCompressError, brief
from fxcompress.files import make_folder, whole
from fxcompress.weights import read_saved, unreadable

if TYPE_CHECKING:
    from fxcompress.training.callbacks import Callback
    from fxcompress.training.loop import Trainer

__all__ = ["captured", "read", "take_up", "write"]


def write(state: Mapping[str, Any], path: Path) -> None:
    """Write ``state`` to ``path``; a process killed at any moment leaves the previous file or the new one."""
    make_folder(path.parent)
    with whole(path) as draft, open(draft, "wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> dict[str, Any]:
    """What :func:`write` wrote. Only tensors and plain data are read; ArtifactError for anything else, or damage."""
    if not zipfile.is_zipfile(path):  # older and foreign formats have other readers, which warn and guess
        raise ArtifactError(f"the checkpoint {str(path)!r} cannot be read: it is not a file that a training run wrote.")
    try:
        state = read_saved(path)
    except Exception as error:  # whatever a damaged file breaks means the same
        raise ArtifactError(f"the checkpoint {str(path)!r} cannot be read: {unreadable(error)}") from error
    if not isinstance(state, dict) or "recipe" not in state:
        raise ArtifactError(f"{str(path)!r} is not a checkpoint of a training run.")
    return state


def captured(trainer: Trainer, generators: list[Any]) -> dict[str, Any]:
    """A run as plain data and tensors; ``generators`` is the random state of every process."""
    return {
        "recipe": trainer.recipe.as_data(),
        "processes": world(),
        "epoch": trainer.epoch,
        "step": trainer.step,
        "batch": trainer.batch,
        "model": _model_state(trainer.model),
        "parts": {name: part.state_dict() for name, part in trainer.parts.items()},
        "first": trainer.first,
        "history": trainer.history.as_data(),
        "random": generators,
        "callbacks": [callback.state_dict() for callback in _with_state(trainer)],
    }


def take_up(trainer: Trainer, state: dict[str, Any], path: Path) -> Any:
    """Make a run that has not begun what ``state`` says; returns this process's random state."""
    try:
        return _taken_up(trainer, state, path)
    except FxCompressError:
        raise
    except Exception as error:  # a damaged state breaks anything
        reason = f"cannot be taken up: {brief(error)}. Delete it, or name another."
        raise ArtifactError(f"the checkpoint {str(path)!r} {reason}") from error


def _taken_up(trainer: Trainer, state: dict[str, Any], path: Path) -> Any:
    _check_same_run(trainer, state, path)
    for epoch in range(state["epoch"] + (state["batch"] > 0)):
        trainer.enter(epoch)
    _load_model_state(trainer.model, state["model"])
    trainer.epoch, trainer.step, trainer.batch = state["epoch"], state["step"], state["batch"]
    for name, part in trainer.parts.items():
        part.load_state_dict(state["parts"][name])
    trainer.first = state["first"]
    trainer.history.rows, trainer.history.stopped = state["history"]["rows"], state["history"]["stopped"]
    for callback, saved in zip(_with_state(trainer), state["callbacks"], strict=True):
        callback.load_state_dict(saved)
    return state["random"][rank()]


def _check_same_run(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    mine = {**trainer.recipe.as_data(), "processes": world(), "callbacks": len(_with_state(trainer))}
    saved = {**state["recipe"], "processes": state["processes"], "callbacks": len(state["callbacks"])}
    parts = [f"{name} was {saved.get(name)!r} and is {mine[name]!r}" for name in mine if saved.get(name) != mine[name]]
    if parts:
        raise ConfigError(f"the checkpoint {str(path)!r} is of another run: {', '.join(parts)}. Delete it, or name another.")


def _with_state(trainer: Trainer) -> list[Callback]:
    return [callback for callback in trainer.callbacks if callback.state_dict()]


def _model_state(model: nn.Module) -> dict[str, Any]:
    """Parameters and buffers (those that ``state_dict`` leaves out too), and which modules are in eval mode."""
    state = model.state_dict()
    hidden = {name: buffer for name, buffer in model.named_buffers() if name not in state}
    resting = [name for name, module in model.named_modules() if not module.training]
    return {"state": state, "hidden": hidden, "eval": resting}


def _load_model_state(model: nn.Module, saved: Mapping[str, Any]) -> None:
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
