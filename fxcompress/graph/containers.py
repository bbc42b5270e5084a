"""Containers in a graph: made by nodes where a graph cannot hold them as arguments, and ordinary ones out of fx's own."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from torch import fx
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils import _pytree as pytree

from fxcompress.graph import spellings

__all__ = ["containers", "leaves", "makes_container", "mapping", "open_mappings", "plain"]


def mapping(graph: fx.Graph, like: dict[Any, Any], items: dict[Any, Any]) -> fx.Node:
    """A node that makes a mapping of the class of ``like``, which a graph's own dict arguments would turn into a plain one.

    It is made as dataclasses are, or from a dict.
    """
    if type(like) is OrderedDict:
        return graph.call_function(OrderedDict, (list(items.items()),))
    return graph.call_function(type(like), *(((), items) if is_dataclass(like) else ((items,), {})))


def open_mappings(graph: fx.Graph) -> None:
    """Let what reads an item of a mapping that the graph makes read the item; a mapping nobody reads as a whole goes."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, type) or not issubclass(node.target, dict):
            continue
        items: dict[Any, Any] = dict(node.args[0]) if node.args else dict(node.kwargs)
        items = {**_defaults(node.target), **items}
        for user in list(node.users):
            reads = user.target in (getattr, operator.getitem) and user.args[0] is node
            if reads and user.args[1] in items and (user.target is getattr or items[user.args[1]] is not None):
                _stand_in(user, items[user.args[1]])
        if not node.users:
            graph.erase_node(node)


def _defaults(cls: type) -> dict[str, Any]:
    """What the fields of a dataclass are that nobody gives."""
    return {field.name: field.default for field in fields(cls) if field.default is not MISSING} if is_dataclass(cls) else {}


def _stand_in(node: fx.Node, value: Any) -> None:
    """Let everything that reads ``node`` read ``value``, a node or not."""
    for user in list(node.users):
        user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), lambda n: value if n is node else n)
    node.graph.erase_node(node)


def containers(graph: fx.Graph, value: Any) -> Any:
    """``value`` with nodes for the containers that a graph cannot hold as an argument."""
    if isinstance(value, dict):
        items = {key: containers(graph, item) for key, item in value.items()}
        return items if type(value) is dict else mapping(graph, value, items)
    if spellings.is_named_tuple(type(value)):
        return graph.call_function(type(value), tuple(containers(graph, item) for item in value))
    if type(value) in (list, tuple):
        return type(value)(containers(graph, item) for item in value)
    return value


def makes_container(node: fx.Node) -> bool:
    """Whether a node makes a mapping, a named tuple or a dataclass of values."""
    made = node.target if node.op == "call_function" else None
    return isinstance(made, type) and (issubclass(made, (dict, tuple)) or is_dataclass(made))


def leaves(value: Any) -> Iterator[fx.Node]:
    """The nodes in a structure, and in the containers that nodes make, that are no containers themselves."""
    for leaf in pytree.tree_leaves(plain(value)):
        if isinstance(leaf, fx.Node) and makes_container(leaf):
            yield from leaves((leaf.args, leaf.kwargs))
        elif isinstance(leaf, fx.Node):
            yield leaf


def plain(value: Any) -> Any:
    """The containers a graph's generated code returns: fx's immutable lists and dicts become ordinary ones."""
    if type(value) is immutable_dict:
        return {key: plain(item) for key, item in value.items()}
    if type(value) is immutable_list:
        return [plain(item) for item in value]
    return tuple(plain(item) for item in value) if type(value) is tuple else value
