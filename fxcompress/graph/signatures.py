"""What ``forward`` takes, as the placeholders of a graph: their names, their defaults, and arguments that are fixed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import fx, nn
from torch.fx._symbolic_trace import PH
from torch.utils import _pytree as pytree

from fxcompress.graph.hooks import forwarding
from fxcompress.graph.inputs import Arguments, bind

__all__ = [
    "concrete_arguments",
    "forwarded",
    "left_out",
    "name_placeholders",
    "named_arguments",
    "nested_arguments",
    "placeholder_target",
    "placeholders",
    "stars",
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
    if len(nodes) != len(parameters):
        return
    for node, parameter in zip(nodes, parameters, strict=True):
        node.target = placeholder_target(parameter)


def is_decorated(model: nn.Module) -> bool:
    """Whether the code of ``forward`` is wrapped in a function with another signature."""
    return hasattr(type(model).forward, "__wrapped__")


@contextmanager
def named_arguments(model: nn.Module, call: Arguments | None) -> Iterator[list[str]]:
    """Give a ``forward`` that takes any number of arguments those of ``call`` by name; yields a note for each star.

    A decorated ``forward`` gets the parameters that it says it has, and none for its stars where there is no ``call``: fx
    reads the parameters off the code object, and gives ``*args, **kwargs`` no values.
    """
    starred = stars(model)
    if not is_decorated(model) and (call is None or not starred):
        yield []
        return
    given = bind(model, call).arguments if call is not None else {}
    optional = any(p.default is not p.empty for p in inspect.signature(model.forward).parameters.values())
    more = {parameter.name: _spelled(parameter, given.get(parameter.name), optional) for parameter in starred}
    own = [p.replace(annotation=p.empty) for p in inspect.signature(model.forward).parameters.values()]
    kept = [made for p in own for made in more.get(p.name, [p])]
    by_position = any(p.kind is p.VAR_POSITIONAL and more[p.name] for p in starred)
    passed = ", ".join(_passed(p, by_position) for p in kept)
    space = {"call": type(model).forward}
    exec(f"def forward({', '.join(['self', *(p.name for p in kept)])}):\n    return call(self, {passed})", space)
    forward: Any = space["forward"]
    forward.__defaults__ = tuple(p.default for p in kept)
    forward.__signature__ = inspect.Signature([inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *kept])
    with forwarding(model, forward):
        yield [left_out(p, more[p.name]) for p in starred]


def _spelled(star: inspect.Parameter, given: Any, optional: bool) -> list[inspect.Parameter]:
    """Parameters for what a call gives for ``*args`` or ``**kwargs``; those behind ``optional`` ones must have a default."""
    default = None if optional else star.empty
    if star.kind is star.VAR_KEYWORD:
        return [inspect.Parameter(name, star.KEYWORD_ONLY, default=default) for name in given or ()]
    names = [f"{star.name}_{n}" for n, _ in enumerate(given or ())]
    return [inspect.Parameter(name, star.POSITIONAL_OR_KEYWORD, default=default) for name in names]


def _passed(parameter: inspect.Parameter, by_position: bool) -> str:
    either = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    named = parameter.kind is parameter.KEYWORD_ONLY or (either and not by_position)
    return f"{parameter.name}={parameter.name}" if named else parameter.name


def left_out(star: inspect.Parameter, kept: Sequence[inspect.Parameter] = ()) -> str:
    """What a graph says of a parameter that takes any number of arguments, of which it takes those in ``kept``."""
    if not kept:
        return f"{placeholder_target(star)} is not taken any more"
    names = ", ".join(parameter.name for parameter in kept)
    return f"of {placeholder_target(star)}, what the examples give is taken and nothing else: {names}"


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


def placeholders(graph: fx.Graph, model: nn.Module) -> dict[str, fx.Node]:
    """Placeholders with the names and defaults of ``forward``, but for those of ``*args`` and ``**kwargs``."""
    nodes: dict[str, fx.Node] = {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind not in STARS:
            default = () if parameter.default is inspect.Parameter.empty else (parameter.default,)
            nodes[name] = graph.create_node("placeholder", name, default, {}, name=name)
    return nodes


def forwarded(model: nn.Module, nodes: dict[str, Any]) -> Arguments:
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
