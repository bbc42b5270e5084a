"""What data says about parts of a graph: the largest value of every channel, and the error of a part that was rewritten."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.graph import edit
from fxcompress.graph.inputs import Arguments
from fxcompress.graph.module import shared_copy
from fxcompress.graph.recorder import Recorder, placeholder_values

__all__ = ["channel_maxima", "errors_between", "part_between"]


Hear = Callable[[fx.Node, Tensor], None]


class _Watching(Recorder):
    """Runs a graph and tells what some of its nodes give."""

    def __init__(self, module: fx.GraphModule, watched: Container[fx.Node], hear: Hear) -> None:
        super().__init__(module)
        self.watched, self.hear = watched, hear

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.watched:
            self.hear(n, value)
        return value


def _watch(module: fx.GraphModule, calls: Sequence[Arguments], watched: Container[fx.Node], hear: Hear) -> None:
    with torch.no_grad():
        for call in calls:
            _Watching(module, watched, hear).run(*placeholder_values(module, call), enable_io_processing=False)


def channel_maxima(
    module: fx.GraphModule, calls: Sequence[Arguments], channels: Mapping[fx.Node, tuple[int, int]]
) -> dict[fx.Node, Tensor]:
    """The largest value of every channel, float64; ``channels``: along which axis they lie, and how many there are.

    Behind a flatten, where several values in a row are one channel, they are taken together.
    """
    found: dict[fx.Node, Tensor] = {}

    def keep(node: fx.Node, value: Tensor) -> None:
        axis, count = channels[node]
        largest = value.movedim(axis, 0).reshape(count, -1).amax(1).to(torch.float64)
        found[node] = torch.maximum(found[node], largest) if node in found else largest

    _watch(module, calls, channels, keep)
    return found


def part_between(module: fx.GraphModule, start: str, end: str) -> fx.GraphModule:
    """What leads from the value called ``start`` to the one called ``end``, as a graph of one input and one output."""
    names = {node.name: node for node in module.graph.nodes}
    graph = fx.Graph()
    values = {names[start]: graph.placeholder(start)}
    graph.output(edit.copy_into(graph, names[end], values))
    return shared_copy(fx.GraphModule(module, graph))


def errors_between(
    module: fx.GraphModule,
    calls: Sequence[Arguments],
    ends: Sequence[tuple[fx.Node, fx.Node]],
    candidates: Sequence[fx.GraphModule],
) -> list[list[float]]:
    """For every pair of values, and for every candidate, the squared error of the part between them over ``calls``.

    The truth is ``module``, whose values feed the parts; candidates have nodes of the same names.
    """
    sums = [[0.0] * len(candidates) for _ in ends]
    parts = [[part_between(candidate, start.name, end.name) for candidate in candidates] for start, end in ends]
    starts = {start for start, _ in ends}
    held: dict[fx.Node, Tensor] = {}

    def compare(node: fx.Node, exact: Tensor) -> None:
        if node in starts:
            held[node] = exact
        for place, (start, end) in enumerate(ends):
            for number, part in enumerate(parts[place] if end is node else ()):
                gap = part(held[start]).to(torch.float64) - exact.to(torch.float64)
                sums[place][number] += float(gap.square().sum())

    _watch(module, calls, {node for pair in ends for node in pair}, compare)
    return sums
