"""The first rung: symbolic tracing, with leaves from the op table and rollback of whatever defeats it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import rnn

from fxcompress.graph import spellings
from fxcompress.graph.containers import mapping
from fxcompress.graph.guards import guard_decision, replace_checks
from fxcompress.graph.hooks import around, has_hooks, with_own_hooks
from fxcompress.graph.inputs import autocast_refused, preserved_attributes
from fxcompress.graph.transformers import PLAIN, plain_transformers
from fxcompress.graph.tree import tensors

__all__ = ["PADDED", "LadderTracer", "first_line", "symbolic"]


_SEQUENCES = (rnn.pack_padded_sequence, rnn.pad_packed_sequence)


PADDED = "padded positions hold values that torch's fused kernel for inference would replace by zeros"


DECIDED = "argument {!r} keeps the type and the number of dimensions that it has in the examples: the code decides by them"

_COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_, operator.or_)


class LadderTracer(fx.Tracer):
    """fx's tracer, with leaves from the op table, rollback of a module that defeats it, and indexed attribute lookup."""

    def __init__(self, examples: Mapping[str, Any] | None = None) -> None:
        super().__init__(autowrap_functions=_SEQUENCES)
        self.examples = {name: value for name, value in (examples or {}).items() if isinstance(value, torch.Tensor)}
        self._autowrap_search.append(rnn)  # for those who call nn.utils.rnn.pack_padded_sequence
        self.defeated: dict[str, str] = {}
        self.notes: list[tuple[str, str]] = []
        self.opened: set[nn.Module] = set()
        self._proxies: dict[str, fx.Proxy] = {}
        self._names: dict[int, str] = {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        self._names = {id(tensor): name for name, tensor, _ in tensors(root)}
        self._proxies = {}
        spellings.known_classes()  # the op table is read before tracing puts its own functions in the place of torch's
        graph = super().trace(root, concrete_args)
        for node in list(graph.nodes):
            if node.target in _SEQUENCES:
                node.meta.pop("is_wrapped", None)  # generated code would wrap it by a dotted name, and no trace go on after
        replace_checks(graph)
        return graph

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Which way code goes that asks for the type or the number of dimensions of an argument or a parameter."""
        asked: set[str] = set()
        try:
            decided = bool(self._fact(obj.node, asked))
        except LookupError:
            return super().to_bool(obj)
        self.notes += [("", DECIDED.format(name)) for name in sorted(asked) if ("", DECIDED.format(name)) not in self.notes]
        self._guard(obj.node, decided)
        return decided

    def _guard(self, test: fx.Node, outcome: bool) -> None:
        """Guard a decision by one comparison of an argument's fact with a constant."""
        fact, other = test.args if len(test.args) == 2 else (None, None)
        asked = fact.args[0] if isinstance(fact, fx.Node) and not isinstance(other, fx.Node) else None
        if isinstance(fact, fx.Node) and isinstance(asked, fx.Node) and asked.op == "placeholder":
            name = str(fact.args[1]) if fact.target is getattr else "ndim"
            guard_decision(asked, name, test.target.__name__, other, outcome)  # type: ignore[union-attr]

    def _fact(self, value: Any, asked: set[str]) -> Any:
        """What ``value`` is for every call like the example; LookupError where that depends on more."""
        if not isinstance(value, fx.Node):
            return value
        is_attribute = value.target is getattr and value.args[1] in ("dtype", "ndim")
        if is_attribute or (value.op == "call_method" and value.target in ("dim", "ndimension")):
            return getattr(self._example(value.args[0], asked), str(value.args[1]) if is_attribute else "ndim")
        if value.op == "call_function" and value.target in _COMPARISONS:
            return value.target(*(self._fact(arg, asked) for arg in value.args))
        raise LookupError(value)

    def _example(self, node: Any, asked: set[str]) -> torch.Tensor:
        if node.op == "placeholder":
            asked.add(str(node.target))
            return self.examples[str(node.target)]
        if node.op == "get_attr":
            return next(tensor for name, tensor, _ in tensors(self.root) if name == node.target)  # getattr gives proxies now
        raise LookupError(node)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, dict) and type(a) is not dict:
            return mapping(self.graph, a, {key: self.create_arg(value) for key, value in a.items()})
        if spellings.is_named_tuple(type(a)):
            return self.graph.call_function(type(a), tuple(self.create_arg(value) for value in a))
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            module_qualified_name in self.defeated
            or spellings.is_known_module(m)
            or (type(m) not in PLAIN and super().is_leaf_module(m, module_qualified_name))
        )

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if not isinstance(attr_val, torch.Tensor):
            return attr_val
        name = self._names.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in self._proxies:
            self._proxies[name] = self.create_proxy("get_attr", name, (), {})
        return self._proxies[name]

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self.path_of_module(m)
        opens = has_hooks(m) and spellings.is_known_module(m) and name not in self.defeated
        if self.is_leaf_module(m, name) and not opens:
            return super().call_module(m, forward, args, kwargs)
        if isinstance(m, nn.TransformerEncoder) and kwargs.get("src_key_padding_mask") is not None:
            self.notes.append((name, PADDED))
        last = next(reversed(self.graph.nodes), None)
        depth, calls, scope = len(self.module_stack), dict(self.num_calls), self.scope
        try:
            return self._open(m, name, forward, args, kwargs)
        except Exception as error:  # user code may raise anything on a proxy
            self.defeated[name] = first_line(error)
        self._roll_back(last)
        while len(self.module_stack) > depth:
            self.module_stack.popitem(last=True)
        self.num_calls, self.scope = calls, scope
        return super().call_module(m, forward, args, kwargs)

    def _open(
        self, m: nn.Module, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What a module computes: by its own code, or as a layer between the hooks that it has."""
        if not self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        self.opened.add(m)
        return around(m, functools.partial(self._call_leaf, m, forward), args, kwargs)

    def _call_leaf(self, m: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return super().call_module(m, forward, args, kwargs)

    def _roll_back(self, last: fx.Node | None) -> None:
        erased = set()
        for node in reversed(list(self.graph.nodes)):
            if node is last:
                break
            erased.add(node)
            self.graph.erase_node(node)
        self._proxies = {name: proxy for name, proxy in self._proxies.items() if proxy.node not in erased}


def first_line(error: Exception) -> str:
    """The first line of what went wrong."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]


def symbolic(tracer: LadderTracer, model: nn.Module, concrete: dict[str, Any]) -> tuple[fx.Graph | None, str]:
    """The graph of ``model`` with its ``concrete`` arguments fixed, or None and the first line of why there is none."""
    try:
        with (
            preserved_attributes(model),
            plain_transformers(),
            with_own_hooks(model),
            autocast_refused(),
        ):
            return tracer.trace(model, concrete or None), ""
    except Exception as error:  # user code may raise anything on a proxy
        return None, first_line(error)
