"""One walk over a graph: every value gets labels by the rule of its operator, and what must match is merged.

A rule is a function of the walk and a call that was read through the op table; it returns the call's :class:`Value` (or a
structure of them). An operator without a rule freezes whatever reaches it, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxcompress.errors import PassError
from fxcompress.graph import edit, ops, spellings
from fxcompress.graph.channels.atoms import Atoms, Ints
from fxcompress.graph.channels.calls import (
    Readings,
    Spelling,
    enumerate_operands,
    evaluate,
    is_pointwise,
    operand_names,
    operator_name,
    place,
    plain,
)
from fxcompress.graph.channels.labels import Label, Value, moved, values_in
from fxcompress.graph.channels.movement import Sites, move
from fxcompress.graph.shapes import is_meta

__all__ = ["FAMILIES", "RULES", "Count", "Rule", "Walk", "rule"]


@dataclass(frozen=True)
class Count:
    """An argument or module attribute that states how many channels (or groups) there are: one per atom that is kept."""

    node: fx.Node
    name: str
    atoms: Ints


class _ShapelessError(PassError):
    """A rule wants a tensor, and its operand is something else (a packed sequence), or its shape is not known."""


@dataclass
class Walk:
    """The state of one walk, and what it found.

    ``env``       node → Value, a structure of them, a constant tensor, or a plain value
    ``tensors``   parameter or buffer → its labels by dimension (a tensor with several names counts under its first)
    ``roles``     (tensor, dimension) → ``out``, ``in``, ``scale`` (of BatchNorm) or ``norm``, as its layer uses it
    ``counts``    arguments that state a number of channels
    ``alike``     tensor → others of its shape that lose what it loses
    ``refused``   nodes to give up on, with the reason
    ``grouped``   where channels split into the groups of a convolution: site → number of groups
    ``attention`` splits that feed a product of two activations: heads and head dimensions
    """

    module: fx.GraphModule
    sites: Sites
    atoms: Atoms = field(default_factory=Atoms)
    env: dict[fx.Node, Any] = field(default_factory=dict)
    tensors: dict[str, Value] = field(default_factory=dict)
    roles: dict[tuple[str, int], str] = field(default_factory=dict)
    counts: list[Count] = field(default_factory=list)
    grouped: dict[str, int] = field(default_factory=dict)
    attention: set[str] = field(default_factory=set)
    opaque: dict[fx.Node, str] = field(default_factory=dict)

    refused: Mapping[str, str] = field(default_factory=dict)
    calls: dict[fx.Node, ops.Call | None] = field(default_factory=dict, repr=False)
    readings: Readings = field(default_factory=Readings, repr=False)

    def __post_init__(self) -> None:
        named = [
            *self.module.named_parameters(remove_duplicate=False),
            *self.module.named_buffers(remove_duplicate=False),
        ]
        self.state = dict(named)
        first: dict[tuple[Any, ...], str] = {}
        self.canonical = {name: first.setdefault(_identity(tensor), name) for name, tensor in named}
        self.alike: dict[str, list[str]] = {}
        for name in list(self.state):
            self._see_through(name)

    def _see_through(self, name: str) -> None:
        """A weight with a mask goes by the dense weight below it, and the mask loses what the weight loses."""
        held, found, rest = name.partition("parametrizations.")
        leaf, _, part = rest.partition(".")
        original = f"{held}parametrizations.{leaf}.original"
        if not found or original not in self.state:
            return
        if part == "original":
            self.canonical[f"{held}{leaf}"] = self.canonical[name]
        elif self.state[name].shape == self.state[original].shape:
            self.alike.setdefault(self.canonical[original], []).append(name)

    def on(self, module: fx.GraphModule) -> Walk:
        """The same walk over a copy of its module."""
        nodes = dict(zip(self.module.graph.nodes, module.graph.nodes, strict=True))
        return replace(
            self,
            module=module,
            env={nodes[node]: value for node, value in self.env.items()},
            counts=[replace(count, node=nodes[count.node]) for count in self.counts],
            opaque={nodes[node]: reason for node, reason in self.opaque.items()},
            calls={},
        )

    def run(self) -> Walk:
        """Walk the graph; returns self."""
        for node in self.module.graph.nodes:
            self.env[node] = self._visit(node)
        return self

    def _visit(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.unlabelled(node)
        if node.op == "get_attr":
            return self.fetched(node)
        if node.op == "output":
            for value in self.inputs(node):
                self.freeze(value, "it is an output of the model")
            return None
        if not self.inputs(node) and node.op != "call_module":
            return self._made(node)
        if node.name in self.refused:
            return self.give_up(node, self.refused[node.name])
        call = self.call(node)
        if call is None and is_pointwise(node):
            call = ops.Call(node, POINTWISE, dict(enumerate_operands(node)))
        found = (RULES.get(call.kind) or FAMILIES.get(call.op.family)) if call is not None else None
        if call is None or found is None:
            return self.give_up(node, f"{operator_name(node)} has no rule")
        try:
            return found(self, call)
        except _ShapelessError as error:
            return self.give_up(node, str(error))
        except Exception as error:  # a form of the call that its rule does not foresee: nothing is claimed about it
            return self.give_up(node, f"this form of {call.kind} is not understood ({type(error).__name__}: {error})")

    def unlabelled(self, node: fx.Node) -> Any:
        meta = node.meta.get("tensor_meta")
        if meta is None:
            return node.args[0] if node.op == "placeholder" and node.args else None
        return pytree.tree_map(lambda m: Value(tuple(m.shape)) if m is not None else None, meta, is_leaf=is_meta)

    def inputs(self, node: fx.Node) -> list[Value]:
        """Every tensor a node reads."""
        return [value for source in node.all_input_nodes for value in values_in(self.env[source])]

    def _made(self, node: fx.Node) -> Any:
        """A call on nothing but plain values and constant tensors."""
        call = self.call(node)
        found = RULES.get(call.kind) if call is not None and (call.kind in ("factory", "new") or _repeats(call)) else None
        return found(self, call) if found is not None and call is not None else self.constant(node)

    def constant(self, node: fx.Node) -> Any:
        """What a call gives that no label passes through: a plain value, a constant tensor, or a tensor that stays whole."""
        found = self.evaluate_or_none(node)
        if any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in pytree.tree_leaves(found)):
            return self.unlabelled(node)
        return self.unlabelled(node) if found is None else found

    def evaluate_or_none(self, node: fx.Node, device: str = "meta") -> Any:
        """:meth:`evaluate`, or None where the call wants more than shapes."""
        try:
            return self.evaluate(node, device)
        except Exception:  # whatever it wants: its result stays whole
            return None

    def evaluate_containers(self, node: fx.Node) -> Any:
        """A container of what its items are known as."""
        target: Any = node.target
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.env[n])
        return target(*args, **kwargs)

    def evaluate(self, node: fx.Node, device: str = "meta", **special: Any) -> Any:
        """Make a call on plain values and on empty tensors of the operands' shapes; ``special`` are operands by name."""
        return evaluate(self.module, self.env, Spelling.of(node), device, special)

    def plain(self, structure: Any, device: str = "meta") -> Any:
        """Nodes replaced by their plain values, tensors by empty ones of their shape."""
        return plain(self.env, structure, device, {})

    def call(self, node: fx.Node) -> ops.Call | None:
        """A call read through the op table, as it was when first asked for; None for what is no call or is unknown."""
        if node not in self.calls:
            self.calls[node] = ops.read(node)
        return self.calls[node]

    def value(self, argument: Any) -> Value | None:
        """An argument of a call as a value: a node's, or a parameter's; None for anything else."""
        if isinstance(argument, ops.Attr):
            return self.tensor(argument.name)
        found = self.env.get(argument) if isinstance(argument, fx.Node) else None
        if isinstance(found, torch.Tensor):
            return Value(tuple(found.shape))
        return found if isinstance(found, Value) else None

    def several(self, argument: Any) -> list[Value]:
        """A list of tensors, written out or as the result of a call, as values."""
        held = self.env.get(argument) if isinstance(argument, fx.Node) else None
        if held is not None:
            return [leaf for leaf in held if isinstance(leaf, Value)]
        return [value for item in argument if (value := self.value(item)) is not None]

    def operand(self, argument: Any) -> Value:
        """An argument that must be a tensor, as a value."""
        found = self.value(argument)
        if found is None:
            raise _ShapelessError(f"{argument} is not a tensor whose shape is known; trace with example inputs.")
        return found

    def tensor(self, name: str) -> Value:
        """The labels of a parameter or buffer; made when first asked for. Integers are indices and counts, and stay."""
        name = self.canonical.get(name, name)
        if name not in self.tensors:
            tensor = self.parameter(name)
            value, shape = Value(tuple(tensor.shape)), tuple(tensor.shape)
            for dim, size in enumerate(shape):
                if size > 1 and _has_channels(tensor):
                    value.labels[dim] = Label(self.atoms.new(*(size if d == dim else 1 for d in range(len(shape)))))
            self.tensors[name] = value
        return self.tensors[name]

    def adopt(self, argument: Any, line: Ints) -> bool:
        """Label a vector that is asked for the first time by the atoms of the channels whose entries it has.

        False where the argument is no such vector: its own atoms must then be merged with those.
        """
        if not isinstance(argument, ops.Attr):
            return False
        name = self.canonical.get(argument.name, argument.name)
        tensor = self.parameter(name) if name not in self.tensors else None
        if tensor is None or tuple(tensor.shape) != line.shape or len(line) == 1 or not _has_channels(tensor):
            return False
        self.tensors[name] = Value(line.shape, {0: Label(line)})
        return True

    def parameter(self, name: str) -> torch.Tensor:
        """The tensor that is learned under ``name``: below a parametrization the one that it starts from."""
        return self.state[name] if name in self.state else edit.get_tensor(self.module, name)

    def fetched(self, node: fx.Node) -> Any:
        """What a get_attr node gives: labels for floats, the tensor itself for indices and flags."""
        tensor = self.state.get(str(node.target))
        if tensor is None:
            found = edit.get_tensor(self.module, str(node.target))
            return found if not found.is_floating_point() else Value(tuple(found.shape))
        return self.tensor(str(node.target)) if _has_channels(tensor) else tensor

    def role(self, argument: Any, dim: int, role: str) -> None:
        """Note how a layer uses a dimension of its parameter."""
        if isinstance(argument, ops.Attr):
            self.roles.setdefault((self.canonical.get(argument.name, argument.name), dim), role)

    def freeze(self, value: Value | Label | None, reason: str) -> None:
        """Every index of these dimensions stays."""
        if isinstance(value, Label):
            self.atoms.freeze(value.array, reason)
        elif value is not None:
            for label in value.labels.values():
                self.atoms.freeze(label.array, reason)

    def row_of(self, label: Label, dim: int, along: int, rank: int) -> Ints:
        """The atoms along one dimension by themselves, laid along a dimension of a tensor of ``rank``."""
        return moved(self.atoms.line(label.array, dim), {0: along}, rank)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of a node's tensor, from its metadata."""
        return tuple(node.meta["tensor_meta"].shape)

    def give_up(self, node: fx.Node, reason: str) -> Any:
        """Freeze all that reaches ``node`` and the parameters of its module; its results stay whole.

        Where no channel reaches it there is nothing to remark.
        """
        where = f"{reason} ({place(node)})"
        if node.op == "call_module" or any(value.labels for value in self.inputs(node)):
            self.opaque[node] = reason
        for value in self.inputs(node):
            self.freeze(value, where)
        if node.op == "call_module":
            part = self.module.get_submodule(str(node.target))
            for name in dict([*part.named_parameters(), *part.named_buffers()]):
                self.freeze(self.tensor(f"{node.target}.{name}"), where)
        return self.unlabelled(node)

    def move(self, call: ops.Call) -> Any:
        """The result of a movement operator."""
        value = self.value(call["input"])
        if value is None:
            return self.constant(call.node)
        names = operand_names(call.node, call["input"])

        def run(tensor: torch.Tensor) -> Any:
            return self.evaluate(call.node, tensor.device.type, **dict.fromkeys(names, tensor))

        return move(self.atoms, self.sites, value, run, place(call.node), self.readings.of(call.node, self.env, names))


POINTWISE = spellings.Op("elementwise", "pointwise")
"""Whatever torch says is elementwise, and the op table has no row for."""


def _repeats(call: ops.Call) -> bool:
    """Whether a constant tensor is expanded to a size that is written as a number, as a number of channels may be."""
    sizes = call["sizes"] if call.kind == "expand" else ()
    return isinstance(sizes, (tuple, list)) and any(isinstance(size, int) and size > 1 for size in sizes)


def _has_channels(tensor: torch.Tensor) -> bool:
    """Whether entries of a tensor may go; integers are indices and counts."""
    return tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same memory seen in the same way."""
    if tensor.numel() == 0 or tensor.is_meta:
        return (id(tensor),)
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


Rule = Callable[[Walk, ops.Call], Any]

RULES: dict[str, Rule] = {}
"""Kind → rule."""

FAMILIES: dict[str, Rule] = {}
"""Family → the rule of its kinds that have none of their own."""


def rule(*names: str, table: dict[str, Rule] = RULES) -> Callable[[Rule], Rule]:
    """Put a rule into a table under these names."""

    def put(function: Rule) -> Rule:
        for name in names:
            table[name] = function
        return function

    return put
