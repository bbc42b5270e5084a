"""What the quantizers share: each is a plan in parts under one name, run part by part or at once."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import fx, nn

from fxcompress.errors import ConfigError
from fxcompress.graph.trace import is_traced
from fxcompress.ledger import Ledger
from fxcompress.manager import PassManager
from fxcompress.plan import Plan

__all__ = ["Quantizer", "check_stage", "in_eval_mode"]


class Quantizer:
    """A plan in two parts: ``prepare`` copies and rewrites a model, ``convert`` gives the quantized one.

    :attr:`ledger` holds the rows of the last call. ``trains`` says whether a prepared model keeps its training mode (it is
    put in eval mode otherwise); ``converts`` is the stage that :meth:`convert` takes, ``how`` the calls that lead there.
    """

    trains: ClassVar[bool] = False
    converts: str = "observed"
    how: ClassVar[str] = "prepare(model)"

    def __init__(self, prepare: Plan, convert: Plan, *, verify: bool = True, progress: bool | None = None) -> None:
        self._prepare, self._convert = prepare, convert
        self._verify, self._progress = verify, progress
        self.ledger = Ledger()

    @property
    def preparation(self) -> Plan:
        """What :meth:`prepare` runs."""
        return self._prepare

    @property
    def conversion(self) -> Plan:
        """What :meth:`convert` runs."""
        return self._convert

    @property
    def plan(self) -> Plan:
        """Everything that is run, in order."""
        return self._prepare + self._convert

    def prepare(self, model: nn.Module, example_inputs: Any = None) -> fx.GraphModule:
        """A copy of ``model``, rewritten and ready for calibration or training."""
        return self._run(self._prepare, model if self.trains else in_eval_mode(model), example_inputs)

    def convert(self, model: nn.Module, example_inputs: Any = None) -> fx.GraphModule:
        """The quantized model, from one that was prepared and has seen data."""
        check_stage(model, self.converts, self.how)
        return self._run(self._convert, in_eval_mode(model), example_inputs)

    def _run(self, plan: Plan, model: nn.Module, example_inputs: Any, data: Iterable[Any] | None = None) -> fx.GraphModule:
        manager = PassManager(plan, verify=self._verify, progress=self._progress)
        self.ledger = manager.ledger
        return manager.run(model, example_inputs, data)


def in_eval_mode(model: nn.Module) -> nn.Module:
    """``model`` itself where it is in eval mode; otherwise a copy that is."""
    return copy.deepcopy(model).eval() if any(module.training for module in model.modules()) else model


def check_stage(model: nn.Module, stage: str, how: str) -> None:
    """Raise ConfigError unless ``model`` is a graph of this stage; ``how`` names the calls that lead there."""
    found = model.meta["stage"] if isinstance(model, fx.GraphModule) and is_traced(model) else "not traced"
    if found != stage:
        raise ConfigError(f"this takes a model that is {stage}, and it is {found}; call {how} first.")
