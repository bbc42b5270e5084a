"""Taps: named values of a graph that can be asked for beside its output.

A tap is a node that reads a value and does nothing with it, so it counts as one of the value's readers: no pass may fuse the
value away, and whatever replaces the value replaces what the tap reads. The model's own output stays as it was;
:func:`~fxcompress.graph.feature_view.features` gives a view of the same model that returns the tapped values as further
outputs. Values are named by their addresses (:mod:`fxcompress.graph.addresses`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx
from torch.fx.node import has_side_effect

from fxcompress.graph import edit, ops
from fxcompress.graph.addresses import locate
from fxcompress.graph.inplace import VIEWS, origin, writes

__all__ = ["insert", "remove", "tap", "taps"]


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
    root = origin(value)
    family, queue = {root}, [root]
    for member in queue:
        fresh = [user for user in member.users if ops.kind(user) in VIEWS and user not in family]
        family.update(fresh)
        queue += fresh
    return any(user > value and writes(user) and user.all_input_nodes[0] in family for m in family for user in m.users)
