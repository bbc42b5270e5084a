"""What ``forward`` takes, as the placeholders of a graph: their names, their defaults, and arguments that are fixed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn
from torch.fx._symbolic_trace import PH
from torch.utils import _pytree as pytree

from fxcompress.graph.hooks import forwarding
from fxcompress.graph.inputs import (
    Arguments,
    bind,
)

__all__ = [
    "STARS",
    "concrete_arguments",
    "forwarded",
    "is_decorated",
    "name_placeholders",
    "nested_arguments",
    "placeholder_target",
    "placeholders",
    "stars",
    "undecorated",
]


STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
"""Kinds of parameters that take any number of arguments, and how they are written."""


def placeholder_target(parameter: inspect.Parameter) -> str:
    """A placeholder's target: the argument's name, with the stars fx wants."""
    return STARS.get(parameter.kind, "") + parameter.name


def name_placeholders(graph: fx.Graph, model: nn.Module) -> None:
    """Give arguments that were fixed their own names back, which fx numbers; flattened containers are named elsewhere."""
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    parameters = list(inspect.signature(model.forward).parameters.values())
    if is_decorated(model):
        parameters = [parameter for parameter in parameters if parameter.kind not in STARS]
    if len(nodes) != len(parameters):
        return
    for node, parameter in zip(nodes, parameters, strict=True):
        node.target = placeholder_target(parameter)


def is_decorated(model: nn.Module) -> bool:
    """Whether the code of ``forward`` is wrapped in a function with another signature."""
    return hasattr(type(model).forward, "__wrapped__")


@contextmanager
def undecorated(model: nn.Module) -> Iterator[None]:
    """Give a decorated ``forward`` a function around it with the parameters that it says it has, but those with stars.

    fx reads the parameters off the code object, and gives a decorator's ``*args, **kwargs`` no values.
    """
    if not is_decorated(model):
        yield
        return
    parameters = [p.replace(annotation=p.empty) for p in inspect.signature(model.forward).parameters.values()]
    kept = [p for p in parameters if p.kind not in STARS]
    passed = ", ".join(p.name if p.kind is p.POSITIONAL_ONLY else f"{p.name}={p.name}" for p in kept)
    names = ", ".join(["self", *(p.name for p in kept)])
    space = {"call": type(model).forward}
    exec(f"def forward({names}):\n    return call(self, {passed})", space)
    forward: Any = space["forward"]
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = inspect.Signature([own, *kept])
    with forwarding(model, forward):
        yield


def concrete_arguments(model: nn.Module, call: Arguments | None) -> dict[str, Any]:
    """Arguments that are not tensors and steer the code: those left at their defaults, and flags among the examples."""
    given = bind(model, call).arguments if call is not None else {}
    fixed: dict[str, Any] = {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = given.get(name, parameter.default)
        steers = value is None or isinstance(value, (bool, str))
        left_out = name not in given and isinstance(value, (int, float))
        if steers or left_out:
            fixed[name] = value
    return fixed


def nested_arguments(model: nn.Module, call: Arguments) -> dict[str, Any]:
    """Container arguments with a placeholder for each leaf, so that code may iterate over the container."""
    given = bind(model, call).arguments
    return {
        name: pytree.tree_map(lambda leaf: PH, value)
        for name, value in given.items()
        if type(value) in (list, tuple, dict) and name in inspect.signature(model.forward).parameters
    }


def placeholders(graph: fx.Graph, model: nn.Module, *, starred: bool = True) -> dict[str, fx.Node]:
    """Placeholders with the names and defaults of ``forward``; ``starred``: those of ``*args`` and ``**kwargs`` as well."""
    nodes: dict[str, fx.Node] = {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind in STARS and not starred:
            continue
        target = placeholder_target(parameter)
        default = () if parameter.default is inspect.Parameter.empty else (parameter.default,)
        nodes[name] = graph.create_node("placeholder", target, default, {}, name=name)
    return nodes


def forwarded(model: nn.Module, nodes: dict[str, fx.Node]) -> Arguments:
    """The arguments with which a call hands the placeholders ``nodes`` on to the model, those with stars left out."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            kwargs[name] = nodes[name]
        elif parameter.kind not in STARS:
            args.append(nodes[name])
    return Arguments(tuple(args), kwargs)


def stars(model: nn.Module) -> list[inspect.Parameter]:
    """The parameters of ``forward`` that take any number of arguments."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [parameter for parameter in parameters if parameter.kind in STARS]
