"""Quantization-aware training: the model trains with weights and values rounded as the converted model will round them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import fx, nn

from fxcompress import backends
from fxcompress.errors import ConfigError
from fxcompress.graph.frozen import freeze_statistics
from fxcompress.graph.select import Layer
from fxcompress.graph.tree import check_module
from fxcompress.options import check_given, check_whole
from fxcompress.plan import Plan
from fxcompress.quantization.fake_quant import fake_quantizers
from fxcompress.quantization.quantizer import Quantizer, check_dtype, check_method, chosen_layers, in_eval_mode

__all__ = ["LSQQuantizer", "QATQuantizer"]


class _TrainingQuantizer(Quantizer):
    """What both quantizers share: prepare a model for training, steer the training, convert."""

    trains: ClassVar[bool] = True
    how: ClassVar[str] = "prepare(model) and train it"

    def __init__(self, insert: Mapping[str, Any], freeze_bn_epochs: int, verify: bool, progress: bool | None) -> None:
        if isinstance(freeze_bn_epochs, bool) or not isinstance(freeze_bn_epochs, int) or freeze_bn_epochs < -1:
            raise ConfigError(f"freeze_bn_epochs is {freeze_bn_epochs!r}; it is an epoch from 0 on, or -1 for never.")
        self.freeze_bn_epochs = freeze_bn_epochs
        opened = {"open-attention": {"matmuls": "matmul" in backends.find(insert["backend"]).rules}}
        prepare = ["cast-single", {"settle-weights": {"trains": True}}, opened, "remove-dead", {"insert-fake-quant": insert}]
        convert = ["freeze-scales", {"remove-dead": {"dropout": True}}, "fold-batchnorm", "fuse-activations"]
        super().__init__(
            Plan.parse(prepare),
            Plan.parse([*convert, "fold-quantization", "lower"]),
            verify=verify,
            progress=progress,
        )

    def prepare(self, model: nn.Module, example_inputs: Any = None) -> fx.GraphModule:
        """A copy of ``model`` that trains as it will be quantized; names, parameters and training flags stay.

        It is traced in eval mode, so what the code of the model does only while training is not part of it.
        """
        prepared = self._run(self._prepare, in_eval_mode(model), example_inputs)
        flags = {name: module.training for name, module in model.named_modules()}
        for name, module in prepared.named_modules():  # a new layer is in the mode of what it is part of
            flags.setdefault(name, flags[name.rpartition(".")[0]])
            module.training = flags[name]
        return prepared

    def enable_fake_quant(self, model: nn.Module) -> nn.Module:
        """Round from now on, in place; returns ``model``."""
        return _switch(model, True)

    def disable_fake_quant(self, model: nn.Module) -> nn.Module:
        """Compute in float from now on, in place, while ranges are still observed; returns ``model``."""
        return _switch(model, False)

    def freeze_bn(self, model: nn.Module) -> nn.Module:
        """Freeze the statistics of batch normalisation in place, also through later ``train()``; returns ``model``.

        Its weight and bias still learn.
        """
        check_module(model)
        return freeze_statistics(model)

    def on_epoch(self, model: nn.Module, epoch: int) -> None:
        """Called by a training loop before each epoch: freezes batch normalisation from epoch ``freeze_bn_epochs`` on."""
        check_whole("epoch", epoch)
        if 0 <= self.freeze_bn_epochs <= epoch:
            self.freeze_bn(model)


def _switch(model: nn.Module, enabled: bool) -> nn.Module:
    check_module(model)
    found = fake_quantizers(model)
    if not found:
        raise ConfigError("the model has no fake-quantizers; prepare(model) puts them in.")
    for fake in found.values():
        fake.enabled = enabled
    return model


class QATQuantizer(_TrainingQuantizer):
    """Quantization-aware training with ranges that are observed while training.

    ``backend``           where the converted model runs
    ``dtype``             ``int8`` or ``uint8``: both name 8-bit integers, the backend says which of its tensors are signed
    ``per_channel``       a weight scale per output channel, where the backend has it
    ``symmetric``         symmetric weights; False: affine ones, where the backend has them
    ``freeze_bn_epochs``  statistics of batch normalisation are frozen from this epoch on; -1: never
    ``observer``          the calibrator that finds the range of a training batch; ``observer_options`` are its parameters
    ``bits``              2 to 8, of weights and of the values layers read; ``activation_bits`` where those differ
    ``first_last_bits``   of the first and last layers, which narrow grids hurt most
    ``include_layers``, ``exclude_layers``, ``overrides``, ``reduce_range``  as for
                          :class:`~fxcompress.quantization.ptq.PTQQuantizer`

    ``prepare`` a model, train the result like any other, ``convert`` it.
    """

    def __init__(
        self,
        backend: str = "fbgemm",
        dtype: str = "int8",
        per_channel: bool = True,
        symmetric: bool = True,
        freeze_bn_epochs: int = -1,
        observer: str = "histogram",
        *,
        bits: int = 8,
        activation_bits: int | None = None,
        first_last_bits: int = 8,
        observer_options: Mapping[str, Any] | None = None,
        include_layers: Sequence[Layer] | None = None,
        exclude_layers: Sequence[Layer] = (),
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        reduce_range: bool | None = None,
        verify: bool = True,
        progress: bool | None = None,
    ) -> None:
        check_given(QATQuantizer, locals())
        check_dtype(dtype, ("int8", "uint8"))
        check_method("observer", observer, observer_options)
        self.backend, self.dtype, self.per_channel, self.symmetric = backend, dtype, per_channel, symmetric
        self.observer, self.bits = observer, bits
        insert = {
            "backend": backend,
            "bits": bits,
            "activation_bits": activation_bits,
            "first_last_bits": first_last_bits,
            "observer": observer,
            "observer_options": dict(observer_options or {}),
            "per_channel": per_channel,
            "symmetric": symmetric,
            "reduce_range": reduce_range,
            **chosen_layers(include_layers, exclude_layers, overrides),
        }
        super().__init__(insert, freeze_bn_epochs, verify, progress)


class LSQQuantizer(_TrainingQuantizer):
    """Quantization-aware training with learned step sizes (LSQ, Esser et al. 2020).

    ``bits``         2 to 8, of weights and of the values layers read; ``activation_bits`` where those differ
    ``per_channel``  a weight scale per output channel, where the backend has it
    ``symmetric``    the zero point of signed activations is in the middle of their grid; False: where the first batch has it
    ``learn_scale``  train the scales; False: they stay at their start, ``2·mean|x|/√Qp``

    The other parameters are those of :class:`QATQuantizer`. The scales are parameters of the prepared model: give them to
    the optimizer with the others, and no weight decay.
    """

    def __init__(
        self,
        bits: int = 8,
        per_channel: bool = True,
        symmetric: bool = True,
        learn_scale: bool = True,
        *,
        backend: str = "fbgemm",
        activation_bits: int | None = None,
        first_last_bits: int = 8,
        freeze_bn_epochs: int = -1,
        include_layers: Sequence[Layer] | None = None,
        exclude_layers: Sequence[Layer] = (),
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        reduce_range: bool | None = None,
        verify: bool = True,
        progress: bool | None = None,
    ) -> None:
        check_given(LSQQuantizer, locals())
        self.bits, self.per_channel, self.symmetric, self.learn_scale = bits, per_channel, symmetric, learn_scale
        self.backend = backend
        insert = {
            "method": "lsq",
            "backend": backend,
            "bits": bits,
            "activation_bits": activation_bits,
            "first_last_bits": first_last_bits,
            "learn_scale": learn_scale,
            "per_channel": per_channel,
            "symmetric": symmetric,
            "reduce_range": reduce_range,
            **chosen_layers(include_layers, exclude_layers, overrides),
        }
        super().__init__(insert, freeze_bn_epochs, verify, progress)
