"""Reading a node: which operator it is, however it is spelled, and what its arguments mean.

``torch.add``, ``operator.add``, ``Tensor.add_``, ``nn.ReLU``, ``F.relu`` and ``aten.relu.default`` are spellings. A row of
the table in :mod:`fxcompress.graph.table` gathers the spellings of one operator under one *kind* and holds beside it what
analyses need. Passes ask :func:`kind` and :func:`read`, never a spelling.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from fxcompress.graph.hooks import has_hooks
from fxcompress.graph.tree import submodule

__all__ = [
    "Attr",
    "Call",
    "Op",
    "argument_order",
    "call_arguments",
    "is_layer",
    "kind",
    "lookup",
    "module_kind",
    "owner_name",
    "read",
    "value_readers",
]


@dataclass(frozen=True)
class Attr:
    """A parameter or buffer of the graph module, by its qualified name."""

    name: str


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
        return tuple(self.arguments.split())


@dataclass(frozen=True)
class Call:
    """A node read through the op table: ``arguments`` maps canonical names to nodes, literals or :class:`Attr`."""

    node: fx.Node
    op: Op
    arguments: dict[str, Any]

    @property
    def kind(self) -> str:
        return self.op.kind

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name, self.op.defaults.get(name))

    @property
    def inputs(self) -> list[fx.Node]:
        """The nodes whose values this call consumes, in order, parameters left out."""
        return [n for n in self.node.all_input_nodes if n.op != "get_attr"]


class _Index:
    """Spelling → (row, argument names). Built once, when first asked."""

    def __init__(self) -> None:
        self.targets: dict[Any, tuple[Op, tuple[str, ...]]] = {}
        self.spelled: dict[str, Any] = {}
        self.methods: dict[str, tuple[Op, tuple[str, ...]]] = {}
        self.modules: dict[type, Op] = {}
        self.module_names: dict[str, Op] = {}

    def add(self, op: Op) -> None:
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

    def module(self, cls: type) -> Op | None:
        found = self.modules.get(cls)
        if found is None:
            found = self.module_names.get(f"{cls.__module__}.{cls.__qualname__}")
        if found is None and cls.__name__.startswith("Parametrized"):
            return self.module(cls.__mro__[1])
        return found


_PLACES = {
    "torch": torch,
    "torch.nn.functional": F,
    "torch.special": torch.special,
    "torch._C._nn": torch._C._nn,
    "operator": operator,
    "aten": torch.ops.aten,
}


def _spellings(name: str) -> Iterator[tuple[str, Any]]:
    for path, place in _PLACES.items():
        target = getattr(place, name, None)
        if callable(target):
            yield f"{path}.{name}", target


def target_name(target: Any) -> str | None:
    """The word a call target is saved under, or None where it is not in the allow-list."""
    if isinstance(target, torch._ops.OpOverload):
        space, _, name = target._schema.name.partition("::")
        return f"{space}.{name}.{target._overloadname}" if _is_allowed(space, name) else None
    return _names().get(target)


def target_by_name(name: str) -> Any:
    """The call target saved under ``name``, or None where it is not in the allow-list."""
    if name in _table().spelled:
        return _table().spelled[name]
    space, _, rest = name.partition(".")
    operator_name, _, overload = rest.partition(".")
    if not _is_allowed(space, operator_name):
        return None
    return getattr(getattr(getattr(torch.ops, space), operator_name, None), overload, None)


def _is_allowed(space: str, name: str) -> bool:
    return space == "fxcompress" or (space == "aten" and "file" not in name)


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


_index: _Index | None = None


def _table() -> _Index:
    global _index
    if _index is None:
        from fxcompress.graph.table import TABLE

        _index = _Index()
        for op in TABLE:
            _index.add(op)
    return _index


def _target_row(target: Any) -> tuple[Op, tuple[str, ...]] | None:
    table = _table().targets
    if isinstance(target, torch._ops.OpOverload):
        return table.get(target) or table.get(target.overloadpacket)
    if isinstance(target, type) and (is_named_tuple(target) or dataclasses.is_dataclass(target)):
        return table[OrderedDict]
    try:
        return table.get(target)
    except TypeError:
        return None


def is_named_tuple(cls: Any) -> bool:
    """Whether ``cls`` is a named tuple class, as models return them."""
    return isinstance(cls, type) and issubclass(cls, tuple) and hasattr(cls, "_fields")


def is_known_module(module: nn.Module) -> bool:
    """Whether the op table has a row for this module's class."""
    return is_known_class(type(module))


def is_known_class(cls: type[nn.Module]) -> bool:
    """Whether the op table has a row for this class of layers."""
    return _table().module(cls) is not None


def module_kind(module: nn.Module) -> str:
    """The kind of operator a module is, or "" where the op table has no row for its class."""
    found = _table().module(type(module))
    return found.kind if found else ""


def lookup(node: fx.Node) -> Op | None:
    """The row of the op table for ``node``, or None where its operator is unknown, as that of a layer with hooks is."""
    if node.op == "call_module":
        module = _submodule(node)
        return None if module is None or has_hooks(module) else _table().module(type(module))
    if node.op == "call_method":
        row = _table().methods.get(str(node.target))
    else:
        row = _target_row(node.target) if node.op == "call_function" else None
    return row[0] if row else None


def kind(node: fx.Node) -> str:
    """The operator's kind: a row's kind, or ``placeholder``, ``get_attr``, ``output``, ``island``, ``unknown``."""
    if node.op in ("placeholder", "get_attr", "output"):
        return node.op
    found = lookup(node)
    if found is not None:
        return found.kind
    return "island" if node.op == "call_module" else "unknown"


def owner_name(node: fx.Node) -> str:
    """The qualified name of the module that ``node`` belongs to: its target, or the module whose code made the call.

    Where that code computes with the weight of a module inside it (a function that is given ``attention.proj.weight``), the
    call belongs to that inner module.
    """
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack")
    owner = str(next(reversed(stack.values()))[0]) if stack else ""
    found = lookup(node) if node.op.startswith("call") else None
    if found is not None and found.family in _WEIGHTED:
        inner = [name for name in map(_holder, node.all_input_nodes) if name and (not owner or name.startswith(f"{owner}."))]
        return inner[0] if inner else owner
    return owner


_WEIGHTED = ("contraction", "normalisation", "embedding")


def _holder(node: fx.Node) -> str:
    """The module that holds a fetched tensor, also behind an observer or a dequantize; "" for any other value."""
    if node.meta.get("observer") or getattr(node.target, "namespace", None) == "fxcompress":
        node = node.all_input_nodes[0]
    return str(node.target).rpartition(".")[0] if node.op == "get_attr" else ""


def is_layer(node: fx.Node) -> bool:
    """Whether ``node`` is the work of one layer (a module's call, or a weight's), not a step of a larger module's code."""
    call = read(node) if node.op.startswith("call") else None
    return node.op == "call_module" or (call is not None and call["weight"] is not None)


def value_readers(node: fx.Node) -> list[fx.Node]:
    """The users of a node but those that only ask for its shape or type, which a pass may go past."""
    return [user for user in node.users if not _asks(user)]


def _asks(node: fx.Node) -> bool:
    found = lookup(node)
    return found is not None and found.kind in _QUESTIONS and not (node.target is getattr and node.args[1] in _TENSORS)


_QUESTIONS = ("shape", "getattr", "like", "new")
_TENSORS = ("T", "H", "mT", "mH", "data", "real", "imag", "grad")
"""Attributes of a tensor that are tensors."""


def read(node: fx.Node) -> Call | None:
    """``node`` with its arguments under canonical names, or None where the op table has no row for it.

    Module attributes (stride, eps, ...) and functional arguments come out alike; parameters come out as :class:`Attr`,
    whether a module owns them or a ``get_attr`` node fetches them.
    """
    if node.op == "call_module":
        op = lookup(node)
        return _read_module(node, op) if op else None
    if node.op == "call_method":
        row = _table().methods.get(str(node.target))
    elif node.op == "call_function":
        row = _target_row(node.target)
    else:
        return None
    if row is None:
        return None
    op, names = row
    bound = {name: _as_attr(value) for name, value in call_arguments(names, node.args, node.kwargs).items()}
    return Call(node, op, bound)


def argument_order(node: fx.Node) -> tuple[str, ...]:
    """The canonical argument names of a function call, in the order its spelling takes them."""
    row = _target_row(node.target)
    return row[1] if row else ()


def call_arguments(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Positional and keyword arguments under ``names``; a last name ``*x`` gathers the remaining positionals."""
    bound: dict[str, Any] = {}
    for position, name in enumerate(names):
        if name.startswith("*"):
            rest = args[position:]
            bound[name[1:]] = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else tuple(rest)
            break
        if position < len(args):
            bound[name] = args[position]
    bound.update({ALIASES.get(name, name): value for name, value in kwargs.items()})
    return bound


ALIASES = {"axis": "dim", "keepdims": "keepdim"}
"""Argument names that torch takes as numpy spells them."""


def _read_module(node: fx.Node, op: Op) -> Call:
    module = _submodule(node)
    attributes, names = vars(module), op.argument_names
    inputs = [name for name in names if name not in op.tensors and not _has_attribute(attributes, name)]
    bound = call_arguments(tuple(inputs), node.args, node.kwargs)
    for name in names:
        if name in bound or name.startswith("*"):
            continue
        if name in op.tensors:
            present = getattr(module, name, None) is not None
            bound[name] = Attr(f"{node.target}.{name}") if present else None
        elif _has_attribute(attributes, name):
            bound[name] = attributes[name]
    return Call(node, op, bound)


def _has_attribute(attributes: Mapping[str, Any], name: str) -> bool:
    return name in attributes and name != "input"


def _as_attr(value: Any) -> Any:
    """A fetched tensor as :class:`Attr`, also where an observer or fake-quantizer stands between it and its reader."""
    if isinstance(value, fx.Node) and value.meta.get("observer"):
        value = value.args[0] if getattr(value.args[0], "op", None) == "get_attr" else value
    return Attr(str(value.target)) if isinstance(value, fx.Node) and value.op == "get_attr" else value


def _submodule(node: fx.Node) -> nn.Module | None:
    owner = node.graph.owning_module
    return submodule(owner, str(node.target)) if owner is not None else None
