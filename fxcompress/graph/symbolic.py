"""The first rung: symbolic tracing, with leaves from the op table and rollback of whatever defeats it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen
from torch.nn.utils import rnn
from torch.utils import _pytree as pytree

from fxcompress.errors import TraceError
from fxcompress.graph import ops, spellings
from fxcompress.graph.containers import mapping
from fxcompress.graph.decisions import DECIDED_SIZES, Decisions
from fxcompress.graph.guards import guard_decision, replace_checks
from fxcompress.graph.hooks import around, has_hooks, with_own_hooks
from fxcompress.graph.inputs import autocast_refused, preserved_attributes
from fxcompress.graph.known import MANY, Known, Shapes, at_batch_sizes, leading_size
from fxcompress.graph.modes import unnoted
from fxcompress.graph.proxies import Answering, taken_by_tensors
from fxcompress.graph.transformers import PLAIN, plain_transformers
from fxcompress.graph.tree import tensors

__all__ = ["PADDED", "LadderTracer", "first_line", "symbolic"]


_SEQUENCES = (rnn.pack_padded_sequence, rnn.pad_packed_sequence)

_MAKERS = ("zeros", "ones", "full", "empty", "arange", "linspace", "eye", "tensor", "rand", "randn", "finfo", "iinfo")
"""Functions of torch that take sizes and types, and no tensors that would tell them that they are traced."""

PADDED = "padded positions hold values that torch's fused kernel for inference would replace by zeros"


DECIDED = "argument {!r} keeps the type and the number of dimensions that it has in the examples: the code decides by them"

_TENSORS = ("contraction", "normalisation", "activation", "pooling", "embedding")
"""Families of operators that give one tensor."""

_COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_, operator.or_)


class LadderTracer(fx.Tracer):
    """fx's tracer, with leaves from the op table, rollback of a module that defeats it, and indexed attribute lookup.

    With ``examples`` (arguments by name) code may ask values for what their shapes and types tell: lengths, sizes, branches.
    What it does for several samples it need not do for one, unless ``single``.
    """

    def __init__(self, examples: Mapping[str, Any] | None = None, *, single: bool = False) -> None:
        made = [getattr(torch, name) for name in _MAKERS]
        super().__init__(autowrap_functions=(*_SEQUENCES, *made))
        self.given = dict(examples or {})
        self.examples = {name: value for name, value in self.given.items() if isinstance(value, torch.Tensor)}
        self._autowrap_search += [torch, rnn]  # for those who call nn.utils.rnn.pack_padded_sequence
        self.decisions = Decisions()
        self.single = single
        self._known: Known | None = None
        self._known_of_one: Known | None = None
        self._several: Shapes = {}
        self._looks = False
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
        if isinstance(graph._codegen, _PyTreeCodeGen):  # whose code takes the module as "self", and calls it nothing else
            info = graph._codegen.pytree_info
            graph._codegen.pytree_info = info._replace(orig_args=["self", *info.orig_args[1:]])
        for node in graph.nodes:
            node.meta.pop("is_wrapped", None)  # generated code would wrap it by a dotted name, and no trace go on after
        replace_checks(graph)
        if self._known is not None:
            sizes = self.decisions.settle(self._known, self._several, self._known_for)
            self.notes += [("", DECIDED_SIZES.format(", ".join(sizes)))] if sizes else []
        return graph

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Answering(node, self)

    def _known_for(self, calls: Sequence[Shapes]) -> Known:
        """What values are in calls with these arguments."""
        self.graph.owning_module = self.root  # type: ignore[assignment]
        places = [tensor.device for tensor in pytree.tree_leaves(self.given) if isinstance(tensor, torch.Tensor)]
        device = places[0] if places else torch.device("cpu")
        return Known(self.root, self.graph, [_by_placeholder(call) for call in calls], self._looking, device)

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Let modules run as they are, for a look at what they give."""
        before, self._looks = self._looks, True
        try:
            with unnoted():
                yield
        finally:
            self._looks = before

    def _look(self, node: fx.Node) -> Any:
        """What a value is in the example; LookupError where that is not known."""
        if not self.given:
            raise LookupError(node)
        if self._known is None:
            size = leading_size(self.given)
            samples = max(size, 2)
            several = at_batch_sizes(self.given, samples, samples + 1, MANY * samples) or [self.given]
            self._several, self._known = several[0], self._known_for(several)
            self._known_of_one = self._known_for(at_batch_sizes(self.given, 1) or [self.given])
        return self._known.value(node)

    def _asked(self, node: fx.Node, form: Callable[[Any], Any]) -> Any:
        """What ``form`` makes of a value, and that the code knows it now; LookupError where that is not known."""
        seen = self._look(node)
        assert self._known is not None
        assert self._known_of_one is not None
        outcome = self._known.agreed(node, form)
        if self._known_of_one.differs(node, form, outcome, 0):
            if self.single:
                raise TraceError("its code decides by the size of the batch")
            self.decisions.singular.add((node, form))
        if form is len and isinstance(seen, torch.Size):
            self.decisions.ranks.add(node)
        else:
            self.decisions.taken[node, form] = outcome
        return outcome

    def length(self, obj: fx.Proxy) -> int:
        """How many items a container has, or dimensions a size."""
        try:
            return int(self._asked(obj.node, len))
        except LookupError:
            raise TraceError("its code asks for the length of a value") from None

    def number(self, obj: fx.Proxy) -> Any:
        """The number that a value is."""
        try:
            return self._asked(obj.node, _number)
        except LookupError:
            raise TraceError("its code makes a number of a value") from None

    def is_tensor(self, obj: fx.Proxy) -> bool:
        """Whether a value is known to be a tensor, and no size."""
        found = ops.lookup(obj.node) if obj.node.op.startswith("call") else None
        if found is not None and found.family in _TENSORS:
            return True
        try:
            return isinstance(self._look(obj.node), torch.Tensor)
        except LookupError:
            return False

    def is_mask(self, obj: fx.Proxy, index: Any) -> bool:
        """Whether an index says of every number of a tensor whether it is meant."""
        try:
            found = self._look(index.node) if isinstance(index, fx.Proxy) else None
            if not isinstance(found, torch.Tensor) or found.dtype is not torch.bool:
                return False
            return bool(found.shape == self._look(obj.node).shape)
        except LookupError:
            return False

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """The items of a sequence of a known length."""
        try:
            if not isinstance(self._look(obj.node), (tuple, list, torch.Tensor)):
                return super().iter(obj)
            return iter([operator.getitem(obj, place) for place in range(self._asked(obj.node, len))])
        except LookupError:
            return super().iter(obj)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Which way code goes that asks for the type or the number of dimensions of an argument or a parameter."""
        asked: set[str] = set()
        try:
            decided = bool(self._fact(obj.node, asked))
        except LookupError:
            return self._branch(obj)
        self.notes += [("", DECIDED.format(name)) for name in sorted(asked) if ("", DECIDED.format(name)) not in self.notes]
        self._guard(obj.node, decided)
        return decided

    def _branch(self, obj: fx.Proxy) -> bool:
        """Which way code goes that asks for sizes."""
        try:
            return bool(self._asked(obj.node, bool))
        except LookupError:
            return super().to_bool(obj)

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
        return super().create_arg(a.item() if isinstance(a, np.generic) else a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            module_qualified_name in self.defeated
            or spellings.is_known_module(m)
            or (type(m) not in PLAIN and super().is_leaf_module(m, module_qualified_name))
        )

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if not isinstance(attr_val, torch.Tensor) or self._looks:
            return attr_val
        name = self._names.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in self._proxies:
            self._proxies[name] = self.create_proxy("get_attr", name, (), {})
        return self._proxies[name]

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._looks:
            return (m.forward if m in self.opened else forward)(*args, **kwargs)
        if m not in (self.submodule_paths or ()) and next(m.parameters(), None) is None:  # made where it is called
            return forward(*args, **kwargs)
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
        self.decisions.forget(erased)


def _by_placeholder(examples: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names of placeholders, of which fx makes one for each leaf of a container where it is opened."""
    leaves = {f"{name}_{n}": leaf for name, value in examples.items() for n, leaf in enumerate(pytree.tree_leaves(value), 1)}
    return {**leaves, **examples}


def _number(value: Any) -> Any:
    """``value`` where it is a number; LookupError where it is none."""
    if not isinstance(value, (int, float)):
        raise LookupError(value)
    return value


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
            taken_by_tensors(),
        ):
            return tracer.trace(model, concrete or None), ""
    except Exception as error:  # user code may raise anything on a proxy
        return None, first_line(error)
