"""Training mode: a graph is what a model's code computes in one mode, and must not silently forget the other.

Layers of torch.nn switch by themselves. Code that asks ``self.training`` has decided once it is traced: where it only
switches a normalisation or a dropout (of attention too), that becomes a layer again; where it does more, the trace says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from fxcompress.graph import edit, ops
from fxcompress.graph.attention import attend
from fxcompress.graph.rungs import Rung
from fxcompress.graph.tree import kept_modes, submodule

__all__ = ["flipped", "noted_mode", "only", "switching_layers", "unnoted"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

_DROPOUTS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    torch.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
}


class _Watched:
    """Stands in for the attribute ``training`` of every module, and notes that code asked for it."""

    def __init__(self) -> None:
        self.asked = False

    def __get__(self, module: nn.Module, owner: type | None = None) -> bool:
        self.asked = True
        held = vars(module)
        return held["training"] if "training" in held else module.__getattr__("training")  # type: ignore[return-value]

    def __set__(self, module: nn.Module, value: bool) -> None:
        vars(module)["training"] = value


@contextmanager
def noted_mode() -> Iterator[_Watched]:
    """Note whether code asks any module for its training mode."""
    watched = _Watched()
    nn.Module.training = watched  # type: ignore[assignment]
    try:
        yield watched
    finally:
        del nn.Module.training


@contextmanager
def unnoted() -> Iterator[None]:
    """Leave out of the note what asks for the mode in here."""
    watched = vars(nn.Module).get("training")
    asked = getattr(watched, "asked", False)
    try:
        yield
    finally:
        if isinstance(watched, _Watched):
            watched.asked = asked


@contextmanager
def flipped(model: nn.Module) -> Iterator[None]:
    """``model`` in its other mode, by its own ``train``."""
    with kept_modes(model):
        model.train(not model.training)
        yield


def switching_layers(module: fx.GraphModule, model: nn.Module, other: fx.Graph) -> list[Rung]:
    """Make layers of what differs by a training flag alone in the graph of the ``other`` mode; a note for what else differs.

    ``model`` is what ``module`` was traced from.
    """
    there = _by_owner(other)
    counters = {str(node.all_input_nodes[0].target): node for node in module.graph.nodes if _counts(node)}
    changed = []
    for owner, nodes in _by_owner(module.graph).items():
        others = there.pop(owner, [])
        for node, twin in _switched(nodes, others):
            name = _as_layer(module, model, owner, node, twin)
            if name is not None:
                counter = counters.pop(f"{name}.{_COUNTER}", None)
                if counter is not None:
                    module.graph.erase_node(counter)  # the layer does it
                nodes.remove(node)
                others.remove(twin)
        if list(_steps(nodes)) != list(_steps(others)):
            changed.append(owner)
    changed += [owner for owner, nodes in there.items() if any(True for _ in _steps(nodes))]
    return [Rung(owner, "note", only(model)) for owner in changed]


def only(model: nn.Module) -> str:
    """What a graph of ``model`` leaves out."""
    here, away = ("training", "eval") if model.training else ("eval", "training")
    return f"its code does something else in {away} mode; the graph computes what it does in {here} mode"


def _by_owner(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """The nodes that each module's own code made, but those that count batches."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op.startswith("call") and not _counts(node):
            owners = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
            if node.op == "call_module" and owners[-1:] == [node.target]:
                owners.pop()
            found.setdefault(owners[-1] if owners else "", []).append(node)
    return found


def _switched(nodes: list[fx.Node], others: list[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
    """Normalisations and dropouts, matched in order, that take another training flag in the other mode."""
    found: list[tuple[fx.Node, fx.Node]] = []
    for kind in _FLAGS:
        sides = [[n for n in side if n.op == "call_function" and ops.kind(n) == kind] for side in (nodes, others)]
        if len(sides[0]) == len(sides[1]):
            found += [pair for pair in zip(*sides, strict=True) if _flag(pair[0]) != _flag(pair[1])]
    return found


_FLAGS = {"batch_norm": "training", "dropout": "training", "scaled_dot_product_attention": "dropout_p"}
"""Kind of operator → the argument that switches with the mode."""


def _flag(node: fx.Node) -> Any:
    call = ops.read(node)
    return call[_FLAGS[call.kind]] if call is not None else None


def _steps(nodes: list[fx.Node]) -> Iterator[tuple[str, Any, str]]:
    """What is computed, without the names of values and without questions about their shapes."""
    for node in nodes:
        found = ops.lookup(node) if node.op != "call_module" else None
        if found is None or found.family != "query":
            literals = fx.node.map_arg((node.args, node.kwargs), lambda _: None)
            yield node.op, node.target, repr(literals)


def _counts(node: fx.Node) -> bool:
    """Whether a node counts the batches that a normalisation has seen."""
    return any(str(source.target).endswith(_COUNTER) for source in node.all_input_nodes if source.op == "get_attr")


_COUNTER = "num_batches_tracked"


def _as_layer(module: fx.GraphModule, model: nn.Module, owner: str, node: fx.Node, twin: fx.Node) -> str | None:
    """Put a layer in the place of a function that takes the training flag; its name, or None where there is none for it."""
    call, other = ops.read(node), ops.read(twin)
    assert call is not None
    assert other is not None
    if call.kind == "scaled_dot_product_attention":
        made = _attention(call, other)
        if made is not None:
            edit.replace(node, made)
        return str(made.target) if made is not None else None
    name = _normalisation(module, model, call) if call.kind == "batch_norm" else _dropout(module, owner, call)
    if name is not None:
        edit.replace(node, edit.insert_before(node, name, (call["input"],)))
    return name


def _attention(call: ops.Call, other: ops.Call) -> fx.Node | None:
    """Attention whose weights are dropped out in one mode alone, as a layer."""
    shares = [share for share in (call["dropout_p"], other["dropout_p"]) if share]
    if len(shares) != 1 or not isinstance(shares[0], float | int):
        return None
    options = {name: value for name, value in call.arguments.items() if name not in ("query", "key", "value", "dropout_p")}
    return attend(call.node, shares[0], call["query"], call["key"], call["value"], **options)


def _dropout(module: fx.GraphModule, owner: str, call: ops.Call) -> str | None:
    layer = _DROPOUTS.get(call.node.target)
    share = 0.5 if call["p"] is None else call["p"]
    if layer is None or not isinstance(share, float | int):
        return None
    return edit.add_module(module, f"{owner}.dropout".lstrip("."), layer(share))


def _normalisation(module: fx.GraphModule, model: nn.Module, call: ops.Call) -> str | None:
    """The module whose statistics are normalised with, as the plain layer of torch.nn that it is made from."""
    tensors = [call[name] for name in ("running_mean", "running_var", "weight", "bias") if call[name] is not None]
    places = {attr.name.rpartition(".")[0] if isinstance(attr, ops.Attr) else None for attr in tensors}
    place = places.pop() if len(places) == 1 else None
    held = submodule(model, place) if place else None
    plain = next((cls for cls in _NORMS if isinstance(held, cls)), None)
    if place is None or plain is None or not isinstance(held, _NORMS) or held.eps != call["eps"]:
        return None
    layer, made = plain(1, held.eps, held.momentum, affine=held.affine), module.get_submodule(place)
    layer.num_features = held.num_features
    for table in ("_parameters", "_buffers", "_modules"):
        vars(layer)[table] = {**vars(layer)[table], **vars(held if table == "_buffers" else made)[table]}
    parent, _, leaf = place.rpartition(".")
    module.get_submodule(parent)._modules[leaf] = layer
    return place
