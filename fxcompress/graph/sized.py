"""Symbolic tracing of code that computes with sizes: every value knows its shape, and only the batch is left free.

Each value is followed for two batch sizes at once. A size that is the same for both is a plain number, so that code may
branch and loop on it; one that differs stays in the graph. A branch that would go different ways is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from fxcompress.errors import TraceError
from fxcompress.graph.containers import plain

__all__ = ["Sized", "SizedTracer"]

Pair = tuple[Any, Any]
"""A value at two batch sizes: meta tensors, or plain values."""

_SAME = ("dtype", "layout", "is_cuda", "requires_grad")
"""Attributes that do not depend on the batch."""


class SizedTracer(fx.Tracer):
    """Traces a function into an existing graph, at its insertion point; ``values`` holds what nodes are known as."""

    def __init__(self, graph: fx.Graph, values: dict[fx.Node, Pair], describe: Callable[[fx.Node], None]) -> None:
        super().__init__()
        self.graph, self.values, self.describe = graph, values, describe
        self.made: list[fx.Node] = []
        self.root = torch.nn.Module()

    def proxy(self, node: fx.Node) -> Sized:
        return Sized(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        given: Any = (self.create_arg(args), self.create_arg(kwargs))
        node = self.create_node(kind, target, *given)
        self.made.append(node)
        self.describe(node)
        pair = (self._run(kind, target, node, 0), self._run(kind, target, node, 1))
        self.values[node] = pair
        if all(isinstance(value, (int, float)) for value in pair) and pair[0] == pair[1]:
            return pair[0]
        return self.proxy(node)

    def _run(self, kind: str, target: Any, node: fx.Node, which: int) -> Any:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: self.values[n][which])
        args, kwargs = plain(args), plain(kwargs)
        function = getattr(torch.Tensor, target) if kind == "call_method" and isinstance(args[0], torch.Tensor) else target
        if kind == "call_method" and not isinstance(args[0], torch.Tensor):
            return getattr(args[0], target)(*args[1:], **kwargs)
        return function(*args, **kwargs)

    def size(self, proxy: Sized, dim: int) -> Any:
        """A size: a number, or a node where it follows the batch."""
        first, second = (value.shape[dim] for value in proxy.values)
        return first if first == second else self.create_proxy("call_method", "size", (proxy, dim), {})

    def to_bool(self, obj: fx.Proxy) -> bool:
        assert isinstance(obj, Sized)
        return bool(_agreed(obj, "a branch"))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        assert isinstance(obj, Sized)
        return iter([operator.getitem(obj, i) for i in range(len(obj))])

    def undo(self) -> None:
        """Take everything that was traced out of the graph again."""
        for node in reversed(self.made):
            self.graph.erase_node(node)


class Sized(fx.Proxy):
    """A proxy that knows what it stands for at two batch sizes."""

    tracer: SizedTracer

    @property
    def values(self) -> Pair:
        return self.tracer.values[self.node]

    def __getattr__(self, k: str) -> Any:
        first = self.values[0]
        if not isinstance(first, torch.Tensor):
            return fx.proxy.Attribute(self, k)
        if k == "shape":
            return tuple(self.tracer.size(self, dim) for dim in range(first.dim()))
        if k in ("device", "T", "mT"):
            return self.tracer.create_proxy("call_function", getattr, (self, k), {})
        if k in _SAME:
            return getattr(first, k)
        if k == "ndim":
            return first.dim()
        return {"dim": lambda: first.dim(), "size": self._size, "numel": self._numel}.get(k, fx.proxy.Attribute(self, k))

    def _size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.tracer.size(self, dim)

    def _numel(self) -> Any:
        return self.tracer.create_proxy("call_method", "numel", (self,), {})

    def __len__(self) -> int:
        lengths = {len(value) for value in self.values}
        if len(lengths) > 1:
            raise TraceError("it iterates over the batch")
        return lengths.pop()

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __index__(self) -> int:
        return int(_agreed(self, "a number"))

    def __int__(self) -> int:
        return int(_agreed(self, "a number"))

    def __float__(self) -> float:
        return float(_agreed(self, "a number"))


def _in_place(name: str) -> Callable[[Sized, Any], Any]:
    """``x += y`` writes into ``x``, which other names may see."""
    target = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", target, (self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv"):
    setattr(Sized, f"__{_name}__", _in_place(_name))


def _agreed(proxy: Sized, what: str) -> Any:
    first, second = proxy.values
    if isinstance(first, torch.Tensor):
        raise TraceError(f"{what} depends on values")
    if first != second:
        raise TraceError(f"{what} depends on the batch size")
    return first
