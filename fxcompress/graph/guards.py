"""What a graph takes for granted of its arguments, checked at every call.

A graph is one way through a model's code. Where an argument's value chose that way (``None``, a flag, a number that a loop
counts to) or its dimensions did, another value would silently get the result of the first: a node that asks says so.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx._symbolic_trace import _assert_is_none

from fxcompress.errors import DataError, shown

__all__ = [
    "CHECKS",
    "decided",
    "fixed",
    "given",
    "guard",
    "guard_decision",
    "guard_fixed",
    "guard_given",
    "guard_size",
    "replace_checks",
    "sized",
]

_PLAIN = (bool, int, float, str, tuple, list)

_AGAIN = "The graph holds what the code does then, and nothing else: compress the model with example_inputs like this call"


def fixed(value: Any, argument: str, expected: Any) -> None:
    """Raise DataError where an argument is not what it was while tracing."""
    if isinstance(value, Tensor) and value.numel() == 1 and expected is not None:
        value = value.item()
    if value is expected or (expected is not None and isinstance(value, _PLAIN) and value == expected):
        return
    now = f"a {type(value).__name__}" if isinstance(value, Tensor) else shown(value)
    raise DataError(f"argument {argument!r} is {now}, and was {expected!r} while the model was traced. {_AGAIN}.")


def given(value: Any, argument: str) -> None:
    """Raise DataError where an argument is left out that the examples gave."""
    if value is None:
        raise DataError(f"argument {argument!r} is missing, and was given while the model was traced. {_AGAIN}.")


def decided(value: Any, argument: str, fact: str, test: str, other: Any, outcome: bool) -> None:
    """Raise DataError where a fact about an argument (dtype, ndim, kind) compares otherwise than while tracing."""
    if not isinstance(value, Tensor) or bool(getattr(operator, test)(_fact(value, fact), other)) is outcome:
        return
    raise DataError(
        f"argument {argument!r} has {_NAMES[fact]} {_fact(value, fact)}, and the code goes another way with it than it went "
        f"while the model was traced. {_AGAIN}."
    )


def sized(value: Any, question: str, expected: Any) -> None:
    """Raise DataError where what the code asks of its arguments' sizes has another answer than while tracing."""
    if value != expected:
        raise DataError(
            f"the code decides by sizes, and {question} is {shown(value)}, and was {expected!r} while the model was traced. "
            f"{_AGAIN}."
        )


_NAMES = {"dtype": "the type", "ndim": "the number of dimensions", "kind": "a kind of numbers,"}


def _fact(value: Tensor, fact: str) -> Any:
    return _kind(value.dtype) if fact == "kind" else getattr(value, fact)


def _kind(dtype: torch.dtype) -> str:
    """What sort of number it is: code hardly ever tells apart two types of one kind."""
    if dtype is torch.bool:
        return "bool"
    return "floating" if dtype.is_floating_point else "complex" if dtype.is_complex else "integer"


CHECKS = (fixed, given, decided, sized)
"""The functions that these nodes call."""


def guard_fixed(node: fx.Node, argument: str, value: Any) -> None:
    """Let the graph check at every call that ``node`` is ``value``."""
    _insert(node, fixed, (node, argument, value))


def guard_given(node: fx.Node) -> None:
    """Let the graph check at every call that an argument is there."""
    _insert(node, given, (node, str(node.target)))


def guard_decision(node: fx.Node, fact: str, test: str, other: Any, outcome: bool) -> None:
    """Let the graph check at every call that a fact about an argument compares as it did."""
    _insert(node, decided, (node, str(node.target), fact, test, other, outcome))


def guard_size(node: fx.Node, expected: Any) -> None:
    """Let the graph check at every call that a question about its arguments' sizes has the same answer."""
    _insert(node, sized, (node, _spelled(node), expected))


def _spelled(value: Any) -> str:
    """A question about sizes as code would write it."""
    if not isinstance(value, fx.Node):
        return repr(value)
    args = [_spelled(arg) for arg in value.args]
    if value.op == "placeholder":
        return str(value.target)
    if value.op == "call_method":
        return f"{args[0]}.{value.target}({', '.join(args[1:])})"
    if value.target is getattr:
        return f"{args[0]}.{value.args[1]}"
    if value.target is operator.getitem:
        return f"{args[0]}[{args[1]}]"
    name = getattr(value.target, "__name__", str(value.target))
    return f"{args[0]} {_SIGNS[name]} {args[1]}" if name in _SIGNS else f"{name}({', '.join(args)})"


_SIGNS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "mod": "%", "floordiv": "//"}
_SIGNS |= {"add": "+", "sub": "-", "mul": "*", "truediv": "/"}


def guard(node: fx.Node, argument: str, value: Any) -> None:
    """Guard that ``node`` is what a program was exported for: a constant ``value``, or numbers of its kind and dimensions.

    Of values that the model computes itself, these follow from its arguments.
    """
    if not isinstance(value, Tensor):
        guard_fixed(node, argument, value)
    elif node.op == "placeholder":
        guard_decision(node, "ndim", "eq", value.ndim, True)
        guard_decision(node, "kind", "eq", _kind(value.dtype), True)


def _insert(node: fx.Node, check: Any, arguments: tuple[Any, ...]) -> None:
    """Right behind ``node``, or behind the last argument where it is one; once."""
    if any(user.target is check and user.args == arguments for user in node.users):
        return
    place = next(reversed(node.graph.find_nodes(op="placeholder"))) if node.op == "placeholder" else node
    with node.graph.inserting_after(place):
        node.graph.call_function(check, arguments)


def replace_checks(graph: fx.Graph) -> None:
    """Put these checks in the place of fx's own: assertions about an argument, or about its comparison with a constant."""
    for node in list(graph.nodes):
        message = str(node.args[1]) if node.target in _CHECKS and len(node.args) == 2 else ""
        argument, found, _ = message.partition(" has been specialized to ")
        if not found:
            continue
        asked: Any = node.args[0]
        compared = node.target is torch._assert
        value, expected = asked.args if compared else (asked, None)
        graph.erase_node(node)
        if compared:
            graph.erase_node(asked)
        guard_fixed(value, argument, expected)


_CHECKS = (torch._assert, _assert_is_none)
