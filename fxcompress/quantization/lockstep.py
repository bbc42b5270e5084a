"""Running a graph on several batches at once, node by node, and its quantized twin beside it.

Layer-wise remedies need, at every layer, what the quantized network hands it over all batches, and what the float network
computes there; and they change the layer before anything behind it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.graph import edit, fused, ops
from fxcompress.graph.inputs import Arguments
from fxcompress.graph.recorder import Recorder, placeholder_values

__all__ = ["Lockstep", "Step", "Twins", "sample_means", "vouched_mean"]


class Lockstep:
    """A graph that runs ``calls`` side by side up to a node, and goes on from there."""

    def __init__(self, module: fx.GraphModule, calls: Sequence[Arguments]) -> None:
        self.module = module
        self.runs = [Recorder(module) for _ in calls]
        for run, call in zip(self.runs, calls, strict=True):
            run.args_iter = iter(placeholder_values(module, call))
            run.env = {}
        self._nodes: Iterator[fx.Node] = iter(module.graph.nodes)

    def advance(self, name: str) -> fx.Node:
        """Run everything before the node called ``name``; returns that node, which has not run."""
        for node in self._nodes:
            if node.name == name:
                return node
            self.put(node, [run.run_node(node) for run in self.runs])
        raise KeyError(name)

    def put(self, node: fx.Node, results: Sequence[Any]) -> None:
        """Give ``node`` its results, one per call, and forget what it read last."""
        for run, result in zip(self.runs, results, strict=True):
            run.env[node] = result
            for dead in run.user_to_last_uses.get(node, ()):
                run.env.pop(dead, None)

    def values(self, argument: Any) -> list[Any]:
        """What an argument of the node at hand is in every call: computed, or a tensor of the model."""
        if isinstance(argument, fx.Node):
            return [run.env[argument] for run in self.runs]
        value = edit.get_tensor(self.module, argument.name) if isinstance(argument, ops.Attr) else argument
        return [value] * len(self.runs)


@dataclass
class Step:
    """One quantized layer while both graphs stand before it; lists have an entry per batch.

    ``call``     the layer in the float graph
    ``plain``    what it receives there, ``quantized`` what the quantized network hands it
    ``weight``   its weight as the quantized network has it
    """

    call: ops.Call
    plain: list[Tensor]
    quantized: list[Tensor]
    weight: Tensor
    bias: Tensor | None

    def apply(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer computes before its activation."""
        function: Callable[..., Tensor] = getattr(torch.nn.functional, self.call.kind)
        return function(input, weight, bias, *(self.call[name] for name in fused.GEOMETRY[self.call.kind]))

    def activate(self, part: Tensor) -> Tensor:
        """The activation joined to the layer."""
        activation = self.call["activation"]
        return fused.ACTIVATIONS[activation](part.clone()) if activation else part

    def expected(self, module: fx.GraphModule) -> list[Tensor]:
        """What the float network computes before the activation."""
        weight = edit.get_tensor(module, self.call["weight"].name)
        return [self.apply(input, weight, self.bias) for input in self.plain]


class Twins:
    """An observed graph and its quantized copy, walked layer by layer over the same batches."""

    def __init__(self, module: fx.GraphModule, quantized: fx.GraphModule, calls: Sequence[Arguments]) -> None:
        self.module = module
        self.runs = Lockstep(module, calls), Lockstep(quantized, calls)
        self.quantized = quantized

    def layers(self, skip: Callable[[fx.Node, str], None]) -> list[str]:
        """Names of the quantized layers whose weight and bias are theirs alone, in graph order."""
        reading, tied = edit.readers(self.module), edit.tied(self.module)
        quantized = {node.name for node in self.quantized.graph.nodes if node.meta.get("integer")}
        found = []
        for node in self.module.graph.nodes:
            call = ops.read(node) if node.name in quantized else None
            if call is None or call.kind not in fused.GEOMETRY:
                continue
            names = [call[name].name for name in ("weight", "bias") if call[name] is not None]
            if any(len(reading[name]) > 1 or id(edit.get_tensor(self.module, name)) in tied for name in names):
                skip(node, "its weight or bias is used elsewhere too")
            else:
                found.append(node.name)
        return found

    def reach(self, name: str) -> Step:
        """Run both graphs up to the layer."""
        plain, quantized = self.runs
        node, twin = plain.advance(name), quantized.advance(name)
        call, other = ops.read(node), ops.read(twin)
        assert call is not None
        assert other is not None
        bias = edit.get_tensor(self.module, call["bias"].name).detach() if call["bias"] is not None else None
        weight = quantized.values(other["weight"])[0]
        self._at = node, twin
        return Step(call, plain.values(call["input"]), quantized.values(other["input"]), weight, bias)

    def leave(self, step: Step, plain: Sequence[Tensor], quantized: Sequence[Tensor]) -> None:
        """Go on with these results of the layer, as they are before its activation."""
        for run, node, parts in zip(self.runs, self._at, (plain, quantized), strict=True):
            run.put(node, [step.activate(part) for part in parts])


def sample_means(parts: Sequence[Tensor], kind: str) -> Tensor:
    """The mean over all positions of a layer's results, ``[samples, output channels]``, in float64."""
    axis = -1 if kind == "linear" else 1
    return torch.cat([part.movedim(axis, 1).to(torch.float64).unsqueeze(-1).flatten(2).mean(2) for part in parts])


def vouched_mean(samples: Tensor) -> Tensor:
    """The mean of ``[samples, channels]``, of each channel as much as its samples vouch for.

    The mean of few samples is partly chance. What chance gives a channel is told from how its samples differ, ``c²``, and
    what is true from how far the means of all channels exceed that, ``t² = max(0, E[mean² − c²])``; the mean is scaled by
    ``t²/(t² + c²)`` (empirical Bayes; Efron & Morris 1973). A single sample tells nothing about chance: its value is taken.
    """
    mean = samples.mean(0)
    if len(samples) < 2:
        return mean
    chance = samples.var(0) / len(samples)
    true = (mean.square() - chance).mean().clamp(min=0.0)
    return (mean * true / (true + chance)).nan_to_num()
