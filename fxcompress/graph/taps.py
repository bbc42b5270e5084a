"""Taps: named values of a graph that can be asked for beside its output.

A tap is a node that reads a value and does nothing with it, so it counts as one of the value's readers: no pass may fuse the
value away, and whatever replaces the value replaces what the tap reads. The model's own output stays as it was;
:func:`features` gives a view of the same model that returns the tapped values as further outputs.

An address names a value: ``layer1`` is what the module returns, ``layer1:input`` what it is given, ``layer1:preactivation``
what enters the activation it ends in. A module that is called several times is addressed by call: ``relu@0``, ``relu@1``.
The name of a graph node is an address too.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.node import has_side_effect
from torch.utils import _pytree as pytree

from fxcompress.errors import ConfigError, TraceError, did_you_mean
from fxcompress.graph import edit, ops
from fxcompress.graph.inplace import VIEWS, reuse_memory, writes
from fxcompress.graph.island import TOP, Island
from fxcompress.graph.shapes import shape_of

__all__ = ["Features", "expand", "features", "insert", "locate", "remove", "tap", "taps"]

PORTS = ("output", "input", "preactivation")


@has_side_effect
def tap(input: Tensor, name: str) -> Tensor:
    """``input``, watched under ``name``."""
    return input


def taps(module: fx.GraphModule) -> dict[str, fx.Node]:
    """The tapped values by name, in the order they were tapped."""
    found = {str(node.args[1]): node.all_input_nodes[0] for node in module.graph.nodes if node.target is tap}
    order = {name: position for position, name in enumerate(module.meta.get("taps", ()))}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def insert(module: fx.GraphModule, addresses: Iterable[str]) -> None:
    """Tap the value at every address, under the address as its name; a tap that is there already stays.

    A value that a later node overwrites in place is tapped as a copy. Raises ConfigError for an address that names nothing
    or several values, TraceError for one inside code that was not traced.
    """
    present = taps(module)
    for address in addresses:
        if address not in present:
            value = locate(module, address)
            present[address] = value
            _watch(value, address)
    module.meta["taps"] = tuple(present)
    module.recompile()


def remove(module: fx.GraphModule, names: Iterable[str] | None = None) -> None:
    """Take taps out (None: all), and the copies that were made for them."""
    gone = set(taps(module) if names is None else names)
    for node in reversed(module.graph.nodes):
        is_one = node.target is tap and node.args[1] in gone
        if is_one or (node.meta.get("kind") == "tapped copy" and not node.users):
            module.graph.erase_node(node)
    module.meta["taps"] = tuple(name for name in module.meta.get("taps", ()) if name not in gone)
    module.recompile()


def _watch(value: fx.Node, name: str) -> None:
    overwritten = _is_overwritten(value)
    place = value
    while place.next.op == "placeholder":
        place = place.next
    if overwritten:
        value = edit.insert_after(place, torch.clone, (value,))
        value.meta |= {"tensor_meta": value.all_input_nodes[0].meta.get("tensor_meta"), "kind": "tapped copy"}
        place = value
    made = edit.insert_after(place, tap, (value, name))
    made.meta["tensor_meta"] = value.meta.get("tensor_meta")


def _is_overwritten(value: fx.Node) -> bool:
    """Whether a node after ``value`` writes into its memory, or runs code that might."""
    root = value
    while ops.kind(root) in VIEWS and root.all_input_nodes:
        root = root.all_input_nodes[0]
    family, queue = {root}, [root]
    for member in queue:
        fresh = [user for user in member.users if ops.kind(user) in VIEWS and user not in family]
        family.update(fresh)
        queue += fresh
    return any(user > value and writes(user) and user.all_input_nodes[0] in family for m in family for user in m.users)


# addresses


def locate(module: fx.GraphModule, address: str) -> fx.Node:
    """The node whose value ``address`` names."""
    name, port = _split(address)
    calls = _calls(module, name)
    if calls:
        return _PORTS[port](module, address, _chosen(address, calls))
    node = next((n for n in module.graph.nodes if n.name == name and n.op != "output"), None)
    if node is None:
        raise _unknown(module, name)
    return _PORTS[port](module, address, [node])


def expand(module: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """Addresses with glob patterns resolved to the outermost modules they match, in the model's order."""
    found: list[str] = []
    for pattern in patterns:
        name, port = _split(pattern)
        if not any(letter in name for letter in "*?["):
            found.append(pattern)
            continue
        suffix = f":{port}" if ":" in pattern else ""
        matched = [known for known in _names(module) if fnmatch.fnmatchcase(known, name)]
        if not matched:
            raise ConfigError(f"no layer matches {pattern!r}.{did_you_mean(name, _names(module))}")
        found += [m + suffix for m in matched if not any(m.startswith(f"{outer}.") for outer in matched)]
    return tuple(dict.fromkeys(found))


def _split(address: str) -> tuple[str, str]:
    name, _, port = address.partition(":")
    if (port or "output") not in PORTS:
        raise ConfigError(f"{address!r} names no value: after the colon stands one of {', '.join(PORTS)}.")
    return name, port or "output"


def _calls(module: fx.GraphModule, name: str) -> dict[str, list[fx.Node]]:
    """The nodes of every call of module ``name`` (or of its one call ``name@n``), in graph order."""
    base, _, number = name.partition("@")
    calls: dict[str, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if node.op not in ("placeholder", "get_attr", "output") and node.target is not tap:
            key = _call_key(node, base)
            if key is not None:
                calls.setdefault(key, []).append(node)
    if not number:
        return calls
    chosen = list(calls.items())[int(number) : int(number) + 1] if number.isdecimal() else []
    if calls and not chosen:
        raise ConfigError(f"there is no call {name!r}: {base!r} is called {len(calls)} time(s), counted from 0.")
    return dict(chosen)


def _call_key(node: fx.Node, name: str) -> str | None:
    """Which call of module ``name`` a node belongs to, or None."""
    stack = node.meta.get("nn_module_stack") or {}
    for key, (owner, _) in stack.items():
        if owner == name:
            return str(key)
    owner = ops.owner_name(node)
    return name if owner == name or owner.startswith(f"{name}.") else None


def _chosen(address: str, calls: dict[str, list[fx.Node]]) -> list[fx.Node]:
    if len(calls) > 1:
        name = address.partition(":")[0]
        numbered = " or ".join(repr(address.replace(name, f"{name}@{n}", 1)) for n in range(min(len(calls), 3)))
        raise ConfigError(f"{name!r} is called {len(calls)} times in the graph: say which call, {numbered}.")
    return next(iter(calls.values()))


def _output(module: fx.GraphModule, address: str, call: list[fx.Node]) -> fx.Node:
    node = _returned(address, call)
    read = ops.read(node) if node.op.startswith("call") else None
    if read is not None and read["activation"] and address.partition(":")[0].partition("@")[0] == str(node.target):
        raise ConfigError(
            f"{address!r} is inside a fused region: {read['activation']} was fused into it, and its own result is no longer "
            "computed. Put insert-taps before fuse-activations."
        )
    return node


def _returned(address: str, call: list[fx.Node]) -> fx.Node:
    inside = set(call)
    leaving = [n for n in call if len(call) == 1 or any(user not in inside and user.target is not tap for user in n.users)]
    tensors = [n for n in leaving if (found := ops.lookup(n)) is None or found.family != "query"] or leaving
    if len(tensors) == 1:
        return tensors[0]
    if not tensors:
        raise ConfigError(f"nothing uses what {address!r} returns; the graph does not compute it.")
    names = ", ".join(repr(_address(node)) for node in tensors)
    raise ConfigError(f"{address!r} returns several values: tap them one by one, as {names}.")


def _address(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _given(module: fx.GraphModule, address: str, call: list[fx.Node]) -> fx.Node:
    inside = set(call)
    sources = dict.fromkeys(s for n in call for s in n.all_input_nodes if s not in inside and s.op != "get_attr")
    if len(call) == 1 and call[0].op == "call_module" and sources:
        return next(iter(sources))
    if len(sources) != 1:
        names = ", ".join(repr(source.name) for source in sources)
        raise ConfigError(f"{address!r}: it is given {len(sources)} values; tap them by their node names: {names}.")
    return next(iter(sources))


def _before_activation(module: fx.GraphModule, address: str, call: list[fx.Node]) -> fx.Node:
    node = _returned(address, call)
    read = ops.read(node)
    if read is not None and read["activation"]:
        raise ConfigError(
            f"{address!r} is inside a fused region: {read['activation']} was fused into {_address(node)!r}. "
            "Put insert-taps before fuse-activations."
        )
    found = ops.lookup(node)
    if (found is None or found.family != "activation") and not _is_clamp_at_zero(node):
        raise ConfigError(f"{address!r}: it ends in {ops.kind(node)!r}, which is no activation.")
    return node.all_input_nodes[0]


def _is_clamp_at_zero(node: fx.Node) -> bool:
    read = ops.read(node)
    return read is not None and read.kind == "clamp" and read["min"] == 0


_PORTS = {"output": _output, "input": _given, "preactivation": _before_activation}


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_modules() if name]


def _unknown(module: fx.GraphModule, name: str) -> Exception:
    """What to say about a name that the graph has no value for."""
    base = name.partition("@")[0]
    top = getattr(module, TOP, None)
    whole = [rung for rung in module.meta.get("rungs", ()) if rung.rung == "island"]
    if isinstance(top, Island):
        return TraceError(
            f"{name!r} cannot be tapped: {top.extra_repr()} as a whole runs as its own code: {_why(whole, '')}."
        )
    for node in module.graph.nodes:
        if ops.kind(node) == "island" and base.startswith(f"{node.target}."):
            where = str(node.target)
            return TraceError(
                f"{name!r} cannot be tapped: it is inside {where!r}, which runs as its own code: {_why(whole, where)}."
            )
    if base in _names(module):
        return ConfigError(f"no value in the graph is {name!r}: nothing is computed there, or a pass took it away.")
    known = [*_names(module), *(node.name for node in module.graph.nodes)]
    return ConfigError(
        f"no value is called {name!r}.{did_you_mean(base, known)} "
        "(Folding and fusing take names away: put insert-taps before such passes.)"
    )


def _why(rungs: Sequence[Any], where: str) -> str:
    return next((rung.reason for rung in rungs if rung.module == where), "it could not be traced")


# the view


class Features(nn.Module):
    """A tapped model whose call returns ``(output, {name: tensor})``.

    ``model``   the tapped graph itself; parameters, modes and devices are shared with it
    ``shapes``  the shape of every tapped value as traced, None where example inputs were not given
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.model = graph
        self.shapes = {name: shape_of(node) for name, node in taps(graph).items()}
        self.training = graph.training

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        view = self.__dict__.get("_view")
        if view is None:
            view = self.__dict__["_view"] = _view(self.model)
        return view(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_view"}


def features(graph: fx.GraphModule) -> Features:
    """A view of a tapped graph: name → tensor, beside the output."""
    if isinstance(getattr(graph, TOP, None), Island):
        raise TraceError("features() takes a traced graph; this model runs as its own code as a whole.")
    return Features(graph)


def _view(module: fx.GraphModule) -> fx.GraphModule:
    """A graph module that shares everything with ``module`` and also returns its tapped values."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output: Any = graph.graph_copy(module.graph, copies)
    values = {name: copies[node] for name, node in taps(module).items()}
    for node in reversed(graph.nodes):
        if node.target is tap:
            graph.erase_node(node)
    output = (output, values)
    codegen = module.graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):
        info = codegen.pytree_info
        if info.out_spec is not None:
            output, info = pytree.tree_leaves(output), info._replace(out_spec=_with_values(info.out_spec, list(values)))
        graph.set_codegen(_PyTreeCodeGen(info))
    graph.output(output)
    view = fx.GraphModule({}, fx.Graph(), type(module).__name__)
    for table in ("_modules", "_parameters", "_buffers"):
        view.__dict__[table] = module.__dict__[table]
    view.graph = graph
    reuse_memory(view)
    return view


def _with_values(spec: pytree.TreeSpec, names: list[str]) -> pytree.TreeSpec:
    """The structure of ``(output, {name: tensor})`` around an output of structure ``spec``."""
    return pytree.tree_structure((pytree.tree_unflatten([0] * spec.num_leaves, spec), dict.fromkeys(names, 0)))
