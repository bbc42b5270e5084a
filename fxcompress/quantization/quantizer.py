"""What the quantizers share: each is a plan in parts under one name, run part by part or at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import fx, nn

from fxcompress.errors import ConfigError, did_you_mean, shown
from fxcompress.graph.copying import copied_model
from fxcompress.graph.select import listed
from fxcompress.graph.trace import is_traced
from fxcompress.graph.tree import check_module
from fxcompress.ledger import Ledger
from fxcompress.manager import PassManager
from fxcompress.plan import Plan
from fxcompress.quantization.calibrator import CALIBRATORS
from fxcompress.quantization.observer import check_calibrator
from fxcompress.quantization.overrides import Overrides

__all__ = ["Quantizer", "check_dtype", "check_method", "check_stage", "chosen_layers", "in_eval_mode"]


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
    """``model`` itself where it is in eval mode; otherwise a copy that is. Raises ConfigError for what is no module."""
    check_module(model)
    return copied_model(model).eval() if any(module.training for module in model.modules()) else model


def check_stage(model: nn.Module, stage: str, how: str) -> None:
    """Raise ConfigError unless ``model`` is a graph of this stage; ``how`` names the calls that lead there."""
    found = model.meta["stage"] if isinstance(model, fx.GraphModule) and is_traced(model) else "not traced"
    if found != stage:
        raise ConfigError(f"this takes a model that is {stage}, and it is {found}; call {how} first.")


DTYPES = ("int8", "uint8", "fp16")


def check_dtype(dtype: str, known: Sequence[str] = DTYPES) -> None:
    """Raise ConfigError for a dtype that a quantizer does not have."""
    if dtype not in known:
        raise ConfigError(f"there is no dtype {shown(dtype)}.{did_you_mean(str(dtype), known)} Known: {', '.join(known)}.")


def check_method(option: str, name: str, options: Mapping[str, Any] | None) -> None:
    """Raise ConfigError for a calibrator nobody has, named by ``option``, or for parameters it does not take."""
    if name not in CALIBRATORS:
        hint = did_you_mean(str(name), CALIBRATORS)
        raise ConfigError(f"there is no {option} {name!r}.{hint} Known: {', '.join(CALIBRATORS)}.")
    check_calibrator(name, options or {}, "observer_options" if option == "observer" else "calibrator_options")


def chosen_layers(
    include: Sequence[str] | None, exclude: Sequence[str], overrides: Mapping[str, Mapping[str, Any]] | None
) -> dict[str, Any]:
    """The options by which a pass knows its layers, checked."""
    Overrides(overrides or {})
    return {
        "include_layers": None if include is None else listed("include_layers", include),
        "exclude_layers": listed("exclude_layers", exclude),
        "overrides": {pattern: dict(options) for pattern, options in (overrides or {}).items()},
    }
