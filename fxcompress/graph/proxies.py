"""Stand-ins for the values of a model that is traced, which answer what code asks of them: lengths, sizes, branches."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils import _pytree as pytree

__all__ = ["Answering", "taken_by_tensors"]


class Answering(fx.Proxy):
    """A proxy whose tracer knows lengths and numbers, and that may be written into."""

    def __getattr__(self, k: str) -> Any:
        if k.startswith("__array_"):  # numpy would call what is there
            raise AttributeError(k)
        return _Attribute(self, k)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.asarray(self.tracer.number(self), dtype)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return self.tracer.length(self)  # type: ignore[attr-defined]

    def __index__(self) -> int:
        return int(self.tracer.number(self))  # type: ignore[attr-defined]

    __int__ = __index__

    def __float__(self) -> float:
        return float(self.tracer.number(self))  # type: ignore[attr-defined]

    def __setitem__(self, index: Any, value: Any) -> None:
        """Write into a view, or where a mask says so: that is how channels are followed best."""
        if isinstance(value, fx.Proxy) and _is_written_part(value.node, self.node, self.tracer.create_arg(index)):
            return
        if self.tracer.is_mask(self, index) and type(value) in (int, float, bool):  # type: ignore[attr-defined]
            self.masked_fill_(index, value)
        elif not _is_plain(index) or (isinstance(value, fx.Proxy) and not self.tracer.is_tensor(value)):  # type: ignore[attr-defined]
            self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})
        elif type(value) in (int, float, bool):
            operator.getitem(self, index).fill_(value)
        else:
            operator.getitem(self, index).copy_(value)


class _Attribute(Answering, fx.proxy.Attribute):
    """An attribute of one, or the method of that name."""


def _is_written_part(value: fx.Node, whole: fx.Node, index: Any) -> bool:
    """Whether ``value`` was made by writing into a part of ``whole``, where Python writes it again: ``x[i] += y``."""
    part = value.args[0] if value.target in _IN_PLACE else None
    return isinstance(part, fx.Node) and part.target is operator.getitem and part.args == (whole, index)


def _is_plain(index: Any) -> bool:
    """Whether what an index gives is a view: it is made of numbers, sizes that make slices, and new dimensions."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or isinstance(part, (int, slice)) for part in parts)


_IN_PLACE: dict[Any, Any] = {
    getattr(operator, f"i{name}"): getattr(operator, name) for name in ("add", "sub", "mul", "truediv")
}
"""Operators that write into what they are given, which other names may see, and those that do not."""


def _writing(target: Any) -> Callable[[Answering, Any], Any]:
    def write(self: Answering, other: Any) -> Any:
        chosen = target if self.tracer.is_tensor(self) else _IN_PLACE[target]  # type: ignore[attr-defined]
        return self.tracer.create_proxy("call_function", chosen, (self, other), {})

    return write


for _target in _IN_PLACE:
    setattr(Answering, f"__{_target.__name__}__", _writing(_target))


_SIZED = ("expand", "repeat", "view", "reshape", "unflatten", "narrow", "new_zeros", "new_ones", "new_full", "new_empty")


@contextmanager
def taken_by_tensors() -> Iterator[None]:
    """Let methods of tensors that the code makes itself take sizes that are traced, as torch's functions do."""
    kept = {name: vars(torch.Tensor).get(name) for name in _SIZED}
    for name in _SIZED:
        setattr(torch.Tensor, name, _taking(name, getattr(torch.Tensor, name)))
    try:
        yield
    finally:
        for name, original in kept.items():
            if original is None:
                delattr(torch.Tensor, name)
            else:
                setattr(torch.Tensor, name, original)


def _taking(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if type(leaf) in (Answering, _Attribute)]
        if not sizes:
            return method(self, *args, **kwargs)
        return sizes[0].tracer.create_proxy("call_method", name, (self, *args), kwargs)

    return call
