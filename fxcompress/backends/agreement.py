"""Whether what a backend computes is what the graph says: every kernel on the graph's own values, and the results.

The graph and its lowered form run on one or two samples. A kernel sees what the graph has there, so that no difference grows
on its way through the network: its levels must be the graph's or next to them. An engine is one kernel, whose results count.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxcompress.errors import BackendError
from fxcompress.graph import qdq
from fxcompress.graph.inputs import Arguments, frozen_state, tensors_in
from fxcompress.graph.recorder import Look, Recorder, Values
from fxcompress.graph.results import largest_difference, output_snr

__all__ = ["GRID", "OPERATOR", "REFERENCE", "Agreement", "Reference", "first_samples", "least_agreement", "wanted"]

REFERENCE, OPERATOR, GRID = "reference", "operator", "grid"
"""Under these names a lowered node's metadata says which node of the graph has the same value, whose kernel it is, and the
scale and zero point of its levels."""

_SAMPLES = 2
_SURE, _LEAST = 20.0, 10.0
_MOST_WRONG = 0.01
_FLOAT_KERNEL = 20.0


@dataclass
class Agreement:
    """How far a lowered graph is from the graph.

    ``snr``      of the results, in dB; ``largest`` difference between them, and the ``magnitude`` they reach
    ``kernels``  how many kernels were held against the graph one by one
    ``apart``    the largest share of a kernel's levels that are more than one step off, and where
    ``wrong``    operators of the graph whose kernels compute something else, with what was seen
    """

    snr: float
    largest: float
    magnitude: float
    kernels: int = 0
    apart: tuple[float, str] = (0.0, "")
    wrong: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        results = "the results are the graph's, bit for bit"
        if self.snr < math.inf:
            results = (
                f"results differ from the graph's by {self.largest:.3g} at most, of {self.magnitude:.3g} ({self.snr:.1f} dB)"
            )
        if not self.kernels:
            return results
        share, where = self.apart
        steps = f"up to {share:.2%} at {where!r}" if share else "none"
        return f"{results}; of the levels of its {self.kernels} kernels, {steps} are more than one step off"


class Reference:
    """A graph that lowered forms of it are held against: it runs once for all of them.

    ``call``  what they run on: its first samples, or all of it where that is few, or where a model is bound to their number
    ``look``  what the graph gave for ``call``, with the values that :func:`wanted` names, where somebody has run it
    """

    def __init__(self, graph: fx.GraphModule, call: Arguments, look: Look | None = None) -> None:
        self.graph, self.wanted = graph, wanted(graph)
        few = first_samples(call)
        self.calls = [call] if few is None else [few, call]
        self.looks = {} if look is None else {len(self.calls) - 1: look}

    def compare(self, lowered: fx.GraphModule, *, runtime: str = "") -> Agreement:
        """Run a lowered form, and its kernels one by one where they are not one ``runtime``.

        Raises BackendError where the results of ``runtime`` agree to less than rounding explains.
        """
        with frozen_state(lowered), torch.no_grad():
            call, look, found = self._run(lowered)
            expected = look.result
            made = Agreement(output_snr(expected, found), largest_difference(expected, found), _magnitude(expected))
            if not runtime:
                _Kernels(lowered, look.values, made).record(call)
            elif not made.snr > _SURE and not made.snr > least_agreement(self.graph, call, expected):
                raise BackendError(
                    f"{runtime} computes something else than the graph: its results agree to {made.snr:.1f} dB only."
                )
        return made

    def _run(self, lowered: fx.GraphModule) -> tuple[Arguments, Look, Any]:
        """A call that both take, what the graph gives for it, and the result of the lowered form."""
        for number, call in enumerate(self.calls[:-1]):
            with suppress(Exception):  # a model may be bound to the number of samples
                return call, self._look(number), call.fresh()(lowered)
        return self.calls[-1], self._look(len(self.calls) - 1), self.calls[-1].fresh()(lowered)

    def _look(self, number: int) -> Look:
        if number not in self.looks:
            values = Values(self.graph, self.wanted)
            self.looks[number] = Look(values.record(self.calls[number]), values.values)
        return self.looks[number]


def wanted(graph: fx.GraphModule) -> frozenset[str]:
    """The nodes of a quantize/dequantize graph whose values kernels are held against: those that no other of them tells."""
    told = (qdq.dequantize, qdq.dequantize_per_channel)
    return frozenset(
        node.name
        for node in graph.graph.nodes
        if node.op.startswith("call")
        and node.target not in told
        and any(user.target is not qdq.quantize for user in node.users)
    )


def first_samples(call: Arguments) -> Arguments | None:
    """The first samples of a call whose tensors all have the same, larger number of them; None for any other."""
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors_in(tuple(call))}
    if len(sizes) != 1 or min(sizes) <= _SAMPLES:
        return None
    return Arguments(*pytree.tree_map_only(Tensor, lambda tensor: tensor[:_SAMPLES], tuple(call)))


def _magnitude(results: Any) -> float:
    finite = [t.detach().to(torch.float64).nan_to_num(0.0, 0.0, 0.0).abs().max() for t in tensors_in(results) if t.numel()]
    return max((float(value) for value in finite), default=0.0)


def least_agreement(graph: fx.GraphModule, call: Arguments, expected: Any) -> float:
    """dB that another runtime's results must reach for rounding to explain the difference: 10, or less for a graph that is
    so sensitive that inputs moved by a thousandth change its results more (10 dB below what such inputs reach then).
    """
    generator = torch.Generator().manual_seed(1)
    moved = Arguments(*pytree.tree_map_only(Tensor, lambda tensor: _moved(tensor, generator), tuple(call)))
    with torch.no_grad():
        return min(_LEAST, output_snr(expected, moved(graph)) - 10.0)


def _moved(example: Tensor, generator: torch.Generator) -> Tensor:
    if not example.is_floating_point():
        return example
    noise = torch.randn(example.shape, generator=generator).to(example)
    return example + 1e-3 * example.abs().mean() * noise


class _Kernels(Recorder):
    """Runs the lowered graph; every kernel's result is held against the graph's, which then takes its place."""

    def __init__(self, module: fx.GraphModule, values: dict[str, Any], into: Agreement) -> None:
        super().__init__(module)
        self.values, self.into = values, into

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        expected = self.values.get(str(n.meta.get(REFERENCE)))
        quantized = [tensor.is_quantized for tensor in tensors_in(found)]
        if expected is None or not quantized or (any(quantized) and not isinstance(found, Tensor)):
            return found
        grid = n.meta.get(GRID)
        levels = torch.empty_like(found.int_repr()).copy_(expected) if any(quantized) else expected
        if OPERATOR in n.meta:
            self.into.kernels += 1
            self._judge(n.meta[OPERATOR], levels, found, grid)
        if not any(quantized):
            return expected
        return torch._make_per_tensor_quantized_tensor(levels, *(grid or (found.q_scale(), found.q_zero_point())))

    def _judge(self, name: str, expected: Any, found: Any, grid: tuple[float, int] | None) -> None:
        if not any(tensor.is_quantized for tensor in tensors_in(found)):
            snr = output_snr(expected, found)
            if snr < _FLOAT_KERNEL:
                self.into.wrong[name] = f"its kernel agrees with the graph to {snr:.1f} dB only"
            return
        steps = _steps(expected, found, grid)
        share = int((steps > 1.5).count_nonzero()) / steps.numel() if steps.numel() else 0.0
        if share > self.into.apart[0]:
            self.into.apart = (share, name)
        if share > _MOST_WRONG:
            self.into.wrong[name] = f"{share:.1%} of its kernel's levels are off by up to {float(steps.max()):.0f} steps"


def _steps(expected: Tensor, found: Tensor, grid: tuple[float, int] | None) -> Tensor:
    """How many steps of the grid a kernel's values are from the levels expected."""
    if grid is None or grid == (found.q_scale(), found.q_zero_point()):
        return (found.int_repr().to(torch.int16) - expected).abs_()
    scale, zero_point = grid
    return (found.dequantize() / scale + zero_point - expected.to(torch.float32)).abs()
