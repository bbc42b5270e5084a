"""Training that is interrupted after a step."""

from __future__ import annotations

from fxcompress.training import Callback, Trainer

__all__ = ["StopAfter", "StoppedError"]


class StoppedError(Exception):
    """The run is interrupted here."""


class StopAfter(Callback):
    """Interrupts a run once ``step`` steps have been taken."""

    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, trainer: Trainer, step: int) -> None:
        if step == self.step:
            raise StoppedError
