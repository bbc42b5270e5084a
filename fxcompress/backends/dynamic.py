"""Layers that quantize their input as it comes: int8 weights, float in and out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.backends.kernels import QuantizedLayer, engine_of, quantized_weight
from fxcompress.graph.recurrent import QuantizedLSTM, QuantizedRecurrent

__all__ = ["DynamicLinear", "DynamicRecurrent"]

_q = torch.ops.quantized


class DynamicLinear(QuantizedLayer):
    """A linear layer on float tensors, multiplied in int8 (``reduce_range``: by 7 bits); ``ceiling`` is ReLU6's."""

    def __init__(self, *args: Any, reduce_range: bool, ceiling: float | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reduce_range, self.ceiling = reduce_range, ceiling

    def forward(self, input: Tensor) -> Tensor:
        if not input.numel():
            return input.new_zeros(*input.shape[:-1], self.weight.shape[0])
        kernel = _q.linear_relu_dynamic if self.activation else _q.linear_dynamic
        output: Tensor = kernel(input, self.packed, self.reduce_range)
        return output if self.ceiling is None else output.clamp_(max=self.ceiling)


class DynamicRecurrent(nn.Module):
    """An LSTM or GRU in the engine's kernels; the int8 weights stay in ``layer``, whose semantics these are."""

    def __init__(self, layer: QuantizedRecurrent, engine: str) -> None:
        super().__init__()
        self.layer, self.engine = layer, engine
        self._pack()

    def _pack(self) -> None:
        with engine_of(self.engine):
            self.cells = [self._cell(suffix) for suffix in self.layer.suffixes()]

    def _cell(self, suffix: str) -> Any:
        layer = self.layer
        packed, biases = [], []
        for name in (f"ih{suffix}", f"hh{suffix}"):
            weight, scale = getattr(layer, f"weight_{name}"), getattr(layer, f"weight_{name}_scale")
            weight = quantized_weight(weight, scale, getattr(layer, f"weight_{name}_zero_point"), 0)
            bias = (
                getattr(layer, f"bias_{name}")
                if layer.bias
                else torch.zeros(layer.gates * layer.hidden_size, dtype=torch.float32, device="cpu")
            )
            packed.append(_q.linear_prepack(weight, bias))
            biases.append(bias)
        return _q.make_quantized_cell_params_dynamic(*packed, *biases, layer.quant_max < 255)

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        return self.layer(input, hx, self._run)

    def _run(self, values: Tensor, sizes: Tensor | None, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        layer = self.layer
        given = [state.contiguous() for state in states]
        options = (True, layer.num_layers, 0.0, False, layer.bidirectional)
        kind: dict[str, Any] = {"dtype": torch.qint8, "use_dynamic": True} if isinstance(layer, QuantizedLSTM) else {}
        hx, kernel = (given, torch.quantized_lstm) if kind else (given[0], torch.quantized_gru)
        if sizes is None:
            output, *finals = kernel(values, hx, self.cells, *options, layer.batch_first, **kind)
        else:
            output, *finals = kernel(values, sizes, hx, self.cells, *options, **kind)
        return output, finals

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "cells"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()
