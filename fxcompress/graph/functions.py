"""Functions that tracing took for one operator (``torch.fx.wrap``): traced with known sizes, or captured and inlined."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.errors import TraceError
from fxcompress.graph import ops
from fxcompress.graph.capture import capture, inline
from fxcompress.graph.containers import plain
from fxcompress.graph.inputs import Arguments
from fxcompress.graph.known import at_batch_sizes, leading_size
from fxcompress.graph.meta_run import MetaRun
from fxcompress.graph.recorder import Recorder
from fxcompress.graph.rungs import Rung, join
from fxcompress.graph.sized import SizedTracer

__all__ = ["inline_call", "open_functions"]


class _Function(nn.Module):
    """A Python function in the place of a module, so that it can be captured."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def open_functions(module: fx.GraphModule, call: Arguments | None) -> list[Rung]:
    """Capture the functions that tracing took for one operator (``torch.fx.wrap``) and the op table does not know."""
    calls = [n for n in module.graph.nodes if n.op == "call_function" and not isinstance(n.target, type)]
    unknown = [n for n in calls if ops.lookup(n) is None and not _is_aten(n)]  # a class makes the model's result
    if not unknown or call is None:
        return [Rung(n.name, "island", "without example_inputs torch.export cannot capture it") for n in unknown]
    known = _known_sizes(module, call, unknown)
    names = {node: _name(node) for node in unknown}
    sized = _trace_sized(module, unknown, known) if known is not None else set()
    reason = "a wrapped function: only the batch size may vary"
    rungs = [Rung(names[node], "sized", reason) for node in unknown if node in sized]
    left = [node for node in unknown if node not in sized]
    return rungs + (_export(module, call, left) if left else [])


def _name(node: fx.Node) -> str:
    return f"{ops.owner_name(node)}:{getattr(node.target, '__name__', node.target)}".lstrip(":")


def _known_sizes(module: fx.GraphModule, call: Arguments, nodes: list[fx.Node]) -> list[dict[fx.Node, Any]] | None:
    """What the arguments of ``nodes`` are on meta tensors, for the example batch and for one larger; None: not known."""
    found = []
    for example in (call, *at_batch_sizes(call, leading_size(call) + 1)):
        run = MetaRun(module)
        run.follow(example)
        if any(source in run.unknown for node in nodes for source in node.all_input_nodes):
            return None
        found.append(run.values)
    return found if len(found) > 1 else None


def _trace_sized(module: fx.GraphModule, nodes: list[fx.Node], known: list[dict[fx.Node, Any]]) -> set[fx.Node]:
    """Trace into the functions that ``nodes`` call, in their place; returns those for which it worked."""
    values = {node: (known[0][node], known[1][node]) for node in known[0] if node in known[1]}
    done = set()
    for node in nodes:

        def describe(made: fx.Node, origin: fx.Node = node) -> None:
            for key in ("nn_module_stack", "stack_trace"):
                if key in origin.meta:
                    made.meta[key] = origin.meta[key]

        tracer = SizedTracer(module.graph, values, describe)
        try:
            with module.graph.inserting_before(node):
                proxy: Any = tracer.proxy
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), proxy)
                target: Any = node.target
                result = tracer.create_arg(target(*plain(args), **plain(kwargs)))
        except Exception:  # whatever it needs, the next rung may give
            tracer.undo()
            continue
        _replace(module, node, result)
        done.add(node)
    return done


def _export(module: fx.GraphModule, call: Arguments, unknown: list[fx.Node]) -> list[Rung]:
    """Capture by ``torch.export`` and inline."""
    recorder = Recorder(module, keep=set(unknown))
    recorder.record(call)
    rungs = []
    fed = _fed_by_inputs(module)
    for node in unknown:
        where = _name(node)
        try:
            arguments, constants = Arguments(*recorder.kept[node]), _constants_among(node, recorder.kept[node], fed)
            function: Any = node.target
            program, fixed = capture(_Function(function), arguments, constants=constants, sizes=False)
        except TraceError as error:
            rungs.append(Rung(where, "island", str(error)))
            continue
        inline_call(module, node, program, prefix="")
        rungs.append(Rung(where, "exported", join("a wrapped function", fixed)))
    return rungs


def _fed_by_inputs(module: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose values depend on the model's inputs."""
    fed: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder" or any(source in fed for source in node.all_input_nodes):
            fed.add(node)
    return fed


def _constants_among(node: fx.Node, values: tuple[Any, Any], fed: set[fx.Node]) -> frozenset[int]:
    """The ids of the argument values that do not depend on the model's inputs."""
    pairs = zip(pytree.tree_leaves((tuple(node.args), dict(node.kwargs))), pytree.tree_leaves(values), strict=True)
    return frozenset(id(value) for source, value in pairs if isinstance(source, fx.Node) and source not in fed)


def _is_aten(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload)


def inline_call(module: fx.GraphModule, node: fx.Node, program: torch.export.ExportedProgram, prefix: str) -> None:
    """Put an exported program in the place of the call it was captured for; ``prefix`` names the module it belongs to."""
    with module.graph.inserting_before(node):
        result = inline(module.graph, module, prefix, program, Arguments(node.args, dict(node.kwargs)))
    _replace(module, node, result)


def _replace(module: fx.GraphModule, node: fx.Node, result: Any) -> None:
    """Give the users of ``node`` a node, or a structure of nodes, and take it out."""
    for user in list(node.users):
        index = user.args[1] if user.target is operator.getitem and not isinstance(result, fx.Node) else None
        if index is not None and not isinstance(index, fx.Node):
            user.replace_all_uses_with(result[index])
            module.graph.erase_node(user)
            continue
        user.args = fx.node.map_arg(user.args, lambda n: result if n is node else n)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda n: result if n is node else n)
    module.graph.erase_node(node)
