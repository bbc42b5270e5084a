"""What values are while a model is traced symbolically: followed on meta tensors, for calls of several shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.errors import TraceError
from fxcompress.graph import edit
from fxcompress.graph.meta_run import MetaRun, on_meta

__all__ = ["MANY", "Known", "Shapes", "at_batch_sizes", "leading_size", "resized"]

T = TypeVar("T")

Shapes = Mapping[str, Any]
"""Arguments by the names of placeholders; of tensors, shapes and types count."""


def at_batch_sizes(given: T, *sizes: int) -> list[T]:
    """Arguments at other batch sizes; none where its tensors say nothing of a batch."""
    size = leading_size(given)
    return [resized(given, {(0, size): other}) for other in sizes if size]


def leading_size(given: Any) -> int:
    """The batch size: that of the first tensor that has dimensions; 0 where there is none."""
    tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    return tensors[0].shape[0] if tensors else 0


def resized(given: T, sizes: Mapping[tuple[int, int], int]) -> T:
    """Arguments on meta tensors, where dimensions of a size, both given as (dimension, size), have another one."""

    def other(tensor: torch.Tensor) -> torch.Tensor:
        shape = [sizes.get((dim, size), size) for dim, size in enumerate(tensor.shape)]
        return torch.empty(shape, dtype=tensor.dtype, device="meta")

    return pytree.tree_map_only(torch.Tensor, other, given)


MANY = 420
"""Times as much: what code asks of this is not what it asks of one, and it is divided by all small numbers."""


class Known:
    """Tells what nodes of a graph in the making are, in each of several calls.

    ``looking``  what keeps tracing out of a look at a value
    ``device``   where the model is
    """

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        calls: list[Shapes],
        looking: Callable[[], AbstractContextManager[None]],
        device: torch.device,
    ) -> None:
        self.looking = looking
        self.calls = [_Follower(root, graph, given, device) for given in calls]

    def value(self, node: fx.Node, call: int = 0, *, alone: bool = False) -> Any:
        """What ``node`` is in one of the calls; LookupError where that is not known.

        Everything before it is followed too, since it may be written into, unless it is asked for ``alone``.
        """
        with self.looking():
            return self.calls[call].value(node, alone)

    def agreed(self, node: fx.Node, form: Callable[[Any], Any]) -> Any:
        """What ``form`` makes of ``node`` in each call alike; LookupError where that depends on more than shapes and types.

        Raises TraceError where it depends on the size of the batch.
        """
        value = self.value(node)
        if (isinstance(value, torch.Tensor) and form is not len) or any(_is_vague(n) for n in self._asked(node)):
            raise LookupError(node)
        outcome = form(value)
        if any(self.differs(node, form, outcome, call) for call in range(1, len(self.calls))):
            raise TraceError("its code decides by the size of the batch")
        return outcome

    def differs(self, node: fx.Node, form: Callable[[Any], Any], outcome: Any, call: int, *, alone: bool = False) -> bool:
        """Whether ``form`` makes something else of a node in another call, where that gets there."""
        try:
            return bool(form(self.value(node, call, alone=alone)) != outcome)
        except LookupError:
            return False

    def is_said_by_arguments(self, node: fx.Node) -> bool:
        """Whether what ``node`` is follows from shapes of arguments, and from nothing that the model computes or holds."""
        asked = list(self._asked(node))
        inputs = [n for n in asked if n.op == "placeholder"]
        others = [n for n in asked if n.op != "placeholder"]
        return bool(inputs) and not any(
            n.op == "get_attr" or (n.target is getattr and n.args[1] in _PLACES) or isinstance(self.value(n), torch.Tensor)
            for n in others
        )

    def _asked(self, node: fx.Node) -> Iterator[fx.Node]:
        """``node`` and what it is computed from, as far as the tensors that were asked for something."""
        seen, queue = {node}, [node]
        while queue:
            current = queue.pop()
            yield current
            if current is node or not isinstance(self.value(current), torch.Tensor):
                new = [source for source in current.all_input_nodes if source not in seen]
                seen.update(new)
                queue.extend(new)


_VAGUE = ("requires_grad", "grad", "grad_fn", "is_leaf", "data_ptr", "stride", "is_contiguous", "storage_offset")


def _is_vague(node: fx.Node) -> bool:
    """Whether a node asks a tensor for what meta tensors do not have as it was."""
    return (node.target is getattr and node.args[1] in _VAGUE) or (node.op == "call_method" and node.target in _VAGUE)


_PLACES: dict[str, Callable[[torch.device], Any]] = {
    "device": lambda device: device,
    "is_cuda": lambda device: device.type == "cuda",
    "is_cpu": lambda device: device.type == "cpu",
    "is_meta": lambda device: device.type == "meta",
}
"""Attributes that say where a tensor is."""


class _Follower(MetaRun):
    """A run on meta tensors that goes as far as it is asked to, of a graph that grows."""

    def __init__(self, root: nn.Module, graph: fx.Graph, given: Shapes, device: torch.device) -> None:
        super().__init__(root, graph)
        self.given, self.device = given, device
        self.last: fx.Node | None = None

    def value(self, node: fx.Node, alone: bool) -> Any:
        if node not in self.env:
            self._follow(node, edit.ancestors(node) if alone else None)
        if node in self.unknown:
            raise LookupError(node)
        return self.env[node]

    def _follow(self, end: fx.Node, wanted: set[fx.Node] | None) -> None:
        place = self.graph._root if self.last is None or self.last._erased else self.last
        with torch.no_grad():
            while place is not end:
                place = place.next
                if place not in self.env and (wanted is None or place in wanted):
                    self.env[place] = self.run_node(place)
        self.last = end if wanted is None else None

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is getattr and isinstance(args[0], torch.Tensor) and args[1] in _PLACES:
            return _PLACES[args[1]](self.device)
        return super().call_function(target, args, kwargs)

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target not in self.given and not args:
            raise LookupError(target)
        return pytree.tree_map_only(torch.Tensor, on_meta, self.given[target] if target in self.given else args[0])
