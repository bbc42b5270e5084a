"""Addresses of values: which value of a graph a name means.

``layer1`` is what the module returns, ``layer1:input`` what it is given, ``layer1:preactivation`` what enters the activation
it ends in; of a normalisation or an addition, its result. A module that is called several times is addressed by call:
``relu@0``, ``relu@1``. The name of a graph node is an address too.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from fxcompress.errors import ConfigError, TraceError, did_you_mean
from fxcompress.graph import ops
from fxcompress.graph.guards import CHECKS
from fxcompress.graph.island import TOP, Island

__all__ = ["expand", "locate"]


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
    if (port or "output") not in _PORTS:
        raise ConfigError(f"{address!r} names no value: after the colon stands one of {', '.join(_PORTS)}.")
    return name, port or "output"


def _calls(module: fx.GraphModule, name: str) -> dict[str, list[fx.Node]]:
    """The nodes of every call of module ``name`` (or of its one call ``name@n``), in graph order."""
    base, _, number = name.partition("@")
    calls: dict[str, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if node.op not in ("placeholder", "get_attr", "output") and ops.kind(node) != "tap":
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
    leaving = [n for n in call if len(call) == 1 or any(_takes(user) for user in n.users if user not in inside)]
    tensors = [n for n in leaving if (found := ops.lookup(n)) is None or found.family != "query"] or leaving
    if len(tensors) == 1:
        return tensors[0]
    if not tensors:
        raise ConfigError(f"nothing uses what {address!r} returns; the graph does not compute it.")
    names = ", ".join(repr(_address(node)) for node in tensors)
    raise ConfigError(f"{address!r} returns several values: tap them one by one, as {names}.")


def _takes(user: fx.Node) -> bool:
    """Whether a node goes on with a value; a tap and a check of the arguments only look at it."""
    return ops.kind(user) != "tap" and user.target not in CHECKS


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
    if found is not None and (found.family == "normalisation" or found.kind == "add"):
        return node
    if (found is None or found.family != "activation") and not _is_clamp_at_zero(node):
        raise ConfigError(f"{address!r}: it ends in {ops.kind(node)!r}, which is no activation, normalisation or addition.")
    return node.all_input_nodes[0]


def _is_clamp_at_zero(node: fx.Node) -> bool:
    read = ops.read(node)
    return read is not None and read.kind == "clamp" and read["min"] == 0


_PORTS = {"output": _output, "input": _given, "preactivation": _before_activation}
"""What may stand after the colon → how the value there is found among the nodes of a call."""


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
