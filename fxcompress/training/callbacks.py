"""Callbacks: what may take part in a training run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxcompress.distributed import is_main
from fxcompress.errors import ConfigError

if TYPE_CHECKING:
    from fxcompress.training.loop import Trainer

__all__ = ["Callback", "KeepZeros", "OnEpoch", "TensorBoard"]


class Callback:
    """Takes part in a training run; every method may be left out.

    A callback with a state of its own gives it as ``state_dict()`` (tensors and plain data) and takes it up in
    ``load_state_dict(state)``, so that a resumed run goes on exactly.
    """

    def enter_epoch(self, trainer: Trainer, epoch: int) -> None:
        """``epoch`` (from 0) begins and the model is in training mode: the place to mask, freeze or unfreeze.

        A resumed run calls this for every epoch it had entered, in order, before it takes up the saved weights.
        """

    def after_step(self, trainer: Trainer, step: int) -> None:
        """``step`` optimizer steps have been taken."""

    def end_epoch(self, trainer: Trainer, row: Mapping[str, float]) -> None:
        """An epoch is over and evaluated; ``row`` is its line in the history."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""


class OnEpoch(Callback):
    """Calls ``function(epoch)`` as every epoch begins: ``OnEpoch(schedule.step)`` prunes on a schedule."""

    def __init__(self, function: Callable[[int], object]) -> None:
        self.function = function

    def enter_epoch(self, trainer: Trainer, epoch: int) -> None:
        self.function(epoch)


class KeepZeros(Callback):
    """Weights (of two or more dimensions) that are zero when training begins stay zero."""

    def __init__(self, model: nn.Module) -> None:
        weights = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
        masks = [(p, p.detach() != 0) for p in weights]
        self._masks = [(p, mask) for p, mask in masks if not bool(mask.all())]

    def after_step(self, trainer: Trainer, step: int) -> None:
        with torch.no_grad():
            for parameter, mask in self._masks:
                parameter.mul_(mask.to(parameter.device))


class TensorBoard(Callback):
    """Writes the history to a folder that TensorBoard shows. ConfigError where tensorboard is not installed."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise ConfigError("log_dir needs tensorboard, which is not installed: pip install tensorboard") from error
        self._writer = SummaryWriter(str(folder)) if is_main() else None

    def end_epoch(self, trainer: Trainer, row: Mapping[str, float]) -> None:
        if self._writer is not None:
            for name in row.keys() - {"epoch", "step"}:
                self._writer.add_scalar(name, row[name], int(row["step"]))
            self._writer.flush()
