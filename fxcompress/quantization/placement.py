"""Which operators run in integers, and which values are therefore quantized. A policy: it decides and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fxcompress.backends import Backend, Rule
from fxcompress.graph import edit, inplace, ops
from fxcompress.graph.select import Selection
from fxcompress.graph.shapes import dtype_of
from fxcompress.quantization.grid import Grid, grid

__all__ = [
    "Placement",
    "activation_grid",
    "computed",
    "layer_name",
    "leave_stranded",
    "operands",
    "overwritten_input",
    "place",
    "weight_axis",
    "weight_options",
]


@dataclass
class Placement:
    """The decision for one graph.

    ``integers``  operators that run in integers, with the rule each follows
    ``floats``    operators that stay in float, with the reason
    ``observed``  values that need a range of their own, in graph order
    """

    integers: dict[fx.Node, Rule] = field(default_factory=dict)
    floats: dict[fx.Node, str] = field(default_factory=dict)
    observed: dict[fx.Node, None] = field(default_factory=dict)


def operands(call: ops.Call, rule: Rule) -> list[fx.Node]:
    """The nodes whose values a rule wants quantized."""
    found: list[fx.Node] = []
    for name in rule.operands:
        value = call[name]
        found += [v for v in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(v, fx.Node)]
    branches = [source for source in found if _is_branch(source)] if rule.residual else []
    branch = max(branches, key=_layers_before) if len(branches) > 1 else next(iter(branches), None)
    return [source for source in found if source is not branch]


def _is_branch(node: fx.Node) -> bool:
    """Whether a value is a layer's result that one operator alone reads: the two are one kernel."""
    found = ops.lookup(node) if node.op.startswith("call") else None
    return found is not None and found.family == "contraction" and len(ops.value_readers(node)) == 1


def _layers_before(node: fx.Node) -> int:
    """How many layers the longest way to a value leads through."""
    longest: dict[fx.Node, int] = {}
    for other in node.graph.nodes:
        before = max((longest[source] for source in other.all_input_nodes), default=0)
        found = ops.lookup(other) if other.op.startswith("call") else None
        longest[other] = before + (found is not None and found.family == "contraction")
        if other is node:
            break
    return longest[node]


def place(module: fx.GraphModule, backend: Backend, selection: Selection, region: str = "") -> Placement:
    """Walk the graph once and decide for every operator; ``region`` is where the graph lives in the whole model.

    A weighted operator always runs in integers where its rule allows it. Any other operator does when its operands come out
    of integer operators (a model input may join them): it would not repay a quantization of its own.
    """
    placed = Placement()
    written = inplace.overwritten(module)
    for node in module.graph.nodes:
        if not node.op.startswith("call"):
            continue
        call = ops.read(node)
        reason = _obstacle(node, call, placed, backend) or overwritten_input(node, written)
        layer = layer_name(node, region)
        if reason is None and layer and layer not in selection:
            reason = "it is excluded by name"
        if reason is None:
            assert call is not None
            placed.integers[node] = backend.rules[call.kind]
        else:
            placed.floats[node] = reason
    _demote_movement(module, placed)
    placed.observed = dict.fromkeys(_observed(module, placed))
    return placed


def _demote_movement(module: fx.GraphModule, placed: Placement) -> None:
    """Leave values in float that are only moved on their way from a kernel with a float result to float operators."""
    for node in reversed(module.graph.nodes):
        if node in placed.integers and _moves(node) and not any(user in placed.integers for user in node.users):
            source = node.all_input_nodes[0]
            while source in placed.integers and _moves(source):
                source = source.all_input_nodes[0]
            if source in placed.integers and placed.integers[source].float_result:
                del placed.integers[node]
                placed.floats[node] = "it moves values from a float result to float operators"


def _moves(node: fx.Node) -> bool:
    found = ops.lookup(node)
    return found is not None and found.family == "movement" and found.kind != "cat"


def _obstacle(node: fx.Node, call: ops.Call | None, placed: Placement, backend: Backend) -> str | None:
    if call is None:
        return "its own code runs (an island)" if node.op == "call_module" else f"{node.target} is not in the op table"
    rule = backend.rules.get(call.kind)
    if rule is None:
        return f"{backend.name} has no integer kernel for {call.kind}"
    sources = operands(call, rule)
    if not sources:
        stored = any(isinstance(value, ops.Attr) for value in call.arguments.values())
        nothing = "what it takes is stored, not computed" if stored else "it takes no tensor"
        return (rule.refuse(call) if call.inputs else None) or nothing
    wrong = [s for s in sources if dtype_of(s) not in (None, torch.float32)]
    if wrong:
        return f"its input {wrong[0].name!r} is {dtype_of(wrong[0])}"
    reason = rule.refuse(call)
    if reason or rule.weighted:
        return reason or computed(call)
    if rule.residual and len(sources) == len(call.inputs):
        return "neither operand is the result of a layer for it alone"
    if rule.demanding or rule.residual:
        return None
    if not any(s in placed.integers for s in sources):
        return "its inputs are in float"
    lonely = [s for s in sources if s not in placed.integers and s.op != "placeholder"]
    return f"its input {lonely[0].name!r} is in float" if lonely else None


def leave_stranded(module: fx.GraphModule, backend: Backend) -> None:
    """Leave in float what would run in integers between float operators, now that layers went back to float.

    What hands its input's range on to integer operators, as pooling does, stays: nothing else observes what these read.
    """
    rules = backend.rules

    def keeps_range(node: fx.Node) -> bool:
        return rules[ops.kind(node)].output == "input"

    def hands_on(node: fx.Node) -> bool:
        """Whether an integer operator reads the range that ``node`` has of its input."""
        readers = [user for user in node.users if user.meta.get("integer")] if keeps_range(node) else []
        return any(not keeps_range(reader) or hands_on(reader) for reader in readers)

    for node in module.graph.nodes:
        call = ops.read(node) if node.meta.get("integer") else None
        if call is None or rules[call.kind].weighted:
            continue
        observed = {s for s in operands(call, rules[call.kind]) if s.meta.get("observer")}
        needed = [s for s in operands(call, rules[call.kind]) if s not in observed]
        needed += [] if hands_on(node) else [s.all_input_nodes[0] for s in observed]
        alone = [s for s in needed if not s.meta.get("integer") and s.op != "placeholder"]
        if alone:
            node.meta |= {"integer": False, "float": f"its input {alone[0].name!r} is in float"}


def overwritten_input(node: fx.Node, written: set[fx.Node]) -> str | None:
    """Why what a node reads cannot be quantized where it is computed, or None."""
    changed = [s for s in node.all_input_nodes if inplace.origin(s) in written]
    return f"its input {changed[0].name!r} is overwritten in place" if changed else None


def computed(call: ops.Call) -> str | None:
    """Why a weight that is computed as the graph runs cannot be quantized ahead, or None."""
    weight, owner = call["weight"], call.node.graph.owning_module
    if isinstance(weight, ops.Attr) and owner is not None and not edit.is_stored(owner, weight.name):
        return "its weight is masked or computed by a parametrization; 'settle-weights' makes that permanent"
    return None


def _observed(module: fx.GraphModule, placed: Placement) -> Iterator[fx.Node]:
    """Values with a range of their own: float operands of integer operators, and results that do not inherit a range."""
    wanted: set[fx.Node] = set()
    for node, rule in placed.integers.items():
        call = ops.read(node)
        assert call is not None
        wanted.update(source for source in operands(call, rule) if source not in placed.integers)
        unread = rule.float_result and not any(_wants(user, node, placed) for user in node.users)
        if rule.output != "input" and rule.fixed is None and not unread:
            wanted.add(node)
    yield from (node for node in module.graph.nodes if node in wanted)


def _wants(user: fx.Node, value: fx.Node, placed: Placement) -> bool:
    """Whether ``user`` runs in integers and takes ``value`` quantized."""
    call = ops.read(user) if user in placed.integers else None
    return call is not None and value in operands(call, placed.integers[user])


def layer_name(node: fx.Node, region: str) -> str:
    """The layer a node belongs to, in the whole model; ``region`` is where its graph lives."""
    owner = ops.owner_name(node)
    return f"{region}.{owner}" if region and owner else owner or region


def activation_grid(backend: Backend, settings: Mapping[str, Any], bits: int = 8) -> Grid:
    """Where a backend's activations live: uint8 is affine; int8 symmetric around 0, clamped at the ends of its type."""
    bits = min(bits, 7) if settings.get("reduce_range") else bits
    if backend.activation == "int8":
        return replace(grid("int8", bits=bits), quant_min=-(2 ** (bits - 1)))
    return grid("uint8", symmetric=False, bits=bits)


def weight_axis(call: ops.Call) -> int:
    """The axis of output channels in the weight of a weighted call."""
    return 1 if call.kind.startswith("conv_transpose") else 0


def weight_options(call: ops.Call, backend: Backend, settings: Mapping[str, Any]) -> dict[str, Any]:
    """How the weight of a call is quantized: the options of :func:`~fxcompress.quantization.weights.weight_grid`."""
    asked = {"bits": 8, **settings, **call.node.meta.get("weight_grid", {})}
    transposed = call.kind.startswith("conv_transpose")
    symmetric = asked["symmetric"] or not backend.affine_weights
    narrow = asked["bound_pairs"] or (backend.narrow(call, symmetric) and not asked.get("full_range"))
    return {
        "per_channel": asked["per_channel"] and backend.per_channel and not transposed,
        "symmetric": symmetric,
        "bits": asked["bits"],
        "bound_pairs": narrow,
        "adjacent": backend.adjacent and (call["groups"] or 1) == 1 and not transposed,
    }
