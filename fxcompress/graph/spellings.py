"""Spellings: the names under which an operator is found, and the allow-list they make.

``torch.add``, ``operator.add``, ``Tensor.add_``, ``nn.ReLU``, ``F.relu`` and ``aten.relu.default`` are spellings. A row of
:mod:`fxcompress.graph.table` gathers those of one operator under one *kind*; what has no row is in no saved model.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

__all__ = [
    "Op",
    "call_row",
    "is_known_class",
    "is_known_method",
    "is_known_module",
    "is_named_tuple",
    "known_class_names",
    "known_classes",
    "layer_row",
    "module_kind",
    "target_by_name",
    "target_name",
]


@dataclass(frozen=True)
class Op:
    """One operator.

    ``kind``       its name here, and in the ledger
    ``family``     what analyses treat alike: contraction, normalisation, activation, pointwise, movement, pooling,
                   reduction, attention, recurrent, embedding, query (no tensor comes out), other
    ``names``      names under which torch, torch.nn.functional, Tensor, operator and aten spell it
    ``arguments``  canonical argument names in call order; ``*rest`` gathers what follows
    ``modules``    classes that are this operator (or ``"package.Class"`` where importing the package is not ours to ask)
    ``tensors``    the arguments that are parameters or buffers of those modules
    ``functions``  further callables that are this operator, with their own argument order where it differs
    ``defaults``   canonical values of arguments that a call may leave out
    """

    kind: str
    family: str
    names: str = ""
    arguments: str = "input"
    modules: tuple[type[nn.Module] | str, ...] = ()
    tensors: tuple[str, ...] = ()
    functions: tuple[tuple[Any, str | None], ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def argument_names(self) -> tuple[str, ...]:
        """``arguments`` one by one."""
        return tuple(self.arguments.split())


def target_name(target: Any) -> str | None:
    """The word a call target is saved under, or None where it is not in the allow-list."""
    if isinstance(target, torch._ops.OpOverload):
        space, _, name = target._schema.name.partition("::")
        return f"{space}.{name}.{target._overloadname}" if _is_allowed(target) else None
    return _names().get(target)


def target_by_name(name: str) -> Any:
    """The call target saved under ``name``, or None where it is not in the allow-list."""
    if name in _table().spelled:
        return _table().spelled[name]
    space, _, rest = name.partition(".")
    operator_name, _, overload = rest.partition(".")
    if space not in _SPACES:
        return None
    target = getattr(getattr(getattr(torch.ops, space), operator_name, None), overload, None)
    return target if isinstance(target, torch._ops.OpOverload) and _is_allowed(target) else None


_SPACES = ("aten", "fxcompress")


def _is_allowed(target: torch._ops.OpOverload) -> bool:
    """Whether an operator is one of ours or of torch, and neither reads nor writes a file."""
    return target.namespace in _SPACES and all(argument.name != "filename" for argument in target._schema.arguments)


@functools.cache
def _names() -> dict[Any, str]:
    names: dict[Any, str] = {}
    for name, target in _table().spelled.items():
        names.setdefault(target, name)
    return names


def is_known_method(name: str) -> bool:
    """Whether the op table has a row for this tensor method."""
    return name in _table().methods


def known_classes() -> dict[str, type[nn.Module]]:
    """Layer classes of the op table by qualified name."""
    return {f"{cls.__module__}.{cls.__qualname__}": cls for cls in _table().modules}


def known_class_names() -> set[str]:
    """Classes of the op table that live in packages of their own."""
    return set(_table().module_names)


Row = tuple[Op, tuple[str, ...]]
"""An operator, and its argument names in the order in which one spelling takes them."""


def call_row(node: fx.Node) -> Row | None:
    """The row for the call of a function or a method; None where there is none, and for any other node."""
    if node.op == "call_method":
        return _table().methods.get(str(node.target))
    return _target_row(node.target) if node.op == "call_function" else None


def layer_row(cls: type) -> Op | None:
    """The operator that a class of layers is; None where the op table has no row for it."""
    return _table().layer(cls)


def is_known_module(module: nn.Module) -> bool:
    """Whether the op table has a row for this module's class."""
    return is_known_class(type(module))


def is_known_class(cls: type[nn.Module]) -> bool:
    """Whether the op table has a row for this class of layers."""
    return layer_row(cls) is not None


def module_kind(module: nn.Module) -> str:
    """The kind of operator a module is, or "" where the op table has no row for its class."""
    found = layer_row(type(module))
    return found.kind if found else ""


def is_named_tuple(cls: Any) -> bool:
    """Whether ``cls`` is a named tuple class, as models return them."""
    return isinstance(cls, type) and issubclass(cls, tuple) and hasattr(cls, "_fields")


def _target_row(target: Any) -> Row | None:
    table = _table().targets
    if isinstance(target, torch._ops.OpOverload):
        return table.get(target) or table.get(target.overloadpacket)
    if isinstance(target, type) and (is_named_tuple(target) or dataclasses.is_dataclass(target)):
        return table[OrderedDict]
    try:
        return table.get(target)
    except TypeError:
        return None


class _Index:
    """Spelling → row."""

    def __init__(self) -> None:
        self.targets: dict[Any, Row] = {}
        self.spelled: dict[str, Any] = {}
        self.methods: dict[str, Row] = {}
        self.modules: dict[type, Op] = {}
        self.module_names: dict[str, Op] = {}

    def add(self, op: Op) -> None:
        """Take up a row under all its spellings; a name that an earlier row has stays that row's."""
        for name in op.names.split():
            self.methods.setdefault(name, (op, op.argument_names))
            for path, target in _spellings(name):
                self.targets.setdefault(target, (op, op.argument_names))
                self.spelled.setdefault(path, target)
        for target, order in op.functions:
            self.targets[target] = (op, tuple(order.split()) if order else op.argument_names)
            if not isinstance(target, torch._ops.OpOverloadPacket):
                self.spelled.setdefault(f"{target.__module__}.{target.__name__}", target)
        for module in op.modules:
            if isinstance(module, str):
                self.module_names[module] = op
            else:
                self.modules[module] = op

    def layer(self, cls: type) -> Op | None:
        """The row of a class of layers; a parametrized one has that of the class below."""
        found = self.modules.get(cls)
        if found is None:
            found = self.module_names.get(f"{cls.__module__}.{cls.__qualname__}")
        if found is None and cls.__name__.startswith("Parametrized"):
            return self.layer(cls.__mro__[1])
        return found


_PLACES = {
    "torch": torch,
    "torch.nn.functional": F,
    "torch.special": torch.special,
    "torch.linalg": torch.linalg,
    "torch._C._nn": torch._C._nn,
    "operator": operator,
    "aten": torch.ops.aten,
}


def _spellings(name: str) -> Iterator[tuple[str, Any]]:
    for path, place in _PLACES.items():
        target = getattr(place, name, None)
        if callable(target):
            yield f"{path}.{name}", target


@functools.cache
def _table() -> _Index:
    from fxcompress.graph.table import TABLE  # its rows name operators of ours, which need this module

    index = _Index()
    for op in TABLE:
        index.add(op)
    return index
