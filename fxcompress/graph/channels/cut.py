"""Removing units from a graph: tensors, module attributes and the numbers in the graph, together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from fxcompress.graph import edit, ops
from fxcompress.graph.channels.analysis import Channels
from fxcompress.graph.channels.kept import Kept, Mask, mask_data, select
from fxcompress.graph.channels.labels import Value, values_in
from fxcompress.graph.channels.rewriting import Rewriting, respell
from fxcompress.graph.channels.walk import Count, Walk
from fxcompress.graph.collector import collector_paused
from fxcompress.graph.shapes import module_of
from fxcompress.graph.tree import submodule

__all__ = ["Cut", "cut"]


@dataclass
class Cut:
    """What a cut did: ``tensors``, (id of the old one, new one, masks) by name; ``calls``, new spellings by node."""

    tensors: dict[str, tuple[int, torch.Tensor, dict[int, Mask]]] = field(default_factory=dict)
    calls: dict[str, str] = field(default_factory=dict)

    def kept(self) -> dict[str, dict[int, Any]]:
        """What stays of every tensor, as plain data; a mask that several have is written out once."""
        held = {name: masks for name, (_, _, masks) in self.tensors.items()}
        every = {id(mask): mask for masks in held.values() for mask in masks.values()}
        data = {key: mask_data(mask) for key, mask in every.items()}
        return {name: {dim: data[id(mask)] for dim, mask in masks.items()} for name, masks in held.items()}


@collector_paused()
def cut(channels: Channels, removed: np.ndarray) -> Cut:
    """Remove the classes ``removed`` from the graph that was analysed, in place.

    Every number in the graph that has to change is proved by running the operator on numbered entries, before anything is
    changed; the module's code is not regenerated yet. Raises :class:`UnprovableError` naming the node where no proof is
    found; the graph is then as it was.
    """
    walk, kept, done = channels.walk, Kept.without(channels.root, removed), Cut()
    spellings = Rewriting(walk, kept).run()
    names: dict[str, list[str]] = {}
    for name in walk.state:
        names.setdefault(walk.canonical[name], []).append(name)
    for name, value in walk.tensors.items():
        masks = kept.masks(value)
        if masks:
            for same in (names[name], *([other] for other in walk.alike.get(name, ()))):
                _cut_tensor(walk, same, masks, done)
    for node, spelling in spellings.items():
        respell(walk.module, node, spelling)
        done.calls[node.name] = str(node.format_node())
    for count in walk.counts:
        _recount(count, kept)
    _restate(walk, kept)
    _describe(walk, kept)
    return done


def _cut_tensor(walk: Walk, names: list[str], masks: dict[int, Mask], done: Cut) -> None:
    """Replace the tensor known under ``names`` by its kept part; it stays one tensor, a parameter stays a parameter.

    Nothing holds the old tensor afterwards, so that a cut needs little memory.
    """
    held: dict[int, torch.Tensor] = {}
    for name in names:
        owner = submodule(walk.module, name.rpartition(".")[0])
        assert owner is not None
        leaf = name.rpartition(".")[2]
        place: Any = owner._parameters if leaf in owner._parameters else owner._buffers
        old = place[leaf]
        if id(old) not in held:
            held[id(old)] = _smaller(old, masks)
        place[leaf] = walk.state[name] = held[id(old)]
        done.tensors[name] = (id(old), held[id(old)], masks)


def _smaller(old: torch.Tensor, masks: dict[int, Mask]) -> torch.Tensor:
    with torch.no_grad():
        new = select(old.detach(), masks)
        if old.dim() == 4 and not old.is_contiguous() and old.is_contiguous(memory_format=torch.channels_last):
            new = new.contiguous(memory_format=torch.channels_last)
    if not isinstance(old, nn.Parameter):
        return new
    made = nn.Parameter(new, requires_grad=old.requires_grad)
    made.__dict__.update(old.__dict__)
    if old.grad is not None:
        made.grad = select(old.grad, masks)
    return made


def _recount(count: Count, kept: Kept) -> None:
    """Write a number of channels or groups into a module's attribute or a call's argument."""
    number = kept.count(count.atoms)
    if number == count.atoms.size:
        return
    name, _, place = count.name.partition(".")
    if count.node.op == "call_module":
        module = module_of(count.node)
        if hasattr(module, name):
            setattr(module, name, _put(getattr(module, name), place, number))
        return
    call = ops.read(count.node)
    assert call is not None
    if isinstance(call[name], (int, tuple, list)):
        edit.set_argument(count.node, name, _put(call[name], place, number))


def _put(old: Any, place: str, number: int) -> Any:
    if not place or isinstance(old, int):
        return number
    values = list(old)
    values[int(place)] = number
    return tuple(values)


def _convolution(part: Any) -> dict[str, int]:
    return {"out_channels": part.weight.shape[0], "in_channels": part.weight.shape[1] * part.groups}


def _transposed(part: Any) -> dict[str, int]:
    return {"in_channels": part.weight.shape[0], "out_channels": part.weight.shape[1] * part.groups}


ATTRIBUTES: dict[str, Callable[[Any], dict[str, int]]] = {
    **{f"conv{d}d": _convolution for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": _transposed for d in (1, 2, 3)},
    "linear": lambda part: {"out_features": part.weight.shape[0], "in_features": part.weight.shape[1]},
    "bilinear": lambda part: dict(zip(("out_features", "in1_features", "in2_features"), part.weight.shape, strict=True)),
    "embedding": lambda part: {"embedding_dim": part.weight.shape[1]},
    "embedding_bag": lambda part: {"embedding_dim": part.weight.shape[1]},
}
"""Kind → attributes of its module that its tensors tell."""


def _restate(walk: Walk, kept: Kept) -> None:
    """Attributes that follow from the tensors, and the scale of attention, which stays the dense one."""
    for node in walk.module.graph.nodes:
        call = walk.call(node)
        if call is None:
            continue
        if node.op == "call_module" and call.kind in ATTRIBUTES:
            part = module_of(node)
            for name, value in ATTRIBUTES[call.kind](part).items():
                setattr(part, name, value)
        elif call.kind == "scaled_dot_product_attention" and call["scale"] is None:
            query = walk.value(call["query"])
            if query is not None and kept.shape(query)[-1] != query.shape[-1]:
                node.update_kwarg("scale", 1 / math.sqrt(query.shape[-1]))


def _describe(walk: Walk, kept: Kept) -> None:
    """Shapes in the metadata."""
    for node, value in walk.env.items():
        meta = node.meta.get("tensor_meta")
        if meta is not None and values_in(value):
            node.meta["tensor_meta"] = _shrunk(meta, value, kept)


def _shrunk(meta: Any, value: Any, kept: Kept) -> Any:
    if isinstance(value, Value):
        return meta._replace(shape=torch.Size(kept.shape(value))) if meta is not None else None
    if isinstance(value, dict):
        return {key: _shrunk(meta[key], item, kept) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_shrunk(m, item, kept) for m, item in zip(meta, value, strict=True))
    return meta
