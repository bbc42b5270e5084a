"""Running a graph node by node on real tensors: what each value is like, and what some of them are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.errors import DataError
from fxcompress.graph.containers import plain
from fxcompress.graph.inputs import Arguments, bind, frozen_state
from fxcompress.graph.shapes import describe

__all__ = ["Interpreter", "Look", "Recorder", "Values", "placeholder_values"]


class Interpreter(fx.Interpreter):
    """Runs nodes one by one, with the ordinary containers that generated code would pass."""

    def __init__(self, module: nn.Module, graph: fx.Graph | None = None) -> None:
        super().__init__(module, garbage_collect_values=graph is None, graph=graph)
        self.extra_traceback = False  # it prints the whole graph, and fails on quantized dtypes

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(plain(arg) for arg in args), {key: plain(value) for key, value in kwargs.items()}


class Recorder(Interpreter):
    """Runs the graph on real tensors and notes each value's metadata under the node.

    What a module computes is what is noted; gradients are off and buffers keep their values. The arguments of the nodes in
    ``keep`` are copied.
    """

    def __init__(self, module: fx.GraphModule, keep: set[fx.Node] | None = None) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, Any] = {}
        self.keep = keep or set()
        self.kept: dict[fx.Node, tuple[Any, Any]] = {}
        self.current: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        if n in self.keep:
            self.kept[n] = pytree.tree_map_only(torch.Tensor, torch.clone, self.fetch_args_kwargs_from_env(n))
        value = super().run_node(n)
        self.found[n] = describe(value)
        return value

    def _result(self, value: Any) -> Any:
        assert isinstance(self.module, fx.GraphModule)
        codegen = self.module.graph._codegen
        value = plain(value)
        return codegen.process_outputs(value) if isinstance(codegen, fx.graph._PyTreeCodeGen) else value

    def record(self, call: Arguments) -> Any:
        """The graph's result for ``call``; raises DataError naming the node where the call does not fit the model."""
        assert isinstance(self.module, fx.GraphModule)
        with frozen_state(self.module):
            try:
                values = placeholder_values(self.module, call.fresh())
                return self._result(self.run(*values, enable_io_processing=False))
            except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
                where = self.current.format_node() if self.current is not None else "the inputs"
                sizes = [tuple(t.shape) for t in pytree.tree_leaves(tuple(call)) if isinstance(t, torch.Tensor)]
                reason = str(error).split("While executing")[0].strip().split("\n")[0]
                raise DataError(
                    f"the example inputs {sizes} do not run through the model: {reason} (at {where}). "
                    "Give inputs the model accepts."
                ) from error


class Look(NamedTuple):
    """One run of a graph: its result, and values on the way to it by the names of their nodes."""

    result: Any
    values: dict[str, Any]


class Values(Recorder):
    """Runs the graph and keeps what the nodes named ``wanted`` give, as it is then; ``values`` by name."""

    def __init__(self, module: fx.GraphModule, wanted: Iterable[str]) -> None:
        super().__init__(module)
        self.wanted = frozenset(wanted)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted:
            self.values[n.name] = pytree.tree_map_only(torch.Tensor, torch.clone, value)
        return value


def placeholder_values(module: fx.GraphModule, call: Arguments) -> list[Any]:
    """``call`` in the order of the graph's placeholders, defaults filled in, containers flattened where the graph wants."""
    bound = bind(module, call)
    bound.apply_defaults()
    codegen = module.graph._codegen
    if isinstance(codegen, fx.graph._PyTreeCodeGen):
        return list(codegen.process_inputs(*bound.args, **bound.kwargs))
    return list(bound.arguments.values())
