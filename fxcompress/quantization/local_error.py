"""What data says about parts of a graph: the largest value of every channel, and the error of a part that was rewritten."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.graph import edit
from fxcompress.graph.inputs import Arguments
from fxcompress.graph.module import shared_copy
from fxcompress.graph.recorder import Recorder, placeholder_values

__all__ = ["channel_maxima", "errors_between", "part_between"]


class _Watching(Recorder):
    """Runs a graph and hands the values of some nodes to whoever asked."""

    def __init__(self, module: fx.GraphModule, watchers: Mapping[fx.Node, Callable[[Tensor], None]]) -> None:
        super().__init__(module)
        self.watchers = watchers

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.watchers:
            self.watchers[n](value)
        return value


def _watch(module: fx.GraphModule, calls: Sequence[Arguments], watchers: Mapping[fx.Node, Callable[[Tensor], None]]) -> None:
    with torch.no_grad():
        for call in calls:
            _Watching(module, watchers).run(*placeholder_values(module, call), enable_io_processing=False)


def channel_maxima(
    module: fx.GraphModule, calls: Sequence[Arguments], channels: Mapping[fx.Node, tuple[int, int]]
) -> dict[fx.Node, Tensor]:
    """The largest value of every channel; ``channels`` says along which axis they lie and how many there are.

    Behind a flatten, where several values in a row are one channel, they are taken together.
    """
    found: dict[fx.Node, Tensor] = {}

    def keep(node: fx.Node, axis: int, count: int) -> Callable[[Tensor], None]:
        def seen(value: Tensor) -> None:
            largest = value.movedim(axis, 0).reshape(count, -1).amax(1).to(torch.float64)
            found[node] = torch.maximum(found[node], largest) if node in found else largest

        return seen

    _watch(module, calls, {node: keep(node, axis, count) for node, (axis, count) in channels.items()})
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
    held: dict[fx.Node, Tensor] = {}
    watchers: dict[fx.Node, list[Callable[[Tensor], None]]] = {}

    def hold(node: fx.Node) -> Callable[[Tensor], None]:
        def seen(value: Tensor) -> None:
            held[node] = value

        return seen

    def compare(place: int) -> Callable[[Tensor], None]:
        def seen(exact: Tensor) -> None:
            given = held[ends[place][0]]
            for number, part in enumerate(parts[place]):
                sums[place][number] += float((part(given).to(torch.float64) - exact.to(torch.float64)).square().sum())

        return seen

    for place, (start, end) in enumerate(ends):
        watchers.setdefault(end, []).append(compare(place))
        watchers.setdefault(start, []).insert(0, hold(start))
    _watch(module, calls, {node: _each(heard) for node, heard in watchers.items()})
    return sums


def _each(heard: Sequence[Callable[[Tensor], None]]) -> Callable[[Tensor], None]:
    def seen(value: Tensor) -> None:
        for watcher in heard:
            watcher(value)

    return seen
