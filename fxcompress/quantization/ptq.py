"""Post-training quantization: each quantizer is a short plan over a traced graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import fx, nn

from fxcompress import backends
from fxcompress.data import fed
from fxcompress.errors import ConfigError
from fxcompress.graph.select import Layer
from fxcompress.graph.trace import trace
from fxcompress.manager import example_call
from fxcompress.options import check_given
from fxcompress.pass_base import Context
from fxcompress.plan import Plan
from fxcompress.quantization.quantizer import (
    Quantizer,
    check_dtype,
    check_method,
    check_stage,
    chosen_layers,
    in_eval_mode,
)

__all__ = ["DynamicQuantizer", "PTQQuantizer", "StaticQuantizer"]


class PTQQuantizer(Quantizer):
    """Quantizes a trained model with ranges found on a few batches.

    ``backend``                  where the converted model runs: ``fbgemm`` (also ``x86``, ``onednn``), ``qnnpack``,
                                 ``onnxruntime``, ``openvino``, ``tensorrt``; ``auto``: the fastest of those installed
    ``dtype``                    ``int8``, or ``uint8``: both name 8-bit integers; the backend's table says which of its
                                 tensors are signed. ``fp16``: weights and activations in half precision, fragile operators
                                 in fp32, no calibration; it runs in torch whatever the backend
    ``per_channel``              a weight scale per output channel, where the backend has it
    ``symmetric``                symmetric weights; False: affine ones, where the backend has them (activations are as the
                                 backend wants them)
    ``calibration_method``       a calibrator's name; ``calibrator_options`` are its parameters
    ``num_calibration_batches``  a ceiling; fewer batches than asked is a warning, logged and in the ledger
    ``include_layers``, ``exclude_layers``  by name, glob, ``re:`` or ``type:``, with everything below
    ``overrides``                ``{layers: {bits, weight_bits, activation_bits, calibrator, calibrator_options,
                                 per_channel, symmetric, float}}``, layer by layer
    ``reduce_range``             None: as the CPU needs it; True: 7-bit activations; False: full range regardless
    ``recover``                  options of the pass ``recover-accuracy``, such as ``{"max_drop": 0.5}``: what is done where
                                 quantization costs more; None: nothing
    ``never_slower``             measure what runs in integers against float, and put back to float what is slower

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
        include_layers: Sequence[Layer] | None = None,
        exclude_layers: Sequence[Layer] = (),
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        reduce_range: bool | None = None,
        recover: Mapping[str, Any] | None = None,
        never_slower: bool = False,
        verify: bool = True,
        progress: bool | None = None,
    ) -> None:
        check_given(PTQQuantizer, locals())
        backends.find(backend)
        check_dtype(dtype)
        check_method("calibration_method", calibration_method, calibrator_options)
        if not isinstance(num_calibration_batches, int) or num_calibration_batches < 1:
            raise ConfigError(f"num_calibration_batches is {num_calibration_batches!r}; it is a positive integer.")
        self.backend, self.dtype, self.per_channel, self.symmetric = backend, dtype, per_channel, symmetric
        self.calibration_method, self.num_calibration_batches = calibration_method, num_calibration_batches
        chosen = chosen_layers(include_layers, exclude_layers, overrides)
        observe = chosen | {
            "backend": backend,
            "dtype": dtype,
            "calibrator": calibration_method,
            "calibrator_options": dict(calibrator_options or {}),
            "per_channel": per_channel,
            "symmetric": symmetric,
            "reduce_range": reduce_range,
        }
        if dtype == "fp16":
            if recover is not None:
                raise ConfigError("recover is what mends 8-bit integers; with dtype 'fp16' there is nothing to mend.")
            prepare, convert = _half(chosen)
            self.converts, self._calibrate = "float", Plan()
        else:
            folded = _fold(matmuls="matmul" in backends.find(backend).rules)
            prepare = Plan.parse([*folded, "fuse-activations", {"insert-observers": observe}])
            convert = Plan.parse(["fold-quantization", *(["revert-slow"] if never_slower else []), "lower"])
            remedy = [] if recover is None else [{"recover-accuracy": dict(recover)}]
            self._calibrate = Plan.parse([{"calibrate": {"num_batches": num_calibration_batches}}, *remedy])
        super().__init__(prepare, convert, verify=verify, progress=progress)

    @property
    def plan(self) -> Plan:
        """Everything :meth:`quantize` runs, in order."""
        return self._prepare + self._calibrate + self._convert

    def calibrate(self, model: nn.Module, dataloader: Iterable[Any]) -> fx.GraphModule:
        """Let the observers of a prepared model see the data; returns the same prepared model, calibrated.

        The observers belong to the prepared model, so it is changed in place. With ``dtype="fp16"`` there is nothing to see.
        """
        check_stage(model, self.converts, "prepare(model)")
        assert isinstance(model, fx.GraphModule)
        dataloader = fed(dataloader) if self._calibrate else dataloader
        context = Context(data=dataloader, progress=self._progress)
        for step in self._calibrate:
            step.run_model(model, context)
        call = example_call(None, dataloader, model) if self._calibrate else None
        if call is not None:  # shapes, for what counts multiply-accumulates
            trace(model, call, copied=True)
        return model

    def quantize(self, model: nn.Module, dataloader: Iterable[Any], example_inputs: Any = None) -> fx.GraphModule:
        """Prepare, calibrate and convert in one run."""
        return self._run(self.plan, in_eval_mode(model), example_inputs, dataloader)


class StaticQuantizer(PTQQuantizer):
    """Static quantization: activation ranges are calibrated ahead. What :class:`PTQQuantizer` does for 8-bit integers."""


class DynamicQuantizer(Quantizer):
    """Quantizes weights ahead and activations when they come: linear, LSTM and GRU layers and attention's projections.

    It needs no data; ``example_inputs`` let attention layers be opened. The parameters are those of :class:`PTQQuantizer`;
    ``overrides`` set ``bits``, ``per_channel`` and ``symmetric`` of weights, or ``float``. ``dtype="fp16"`` casts instead.
    """

    converts = "float"

    def __init__(
        self,
        backend: str = "fbgemm",
        dtype: str = "int8",
        per_channel: bool = True,
        symmetric: bool = True,
        *,
        include_layers: Sequence[Layer] | None = None,
        exclude_layers: Sequence[Layer] = (),
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        reduce_range: bool | None = None,
        verify: bool = True,
        progress: bool | None = None,
    ) -> None:
        check_given(DynamicQuantizer, locals())
        backends.find(backend)
        check_dtype(dtype)
        self.backend, self.dtype, self.per_channel, self.symmetric = backend, dtype, per_channel, symmetric
        chosen = chosen_layers(include_layers, exclude_layers, overrides)
        weights = {"backend": backend, "per_channel": per_channel, "symmetric": symmetric, "reduce_range": reduce_range}
        if dtype == "fp16":
            prepare, convert = _half(chosen)
        else:
            prepare = Plan.parse([*_fold(), "fuse-activations"])
            convert = Plan.parse([{"quantize-dynamic": weights | chosen}, "lower"])
        super().__init__(prepare, convert, verify=verify, progress=progress)

    def calibrate(self, model: nn.Module, dataloader: Iterable[Any] | None = None) -> nn.Module:
        """Nothing to do: ranges are found at run time. Returns the model."""
        return model

    def quantize(
        self, model: nn.Module, dataloader: Iterable[Any] | None = None, example_inputs: Any = None
    ) -> fx.GraphModule:
        """Prepare and convert in one run; a ``dataloader``'s first batch serves as example inputs."""
        return self._run(self.plan, in_eval_mode(model), example_inputs, dataloader)


def _fold(*, matmuls: bool = False) -> list[Any]:
    """What comes first whatever the numbers are; ``matmuls`` where the backend multiplies activations in integers."""
    plain = ["cast-single", "settle-weights", {"open-attention": {"matmuls": matmuls}}]
    return [*plain, {"remove-dead": {"dropout": True}}, "fold-batchnorm"]


def _half(chosen: Mapping[str, Any]) -> tuple[Plan, Plan]:
    """The plan parts of fp16; overrides can only keep a layer in float."""
    in_float = []
    for pattern, options in chosen["overrides"].items():
        if set(options) != {"float"}:
            raise ConfigError(
                f"overrides: that for {pattern!r} sets {', '.join(options)}; with dtype 'fp16' it can set float only."
            )
        in_float += [pattern] if options["float"] else []
    layers = {"include_layers": chosen["include_layers"], "exclude_layers": [*chosen["exclude_layers"], *in_float]}
    return Plan.parse(_fold()), Plan.parse([{"cast-half": layers}])
