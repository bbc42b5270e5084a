"""Post-training quantization: each quantizer is a short plan over a traced graph."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx, nn

from fxcompress import backends
from fxcompress.errors import ConfigError, did_you_mean
from fxcompress.graph.trace import is_traced
from fxcompress.ledger import Ledger
from fxcompress.manager import PassManager
from fxcompress.pass_base import Context
from fxcompress.plan import Plan
from fxcompress.quantization.calibrator import CALIBRATORS, build_calibrator
from fxcompress.quantization.grid import grid

__all__ = ["PTQQuantizer", "StaticQuantizer"]


class PTQQuantizer:
    """Quantizes a trained model with ranges found on a few batches.

    ``backend``                  where the converted model runs: ``fbgemm`` (also ``x86``, ``onednn``)
    ``dtype``                    ``int8``, or ``uint8``: both name 8-bit integers; the backend's table says which of its
                                 tensors are signed
    ``per_channel``              a weight scale per output channel, where the backend has it
    ``symmetric``                symmetric weights (activations are as the backend wants them)
    ``calibration_method``       a calibrator's name; ``calibrator_options`` are its parameters
    ``num_calibration_batches``  a ceiling; fewer batches than asked is said in the ledger
    ``include_layers``, ``exclude_layers``  qualified names or globs; a name takes everything below it
    ``reduce_range``             None: as the CPU needs it; True: 7-bit activations; False: full range regardless

    The model given is copied and put in eval mode; the caller's stays as it is. :attr:`ledger` holds the rows of the last
    call, :attr:`plan` the whole plan.
    """

    def __init__(
        self,
        backend: str = "fbgemm",
        dtype: str = "int8",
        per_channel: bool = True,
        symmetric: bool = True,
        calibration_method: str = "histogram",
        num_calibration_batches: int = 100,
        *,
        calibrator_options: dict[str, Any] | None = None,
        include_layers: Sequence[str] | None = None,
        exclude_layers: Sequence[str] = (),
        reduce_range: bool | None = None,
        verify: bool = True,
        progress: bool | None = None,
    ) -> None:
        backends.find(backend)
        grid(dtype)
        if calibration_method not in CALIBRATORS:
            hint = did_you_mean(calibration_method, CALIBRATORS)
            raise ConfigError(
                f"there is no calibration_method {calibration_method!r}.{hint} Known: {', '.join(CALIBRATORS)}."
            )
        if not isinstance(num_calibration_batches, int) or num_calibration_batches < 1:
            raise ConfigError(f"num_calibration_batches is {num_calibration_batches!r}; it is a positive integer.")
        if not symmetric:
            raise ConfigError("symmetric=False: the kernels of this backend take symmetric int8 weights only.")
        build_calibrator(calibration_method, **(calibrator_options or {}))
        self.backend, self.dtype, self.per_channel, self.symmetric = backend, dtype, per_channel, symmetric
        self.calibration_method, self.num_calibration_batches = calibration_method, num_calibration_batches
        self.ledger = Ledger()
        self._verify, self._progress = verify, progress
        observe = {
            "backend": backend,
            "calibrator": calibration_method,
            "calibrator_options": dict(calibrator_options or {}),
            "per_channel": per_channel,
            "include_layers": None if include_layers is None else list(include_layers),
            "exclude_layers": list(exclude_layers),
            "reduce_range": reduce_range,
        }
        self._prepare = Plan.parse(
            [{"remove-dead": {"dropout": True}}, "fold-batchnorm", "fuse-activations", {"insert-observers": observe}]
        )
        self._calibrate = Plan.parse([{"calibrate": {"num_batches": num_calibration_batches}}])
        self._convert = Plan.parse(["fold-quantization", "lower"])

    @property
    def plan(self) -> Plan:
        """Everything :meth:`quantize` runs, in order."""
        return self._prepare + self._calibrate + self._convert

    def prepare(self, model: nn.Module, example_inputs: Any = None) -> fx.GraphModule:
        """A copy of ``model``, folded and fused, with an observer on every value that will be quantized."""
        return self._run(self._prepare, _in_eval_mode(model), example_inputs)

    def calibrate(self, model: nn.Module, dataloader: Iterable[Any]) -> fx.GraphModule:
        """Let the observers of a prepared model see the data; returns the same prepared model, calibrated.

        The observers belong to the prepared model, so it is changed in place.
        """
        _check_stage(model, "observed", "prepare(model)")
        assert isinstance(model, fx.GraphModule)
        context = Context(data=dataloader, progress=self._progress)
        for step in self._calibrate:
            step.run_model(model, context)
        return model

    def convert(self, model: nn.Module, example_inputs: Any = None) -> fx.GraphModule:
        """The model in the backend's integer kernels, from a calibrated one."""
        _check_stage(model, "observed", "prepare(model) and calibrate(model, dataloader)")
        return self._run(self._convert, model, example_inputs)

    def quantize(self, model: nn.Module, dataloader: Iterable[Any], example_inputs: Any = None) -> fx.GraphModule:
        """Prepare, calibrate and convert in one run."""
        return self._run(self.plan, _in_eval_mode(model), example_inputs, dataloader)

    def _run(self, plan: Plan, model: nn.Module, example_inputs: Any, data: Iterable[Any] | None = None) -> fx.GraphModule:
        manager = PassManager(plan, verify=self._verify, progress=self._progress)
        self.ledger = manager.ledger
        return manager.run(model, example_inputs, data)


class StaticQuantizer(PTQQuantizer):
    """Static quantization: activation ranges are calibrated ahead. What :class:`PTQQuantizer` does for 8-bit integers."""


def _in_eval_mode(model: nn.Module) -> nn.Module:
    """``model`` itself where it is in eval mode; otherwise a copy that is."""
    return copy.deepcopy(model).eval() if any(module.training for module in model.modules()) else model


def _check_stage(model: nn.Module, stage: str, how: str) -> None:
    found = model.meta["stage"] if isinstance(model, fx.GraphModule) and is_traced(model) else "not traced"
    if found != stage:
        raise ConfigError(f"this takes a model that is {stage}, and it is {found}; call {how} first.")
