"""LSTM and GRU with int8 weights: what a recurrent layer becomes when it is quantized dynamically.

They compute the reference semantics in torch operators and run anywhere; backends put their kernels in their place. What
torch's layers call ``weight_ih_l0`` is int8 here, beside ``weight_ih_l0_scale`` (and ``weight_ih_l0_zero_point``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress.graph import qdq

__all__ = ["CLASSES", "QuantizedGRU", "QuantizedLSTM", "QuantizedRecurrent"]

State = Any


class QuantizedRecurrent(nn.Module):
    """Weights in int8; inputs and hidden states are put on the uint8 grid of their own range before they are multiplied.

    The input of a layer is one tensor over all steps, and so is its range; a hidden state has one per step. Shapes, the
    order of gates and results are those of the torch layer it replaces. Dropout between layers is not applied.
    """

    gates: int
    states: int

    def __init__(self, layer: nn.RNNBase, quant_max: int) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers = layer.input_size, layer.hidden_size, layer.num_layers
        self.bias, self.batch_first, self.bidirectional = layer.bias, layer.batch_first, layer.bidirectional
        self.quant_max = quant_max

    def suffixes(self) -> list[str]:
        """``_l0``, ``_l0_reverse``, ``_l1``, …"""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"_l{number}{direction}" for number in range(self.num_layers) for direction in directions]

    def forward(self, input: Tensor, hx: State = None) -> tuple[Tensor, State]:
        batched = input.dim() == 3
        steps = input if batched else input.unsqueeze(0 if self.batch_first else 1)
        output, finals = self.unroll(steps, self.initial(steps, hx, batched))
        if not batched:
            output, finals = output.squeeze(0 if self.batch_first else 1), [final.squeeze(1) for final in finals]
        return output, tuple(finals) if self.states == 2 else finals[0]

    def initial(self, steps: Tensor, hx: State, batched: bool) -> list[Tensor]:
        """The states to begin with, each ``[layers · directions, batch, hidden]``; zeros where none are given."""
        batch = steps.shape[0 if self.batch_first else 1]
        if hx is None:
            return [steps.new_zeros(len(self.suffixes()), batch, self.hidden_size)] * self.states
        given = list(hx) if self.states == 2 else [hx]
        return given if batched else [state.unsqueeze(1) for state in given]

    def unroll(self, steps: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """All layers over all steps: the last layer's outputs, and each state after the last step."""
        values = steps.transpose(0, 1) if self.batch_first else steps
        finals: list[list[Tensor]] = []
        directions = 2 if self.bidirectional else 1
        for number in range(self.num_layers):
            sides = []
            for direction, suffix in enumerate(self.suffixes()[number * directions : (number + 1) * directions]):
                place = number * directions + direction
                side, final = self._direction(values, suffix, [state[place] for state in states], direction == 1)
                sides.append(side)
                finals.append(final)
            values = torch.cat(sides, -1)
        output = values.transpose(0, 1) if self.batch_first else values
        return output, [torch.stack(parts) for parts in zip(*finals, strict=True)]

    def _direction(self, values: Tensor, suffix: str, state: list[Tensor], backwards: bool) -> tuple[Tensor, list[Tensor]]:
        projected = self._multiply(values, f"ih{suffix}")
        outputs = []
        for step in reversed(range(len(values))) if backwards else range(len(values)):
            state = self._cell(projected[step], self._multiply(state[0], f"hh{suffix}"), state)
            outputs.append(state[0])
        return torch.stack(outputs[::-1] if backwards else outputs), state

    def _multiply(self, input: Tensor, name: str) -> Tensor:
        weight, scale = getattr(self, f"weight_{name}"), getattr(self, f"weight_{name}_scale")
        zero_point = getattr(self, f"weight_{name}_zero_point", None)
        bias = getattr(self, f"bias_{name}") if self.bias else None
        exact = qdq.dequantize_per_channel(weight, scale, 0, zero_point)
        return F.linear(qdq.fake_quantize_dynamic(input, self.quant_max), exact, bias)

    def _cell(self, inputs: Tensor, hidden: Tensor, state: list[Tensor]) -> list[Tensor]:
        raise TypeError(f"{type(self).__name__} defines no cell")

    def extra_repr(self) -> str:
        more = f", layers={self.num_layers}" + (", bidirectional" if self.bidirectional else "")
        return f"{self.input_size}, {self.hidden_size}{more}, int8 weights"


class QuantizedLSTM(QuantizedRecurrent):
    """nn.LSTM with int8 weights and dynamic 8-bit inputs."""

    gates, states = 4, 2

    def _cell(self, inputs: Tensor, hidden: Tensor, state: list[Tensor]) -> list[Tensor]:
        take, forget, candidate, give = (inputs + hidden).chunk(4, -1)
        memory = torch.sigmoid(forget) * state[1] + torch.sigmoid(take) * torch.tanh(candidate)
        return [torch.sigmoid(give) * torch.tanh(memory), memory]


class QuantizedGRU(QuantizedRecurrent):
    """nn.GRU with int8 weights and dynamic 8-bit inputs."""

    gates, states = 3, 1

    def _cell(self, inputs: Tensor, hidden: Tensor, state: list[Tensor]) -> list[Tensor]:
        (reset_x, update_x, new_x), (reset_h, update_h, new_h) = inputs.chunk(3, -1), hidden.chunk(3, -1)
        update = torch.sigmoid(update_x + update_h)
        new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
        return [(1 - update) * new + update * state[0]]


CLASSES: dict[type[nn.Module], type[QuantizedRecurrent]] = {nn.LSTM: QuantizedLSTM, nn.GRU: QuantizedGRU}
