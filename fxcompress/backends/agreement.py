"""Whether what a backend computes is what the graph says: every kernel on the graph's own values, and the results.

The graph and its lowered form run on one or two samples. A kernel sees what the graph has there, so that no difference grows
on its way through the network: its levels must be the graph's or next to them. An engine shows its values but takes none: it
is the graph that runs on these then, where the results leave a doubt.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxcompress.backends.engine_levels import MOST_APART, engine_levels, snr_of_steps
from fxcompress.errors import BackendError
from fxcompress.graph import qdq
from fxcompress.graph.inputs import Arguments, frozen_state, tensors_in
from fxcompress.graph.recorder import Look, Recorder, Values
from fxcompress.graph.results import largest_difference, output_snr

__all__ = ["GRID", "OPERATOR", "REFERENCE", "Agreement", "Reference", "engine_agreement", "first_samples", "wanted"]

REFERENCE, OPERATOR, GRID = "reference", "operator", "grid"
"""Under these names a lowered node's metadata says which node of the graph has the same value, whose kernel it is, and the
scale and zero point of its levels."""

_SAMPLES = 2
_CLEAR, _MARGIN = 60.0, 6.0
"""dB from which results leave no doubt, and by which steps of levels may weigh more than those drawn at random."""
_FLOAT_KERNEL = 20.0


@dataclass
class Agreement:
    """How far a lowered graph is from the graph.

    ``snr``      of the results, in dB; ``largest`` difference between them, and the ``magnitude`` they reach
    ``kernels``  how many kernels, or tensors that an engine rounds (``what``), were held against the graph one by one
    ``apart``    the largest share of one's levels that are more than one step off, and where
    ``wrong``    operators of the graph for which something else is computed, with what was seen
    """

    snr: float
    largest: float
    magnitude: float
    kernels: int = 0
    apart: tuple[float, str] = (0.0, "")
    wrong: dict[str, str] = field(default_factory=dict)
    what: str = "kernels"

    def reason(self) -> str:
        """The first of what is wrong, and how much more is."""
        more = f" (and {len(self.wrong) - 1} more like it)" if len(self.wrong) > 1 else ""
        return f"{next(iter(self.wrong.values()))}{more}"

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
        return f"{results}; of the levels of its {self.kernels} {self.what}, {steps} are more than one step off"


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

        Raises BackendError where ``runtime`` computes something else than the graph.
        """
        with frozen_state(lowered), torch.no_grad():
            call, look, found = self._run(lowered)
            if runtime:
                made = engine_agreement(self.graph, lowered, call, look.result, found)
            else:
                made = _agreement(look.result, found)
                _Kernels(lowered, look.values, made).record(call)
        if runtime and made.wrong:
            raise BackendError(f"{runtime} computes something else than the graph: {made.reason()}.")
        return made

    def _run(self, lowered: fx.GraphModule) -> tuple[Arguments, Look, Any]:
        """A call that both take, what the graph gives for it, and the result of the lowered form."""
        few, whole = self.calls[0], self.calls[-1]
        if few is not whole:
            with suppress(Exception):  # a model may be bound to the number of samples
                return few, self._look(0), few.fresh()(lowered)
        return whole, self._look(len(self.calls) - 1), whole.fresh()(lowered)

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


def engine_agreement(
    graph: fx.GraphModule, lowered: fx.GraphModule, call: Arguments, expected: Any, found: Any
) -> Agreement:
    """Hold the results of a call of an engine against the graph's, and its levels on the way there where they leave a doubt.

    Where the engine fuses operators that it does not fuse with its levels as outputs, its results have to be as near as
    those of a graph whose levels are one step off here and there.
    """
    made = _agreement(expected, found)
    if made.snr >= _CLEAR:
        return made
    levels = engine_levels(graph, lowered, call)
    if levels is not None:
        made.kernels, made.apart, made.wrong, made.what = levels.tensors, levels.apart, levels.wrong, "rounded tensors"
    if levels is None or (not made.wrong and output_snr(levels.result, found) < math.inf):
        least = snr_of_steps(graph, call, expected) - _MARGIN
        if not made.snr >= least:
            made.wrong["output"] = f"results agree to {made.snr:.1f} dB, and levels one step off explain {least:.1f} dB"
    return made


def _agreement(expected: Any, found: Any) -> Agreement:
    finite = [t.detach().to(torch.float64).nan_to_num(0.0, 0.0, 0.0).abs().max() for t in tensors_in(expected) if t.numel()]
    magnitude = max((float(value) for value in finite), default=0.0)
    return Agreement(output_snr(expected, found), largest_difference(expected, found), magnitude)


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
        if share > MOST_APART:
            self.into.wrong[name] = f"{share:.1%} of its kernel's levels are off by up to {float(steps.max()):.0f} steps"


def _steps(expected: Tensor, found: Tensor, grid: tuple[float, int] | None) -> Tensor:
    """How many steps of the grid a kernel's values are from the levels expected."""
    if grid is None or grid == (found.q_scale(), found.q_zero_point()):
        return (found.int_repr().to(torch.int16) - expected).abs_()
    scale, zero_point = grid
    return (found.dequantize() / scale + zero_point - expected.to(torch.float32)).abs()
