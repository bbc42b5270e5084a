"""Schedules: how sparse a model is at each epoch of training."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from torch import nn

from fxcompress.errors import ConfigError
from fxcompress.options import check_whole
from fxcompress.pruning.masks import check_sparsity
from fxcompress.registry import Registry

__all__ = ["SCHEDULERS", "AGPScheduler", "CubicScheduler", "IterativeScheduler", "OneShotScheduler", "PruningScheduler"]


log = logging.getLogger("fxcompress")


class Masks(Protocol):
    """A pruner that masks a model in place."""

    def apply_mask(self, model: nn.Module, sparsity: float) -> None: ...


class Cuts(Protocol):
    """A pruner that makes a smaller model, with this share of the dense one gone."""

    def prune_step(self, model: nn.Module, sparsity: float) -> nn.Module: ...


class PruningScheduler:
    """Sparsity by epoch: ``initial_sparsity`` before ``start_epoch``, ``target_sparsity`` from ``end_epoch`` on.

    Between them the sparsity follows :attr:`power` of the progress p = (epoch − start) / (end − start) as
    ``s_f + (s_i − s_f)·(1 − p)^power``, and changes only at epochs that :meth:`should_prune` names: every ``frequency``
    epochs after the start, and at the end. Given a ``pruner`` and a ``model``, :meth:`step` prunes the model then, or at
    the next epoch entered where one of them was passed over: in place where the pruner has ``apply_mask``; one with
    ``prune_step`` makes a smaller model, which is then :attr:`model` (an optimizer must be told of its parameters).

    Raises ConfigError for sparsities outside [0, 1), a target below the initial sparsity, negative or reversed epochs.
    """

    power: ClassVar[int] = 1

    def __init__(
        self,
        initial_sparsity: float = 0.0,
        target_sparsity: float = 0.5,
        start_epoch: int = 0,
        end_epoch: int = 100,
        frequency: int = 1,
        *,
        pruner: Masks | Cuts | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.initial_sparsity, self.target_sparsity = check_sparsity(initial_sparsity), check_sparsity(target_sparsity)
        if self.target_sparsity < self.initial_sparsity:
            raise ConfigError(f"target_sparsity {target_sparsity} is below initial_sparsity {initial_sparsity}.")
        for name, value in (("start_epoch", start_epoch), ("end_epoch", end_epoch), ("frequency", frequency)):
            check_whole(name, value)
        if end_epoch < start_epoch:
            raise ConfigError(f"start_epoch {start_epoch} and end_epoch {end_epoch}: 0 <= start <= end.")
        if frequency < 1:
            raise ConfigError(f"frequency is {frequency}; it is at least 1.")
        if (pruner is None) != (model is None):
            raise ConfigError("give a pruner and a model together, or neither.")
        if pruner is not None and not hasattr(pruner, "apply_mask") and not hasattr(pruner, "prune_step"):
            raise ConfigError(
                f"a {type(pruner).__name__} has neither apply_mask nor prune_step; wrap it in a GradualPruner."
            )
        self.start_epoch, self.end_epoch, self.frequency = start_epoch, end_epoch, frequency
        self._pruner: Any = pruner
        self.model = model
        self.epoch = -1

    def sparsity_at(self, epoch: int) -> float:
        """The sparsity in force during ``epoch``."""
        if epoch >= self.end_epoch:
            return self.target_sparsity
        if epoch < self.start_epoch:
            return self.initial_sparsity
        last = epoch - (epoch - self.start_epoch) % self.frequency
        return self._curve((last - self.start_epoch) / (self.end_epoch - self.start_epoch))

    def _curve(self, progress: float) -> float:
        remaining = (1.0 - progress) ** self.power
        return self.target_sparsity + (self.initial_sparsity - self.target_sparsity) * remaining

    def should_prune(self, epoch: int) -> bool:
        """Whether the sparsity may change at ``epoch``."""
        check_whole("epoch", epoch)
        return self._changes_at(epoch)

    def _changes_at(self, epoch: int) -> bool:
        if not self.start_epoch <= epoch <= self.end_epoch:
            return False
        return epoch == self.end_epoch or (epoch - self.start_epoch) % self.frequency == 0

    def step(self, epoch: int) -> float:
        """Enter ``epoch``; returns the sparsity in force, after pruning the model where there is one."""
        check_whole("epoch", epoch)
        before, sparsity = self.get_current_sparsity(), self.sparsity_at(epoch)
        self.epoch = epoch
        due = self.should_prune(epoch) or sparsity != before
        if self._pruner is not None and self.model is not None and due:
            if hasattr(self._pruner, "prune_step"):
                self.model = self._pruner.prune_step(self.model, sparsity)
            else:
                self._pruner.apply_mask(self.model, sparsity)
        return sparsity

    def get_current_sparsity(self) -> float:
        """The sparsity in force at the epoch last entered; the initial one before the first."""
        return self.sparsity_at(self.epoch) if self.epoch >= 0 else self.initial_sparsity

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands, what it was built with, and the pruner's state where it has one."""
        state = {"epoch": self.epoch, **{name: getattr(self, name) for name in _OPTIONS}}
        if hasattr(self._pruner, "state_dict"):
            state["pruner"] = self._pruner.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a saved schedule stood, with what it was built with; a warning is logged where that was different.

        Raises ConfigError for what is no such state, or holds what no schedule can be built with.
        """
        missing = [name for name in ("epoch", *_OPTIONS) if not isinstance(state, Mapping) or name not in state]
        if missing:
            raise ConfigError(f"this is no saved schedule: it has no {', '.join(missing)}.")
        saved = type(self)(**{name: state[name] for name in _OPTIONS})
        check_whole("epoch", state["epoch"], least=-1)
        for name in _OPTIONS:
            if getattr(saved, name) != getattr(self, name):
                log.warning("%s is %r, as it was saved, and no longer %r", name, getattr(saved, name), getattr(self, name))
                setattr(self, name, getattr(saved, name))
        self.epoch = state["epoch"]
        if "pruner" in state and hasattr(self._pruner, "load_state_dict"):
            self._pruner.load_state_dict(state["pruner"])


_OPTIONS = ("initial_sparsity", "target_sparsity", "start_epoch", "end_epoch", "frequency")


class OneShotScheduler(PruningScheduler):
    """The target at once, at ``start_epoch``."""

    def sparsity_at(self, epoch: int) -> float:
        return self.initial_sparsity if epoch < self.start_epoch else self.target_sparsity

    def _changes_at(self, epoch: int) -> bool:
        return epoch == self.start_epoch


class IterativeScheduler(PruningScheduler):
    """Equal steps from the initial sparsity to the target."""


class CubicScheduler(PruningScheduler):
    """Fast at first and slow at the end: the cube of what remains (Zhu & Gupta 2017)."""

    power: ClassVar[int] = 3


class AGPScheduler(CubicScheduler):
    """Automated gradual pruning (Zhu & Gupta 2017): s_t = s_f + (s_i − s_f)·(1 − (t − t_0)/(t_n − t_0))³, clamped."""


SCHEDULERS = Registry(
    "pruning scheduler",
    {cls.__name__: cls for cls in (PruningScheduler, OneShotScheduler, IterativeScheduler, CubicScheduler, AGPScheduler)},
)
"""Pruning schedules by name."""
