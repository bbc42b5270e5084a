"""LSTM and GRU with int8 weights: what a recurrent layer becomes when it is quantized dynamically.

They compute the reference semantics in torch operators and run anywhere; backends put their kernels in their place. What
torch's layers call ``weight_ih_l0`` is int8 here, beside ``weight_ih_l0_scale`` (and ``weight_ih_l0_zero_point``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from fxcompress.graph import qdq

__all__ = ["CLASSES", "QuantizedGRU", "QuantizedLSTM", "QuantizedRecurrent"]

State = Any
Run = Callable[[Tensor, "Tensor | None", list[Tensor]], tuple[Tensor, list[Tensor]]]


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

    def forward(
        self, input: Tensor | PackedSequence, hx: State = None, run: Run | None = None
    ) -> tuple[Tensor | PackedSequence, State]:
        """What torch's layer returns; ``run`` stands in for :meth:`run`, as kernels do."""
        run = run or self.run
        if isinstance(input, PackedSequence):
            return self._packed(input, hx, run)
        batched = input.dim() == 3
        steps = input if batched else input.unsqueeze(0 if self.batch_first else 1)
        batch = steps.shape[0 if self.batch_first else 1]
        given = hx if batched or hx is None else pytree.tree_map(lambda state: state.unsqueeze(1), hx)
        output, finals = run(steps, None, self._initial(steps, batch, given))
        if not batched:
            output, finals = output.squeeze(0 if self.batch_first else 1), [final.squeeze(1) for final in finals]
        return output, self._states(finals)

    def _packed(self, input: PackedSequence, hx: State, run: Run) -> tuple[PackedSequence, State]:
        """Sequences of several lengths, packed: longest first, with the order they had."""
        data, sizes, order, back = input
        states = self._initial(data, int(sizes[0]), hx)
        if order is not None and hx is not None:
            states = [state.index_select(1, order) for state in states]
        output, finals = run(data, sizes, states)
        if back is not None:
            finals = [final.index_select(1, back) for final in finals]
        return PackedSequence(output, sizes, order, back), self._states(finals)

    def _initial(self, like: Tensor, batch: int, hx: State) -> list[Tensor]:
        """The states to begin with, each ``[layers · directions, batch, hidden]``; zeros where none are given."""
        if hx is None:
            return [like.new_zeros(len(self.suffixes()), batch, self.hidden_size)] * self.states
        return list(hx) if self.states == 2 else [hx]

    def _states(self, finals: list[Tensor]) -> State:
        return tuple(finals) if self.states == 2 else finals[0]

    def run(self, values: Tensor, sizes: Tensor | None, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """All layers over all steps: the last layer's outputs, and each state after the last step.

        ``values`` is ``[steps, batch, features]`` (or batch first); with ``sizes``, the number of sequences at each step, it
        is the rows of all steps one after another.
        """
        if sizes is not None:
            return self._layers(values, sizes.tolist(), states)
        steps = values.transpose(0, 1) if self.batch_first else values
        output, finals = self._layers(steps.flatten(0, 1), [steps.shape[1]] * steps.shape[0], states)
        output = output.unflatten(0, steps.shape[:2])
        return output.transpose(0, 1) if self.batch_first else output, finals

    def _layers(self, rows: Tensor, sizes: list[int], states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        finals: list[list[Tensor]] = []
        sides: list[Tensor] = []
        directions = 2 if self.bidirectional else 1
        for place, suffix in enumerate(self.suffixes()):
            side, final = self._direction(rows, sizes, suffix, [state[place] for state in states])
            sides.append(side)
            finals.append(final)
            if len(sides) == directions:
                rows, sides = torch.cat(sides, -1), []
        return rows, [torch.stack(parts) for parts in zip(*finals, strict=True)]

    def _direction(self, rows: Tensor, sizes: list[int], suffix: str, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        backwards = suffix.endswith("reverse")
        steps = self._multiply(rows, f"ih{suffix}").split(sizes)
        outputs = []
        for step in reversed(steps) if backwards else steps:
            going = [part[: len(step)] for part in state]
            new = self._cell(step, self._multiply(going[0], f"hh{suffix}"), going)
            outputs.append(new[0])
            state = [torch.cat([after, part[len(step) :]]) for after, part in zip(new, state, strict=True)]
        return torch.cat(outputs[::-1] if backwards else outputs), state

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
