"""Whether an engine computes what the graph says, part by part: each on the values that the engine itself had before it.

A deep network multiplies the rounding of its first layers, so that its results tell little. Here the engine gives the levels
of all its quantize operators too, its taps, and the graph runs node by node with these in place of its own: what is computed
between two roundings is compared, and no difference grows on its way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxcompress.backends.engine import Engine
from fxcompress.graph import ops, qdq
from fxcompress.graph.containers import leaves
from fxcompress.graph.inputs import Arguments, tensors_in
from fxcompress.graph.module import shared_copy
from fxcompress.graph.recorder import Recorder
from fxcompress.graph.results import output_snr

__all__ = ["MOST_APART", "EngineLevels", "engine_levels", "snr_of_steps"]

MOST_APART = 0.001
"""The share of levels that may be more than one step off."""

_SINGLE, _HALF = (60.0, 1e-5), (30.0, 2e-3)
"""dB that results of float kernels reach, and how far their rounding moves a value, relative to it."""

_ROUND = (qdq.quantize, qdq.quantize_per_channel)
_BACK = (qdq.dequantize, qdq.dequantize_per_channel)


@dataclass
class EngineLevels:
    """An engine's levels beside those that the graph computes from the same values.

    ``result``   of the engine with its taps: another one than without them where it fuses across them
    ``tensors``  how many tensors of levels were compared
    ``apart``    the largest share of a tensor's levels that are more than one step off, and where
    ``wrong``    nodes of the graph at which the engine computes something else, with what was seen
    """

    result: Any
    tensors: int = 0
    apart: tuple[float, str] = (0.0, "")
    wrong: dict[str, str] = field(default_factory=dict)


def engine_levels(graph: fx.GraphModule, lowered: fx.GraphModule, call: Arguments) -> EngineLevels | None:
    """Hold ``lowered``, one call of an engine, against the graph that it was made from; None where it gives no levels.

    What is further off than rounding explains in general is wrong, unless the graph itself moves about as far where the
    values between its operators are moved by such a rounding, and a few of the levels by a step.
    """
    tapped = shared_copy(lowered)
    try:
        tapped.engine = engine = _Tapped(lowered.get_submodule("engine"))
        made = EngineLevels(call.fresh()(tapped))
    except Exception:  # a runtime has exceptions of its own
        return None
    if len(engine.levels) != sum(node.target in _ROUND for node in graph.graph.nodes):
        return None
    least, rounding = _HALF if engine.halved else _SINGLE
    own = _replayed(graph, call, engine.levels)
    steps = {node: _apart(levels, found) for (node, levels), found in zip(own.levels.items(), engine.levels, strict=True)}
    made.tensors, made.apart = len(steps), max(((share, node.name) for node, (share, _) in steps.items()), default=(0.0, ""))
    decibels = _decibels(graph, own.result, made.result)
    if made.apart[0] <= MOST_APART and all(snr >= least for snr in decibels.values()):
        return made
    moved = _replayed(graph, call, engine.levels, rounding)
    for node, (share, most) in steps.items():
        if share > max(MOST_APART, 4 * _apart(own.levels[node], moved.levels[node])[0]):
            made.wrong[node.name] = f"{share:.1%} of the levels are off by up to {most} steps at {_part(qdq.source(node))}"
    explained = _decibels(graph, own.result, moved.result)
    for node, snr in decibels.items():
        if not snr >= min(least, explained[node] - 10.0):
            made.wrong[node.name] = f"results agree to {snr:.1f} dB only at {_part(node)}"
    return made


def snr_of_steps(graph: fx.GraphModule, call: Arguments, expected: Any) -> float:
    """dB to which results agree with a graph's where a quarter of all levels is one step off, at random; at most 60."""
    generator = torch.Generator().manual_seed(0)

    def shifted(node: fx.Node, levels: Tensor) -> Tensor:
        return _one_step_off(node, levels, 4, generator)

    return min(_SINGLE[0], output_snr(expected, _Replay(graph, shifted).record(call)))


def _one_step_off(node: fx.Node, levels: Tensor, one_in: int, generator: torch.Generator) -> Tensor:
    """Levels of a quantize operator, one in so many of them moved by a step."""
    off = torch.randint(0, 2 * one_in, levels.shape, generator=generator, device="cpu").to(levels.device)
    low, high = (int(str(bound)) for bound in node.args[-3:-1])
    moved = levels.to(torch.int16) + (off == 0).to(torch.int16) - (off == 1).to(torch.int16)
    return moved.clamp_(low, high).to(levels.dtype)


class _Tapped(Engine):
    """An engine that gives the levels of its quantize operators too, and keeps them."""

    def __init__(self, engine: Any) -> None:
        model, self.halved = _with_taps(engine.model.cpu().numpy().tobytes())
        super().__init__(engine.runtime, model, engine.outputs)
        self.levels: list[Tensor] = []

    def run(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        results = super().run(inputs)
        self.levels = results[self.outputs :]
        return results[: self.outputs]


def _with_taps(data: bytes) -> tuple[bytes, bool]:
    """The model with an output for each of its quantize operators, in order; and whether it computes in float16."""
    import onnx

    model = onnx.load_from_string(data)
    types = {stored.name: stored.data_type for stored in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            model.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], types[node.input[2]], None))
    return model.SerializeToString(), onnx.TensorProto.FLOAT16 in types.values()


class _Replay(Recorder):
    """Runs a graph with other levels than its quantize operators give, by ``change``, and floats between its operators moved
    by ``rounding`` at random; ``levels`` keeps what they gave."""

    def __init__(self, graph: fx.GraphModule, change: Callable[[fx.Node, Tensor], Tensor], rounding: float = 0.0) -> None:
        super().__init__(graph)
        self.change, self.rounding = change, rounding
        self.generator = torch.Generator().manual_seed(0)
        self.levels: dict[fx.Node, Tensor] = {}
        self.result: Any = None

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.target in _ROUND:
            self.levels[n] = value
            return self.change(n, value)
        return pytree.tree_map_only(Tensor, self._moved, value) if self.rounding and n.op != "output" else value

    def _moved(self, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return value * (
            1
            + self.rounding * torch.randn(value.shape, generator=self.generator, dtype=torch.float32, device="cpu").to(value)
        )


def _replayed(graph: fx.GraphModule, call: Arguments, levels: list[Tensor], rounding: float = 0.0) -> _Replay:
    """The graph run on the levels of an engine, or with ``rounding`` on others like them that it may have given a reader."""
    found, generator = iter(levels), torch.Generator().manual_seed(1)

    def replaced(node: fx.Node, own: Tensor) -> Tensor:
        return _one_step_off(node, next(found), 64, generator) if rounding else next(found)

    replay = _Replay(graph, replaced, rounding)
    replay.result = replay.record(call)
    return replay


def _apart(expected: Tensor, found: Tensor) -> tuple[float, int]:
    """The share of levels that are more than one step off, and how many steps at most."""
    if expected.shape != found.shape:
        return 1.0, 255
    steps = (expected.to(torch.int16) - found).abs()
    return (float((steps > 1).double().mean()), int(steps.max())) if steps.numel() else (0.0, 0)


def _decibels(graph: fx.GraphModule, expected: Any, found: Any) -> dict[fx.Node, float]:
    """SNR of the tensors of two results, by the nodes that give them; in one where a node gives several."""
    output = next(node for node in graph.graph.nodes if node.op == "output")
    nodes, pairs = list(leaves(output.args[0])), list(zip(tensors_in(expected), tensors_in(found), strict=False))
    if len(nodes) != len(pairs):
        return {output: output_snr(expected, found)}
    snrs: dict[fx.Node, float] = {}
    for node, (own, other) in zip(nodes, pairs, strict=True):
        snrs[node] = min(snrs.get(node, math.inf), output_snr(own, other))
    return snrs


def _part(node: fx.Node) -> str:
    """A node with its operator, and of how many operators it is the last, between one rounding and the next."""
    seen, found = {node}, [node]
    while found:
        sources = [s for s in found.pop().all_input_nodes if s.op.startswith("call") and s.target not in _BACK]
        found += [source for source in sources if source not in seen]
        seen |= set(sources)
    kind = ops.kind(node) or str(node.target)
    return f"{node.name!r} ({kind}{f', the last of {len(seen)} operators in float' if len(seen) > 1 else ''})"
