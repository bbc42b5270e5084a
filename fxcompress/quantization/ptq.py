"""Post-training quantization: each quantizer is a short plan over a traced graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import fx, nn

from fxcompress import backends
from fxcompress.errors import ConfigError, did_you_mean
from fxcompress.pass_base import Context
from fxcompress.plan import Plan
from fxcompress.quantization.calibrator import CALIBRATORS, build_calibrator
from fxcompress.quantization.grid import grid
from fxcompress.quantization.overrides import Overrides
from fxcompress.quantization.quantizer import Quantizer, check_stage, in_eval_mode

__all__ = ["PTQQuantizer", "StaticQuantizer"]


class PTQQuantizer(Quantizer):
    """Quantizes a trained model with ranges found on a few batches.

    ``backend``                  where the converted model runs: ``fbgemm`` (also ``x86``, ``onednn``), ``qnnpack``,
                                 ``onnxruntime``, ``openvino``, ``tensorrt``; ``auto``: the fastest of those installed
    ``dtype``                    ``int8``, or ``uint8``: both name 8-bit integers; the backend's table says which of its
                                 tensors are signed
    ``per_channel``              a weight scale per output channel, where the backend has it
    ``symmetric``                symmetric weights; False: affine ones, where the backend has them (activations are as the
                                 backend wants them)
    ``calibration_method``       a calibrator's name; ``calibrator_options`` are its parameters
    ``num_calibration_batches``  a ceiling; fewer batches than asked is said in the ledger
    ``include_layers``, ``exclude_layers``  qualified names or globs; a name takes everything below it
    ``overrides``                ``{name or glob: {bits, weight_bits, activation_bits, calibrator, calibrator_options,
                                 per_channel, symmetric, float}}``, layer by layer
    ``reduce_range``             None: as the CPU needs it; True: 7-bit activations; False: full range regardless

    The model given is copied and put in eval mode; the caller's stays as it is. :attr:`ledger` holds the rows of the last
    call, :attr:`plan` the whole plan.
    """

    how: ClassVar[str] = "prepare(model) and calibrate(model, dataloader)"

    def __init__(
        self,
        backend: str = "fbgemm",
        dtype: str = "int8",
        per_channel: bool = True,
        symmetric: bool = True,
        calibration_method: str = "histogram",
        num_calibration_batches: int = 100,
        *,
        calibrator_options: Mapping[str, Any] | None = None,
        include_layers: Sequence[str] | None = None,
        exclude_layers: Sequence[str] = (),
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
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
        build_calibrator(calibration_method, **(calibrator_options or {}))
        Overrides(overrides or {})
        self.backend, self.dtype, self.per_channel, self.symmetric = backend, dtype, per_channel, symmetric
        self.calibration_method, self.num_calibration_batches = calibration_method, num_calibration_batches
        observe = {
            "backend": backend,
            "calibrator": calibration_method,
            "calibrator_options": dict(calibrator_options or {}),
            "per_channel": per_channel,
            "symmetric": symmetric,
            "include_layers": None if include_layers is None else list(include_layers),
            "exclude_layers": list(exclude_layers),
            "overrides": {pattern: dict(options) for pattern, options in (overrides or {}).items()},
            "reduce_range": reduce_range,
        }
        super().__init__(
            Plan.parse(
                [
                    {"remove-dead": {"dropout": True}},
                    "open-attention",
                    "fold-batchnorm",
                    "fuse-activations",
                    {"insert-observers": observe},
                ]
            ),
            Plan.parse(["fold-quantization", "lower"]),
            verify=verify,
            progress=progress,
        )
        self._calibrate = Plan.parse([{"calibrate": {"num_batches": num_calibration_batches}}])

    @property
    def plan(self) -> Plan:
        """Everything :meth:`quantize` runs, in order."""
        return self._prepare + self._calibrate + self._convert

    def calibrate(self, model: nn.Module, dataloader: Iterable[Any]) -> fx.GraphModule:
        """Let the observers of a prepared model see the data; returns the same prepared model, calibrated.

        The observers belong to the prepared model, so it is changed in place.
        """
        check_stage(model, "observed", "prepare(model)")
        assert isinstance(model, fx.GraphModule)
        context = Context(data=dataloader, progress=self._progress)
        for step in self._calibrate:
            step.run_model(model, context)
        return model

    def quantize(self, model: nn.Module, dataloader: Iterable[Any], example_inputs: Any = None) -> fx.GraphModule:
        """Prepare, calibrate and convert in one run."""
        return self._run(self.plan, in_eval_mode(model), example_inputs, dataloader)


class StaticQuantizer(PTQQuantizer):
    """Static quantization: activation ranges are calibrated ahead. What :class:`PTQQuantizer` does for 8-bit integers."""
