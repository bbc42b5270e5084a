"""From a module to a graph, by a ladder that refuses no model.

1. Symbolic tracing keeps layers as ``call_module`` nodes under their own names.
2. The smallest module that defeats it (control flow on shapes, iteration over a proxy) is captured with ``torch.export``
   and inlined as ATen operators.
3. What both refuse stays a Python *island*; its traceable children are compiled in place.

``graph_module.meta["rungs"]`` names the part that stands on each lower rung, and why.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx._symbolic_trace import PH
from torch.utils import _pytree as pytree

from fxcompress.errors import TraceError
from fxcompress.graph import edit, inplace, ops
from fxcompress.graph.capture import capture, inline, ordered
from fxcompress.graph.inputs import Arguments, arguments, bind, preserved_attributes, record_calls
from fxcompress.graph.island import TOP, Island, regions
from fxcompress.graph.module import TracedModule
from fxcompress.graph.shapes import Recorder, propagate

__all__ = ["Rung", "around_island", "is_impure", "is_traced", "region_inputs", "trace"]


@dataclass(frozen=True)
class Rung:
    """Where a part of the model stands: ``exported`` or ``island`` (or ``note``), and why it is not higher."""

    module: str
    rung: str
    reason: str


def is_traced(model: nn.Module) -> bool:
    """Whether ``model`` came out of :func:`trace`."""
    return isinstance(model, fx.GraphModule) and "rungs" in model.meta


def trace(model: nn.Module, example_inputs: Any = None) -> fx.GraphModule:
    """Capture ``model`` as a graph module with the same signature, names, parameters and outputs.

    The caller's model is copied, never changed. ``example_inputs`` (a tensor, a tuple of positionals, a dict by keyword)
    let the second rung work and give every node its shape; optional arguments left out of them keep their defaults.

    Raises TraceError where the model cannot be copied, DataError where example inputs do not fit its signature.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"trace() takes an nn.Module, got a {type(model).__name__}.")
    call = arguments(example_inputs) if example_inputs is not None else None
    if call is not None:
        bind(model, call)
    model = _copy(model)
    if is_traced(model):
        assert isinstance(model, fx.GraphModule)
        return model
    traced = _trace(model, call)
    if call is not None:
        for name, inputs in region_inputs(traced, call).items():
            propagate(regions(traced)[name], inputs)
    return traced


def region_inputs(model: fx.GraphModule, call: Arguments) -> dict[str, Arguments]:
    """Arguments of the first call of every compiled region; runs the model only where there are islands."""
    names = set(regions(model))
    inputs = {"": call} if "" in names else {}
    inner = names - {""}
    if inner:
        inputs |= {name: recorded for name, (recorded, _) in record_calls(model, call, inner).items()}
    return inputs


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({error}), and fxcompress never changes the model it is given. "
            "Make it deep-copyable: detach stored tensors, drop open handles."
        ) from error


class _Tracer(fx.Tracer):
    """fx's tracer, with leaves from the op table, rollback of a module that defeats it, and indexed attribute lookup."""

    def __init__(self) -> None:
        super().__init__()
        self.defeated: dict[str, str] = {}
        self.hooked: list[str] = []
        self._proxies: dict[str, fx.Proxy] = {}
        self._names: dict[int, str] = {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        named = [*root.named_parameters(remove_duplicate=True), *root.named_buffers(remove_duplicate=True)]
        self._names = {id(tensor): name for name, tensor in named}
        self._proxies = {}
        return super().trace(root, concrete_args)

    def create_arg(self, a: Any) -> Any:
        if type(a) is OrderedDict:
            return ordered(self.graph, {key: self.create_arg(value) for key, value in a.items()})
        if ops.is_named_tuple(type(a)):
            return self.graph.call_function(type(a), tuple(self.create_arg(value) for value in a))
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            module_qualified_name in self.defeated
            or ops.is_known_module(m)
            or super().is_leaf_module(m, module_qualified_name)
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
        if self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        if m._forward_hooks or m._forward_pre_hooks:
            self.hooked.append(name)
        last = next(reversed(self.graph.nodes), None)
        depth, calls, scope = len(self.module_stack), dict(self.num_calls), self.scope
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # user code may raise anything on a proxy
            self.defeated[name] = _reason(error)
        self._roll_back(last)
        while len(self.module_stack) > depth:
            self.module_stack.popitem(last=True)
        self.num_calls, self.scope = calls, scope
        return super().call_module(m, forward, args, kwargs)

    def _roll_back(self, last: fx.Node | None) -> None:
        erased = set()
        for node in reversed(list(self.graph.nodes)):
            if node is last:
                break
            erased.add(node)
            self.graph.erase_node(node)
        self._proxies = {name: proxy for name, proxy in self._proxies.items() if proxy.node not in erased}


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]


def _trace(model: nn.Module, call: Arguments | None) -> fx.GraphModule:
    module, reason = _capture_whole(model, call)
    if module is not None:
        return module
    return around_island(model, [Rung("", "island", reason), *_compile_children(model, call)])


def _capture_whole(model: nn.Module, call: Arguments | None) -> tuple[fx.GraphModule | None, str]:
    """``model`` as one graph, by the first two rungs; or None, and why both refuse its own forward."""
    tracer = _Tracer()
    concrete = _concrete(model, call)
    graph, failure = _symbolic(tracer, model, concrete)
    if graph is None and call is not None and (nested := _nested(model, call)):
        tracer = _Tracer()
        graph, failure = _symbolic(tracer, model, {**concrete, **nested})
    rungs = [Rung("", "note", f"argument {name!r} is fixed to {value!r}") for name, value in concrete.items()]
    module: fx.GraphModule
    if graph is not None:
        _name_placeholders(graph, model)
        module = TracedModule(tracer.root, graph, type(model).__name__)
        rungs += [Rung(name, "note", "its forward hooks do not run in the graph") for name in tracer.hooked]
        rungs += _resolve(module, model, tracer.defeated, call)
        rungs += _open_functions(module, call)
        return _finish(module, model, rungs), ""
    if call is None:
        return None, _join(failure, "without example_inputs torch.export cannot capture it")
    try:
        program, fixed = capture(model, call)
        module = _from_export(model, call, program)
    except TraceError as error:
        return None, _join(failure, str(error))
    return _finish(module, model, [*rungs, Rung("", "exported", _join(failure, fixed))]), ""


_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def _target_of(parameter: inspect.Parameter) -> str:
    """A placeholder's target: the argument's name, with the stars fx wants."""
    return _STARS.get(parameter.kind, "") + parameter.name


def _name_placeholders(graph: fx.Graph, model: nn.Module) -> None:
    """Give arguments that were fixed their own names back, which fx numbers; flattened containers are named elsewhere."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    parameters = inspect.signature(model.forward).parameters.values()
    if len(placeholders) != len(parameters):
        return
    for node, parameter in zip(placeholders, parameters, strict=True):
        node.target = _target_of(parameter)


def _symbolic(tracer: _Tracer, model: nn.Module, concrete: dict[str, Any]) -> tuple[fx.Graph | None, str]:
    try:
        with preserved_attributes(model):
            return tracer.trace(model, concrete or None), ""
    except Exception as error:  # user code may raise anything on a proxy
        return None, _reason(error)


def _concrete(model: nn.Module, call: Arguments | None) -> dict[str, Any]:
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


def _nested(model: nn.Module, call: Arguments) -> dict[str, Any]:
    """Container arguments with a placeholder for each leaf, so that code may iterate over the container."""
    given = bind(model, call).arguments
    return {
        name: pytree.tree_map(lambda leaf: PH, value)
        for name, value in given.items()
        if isinstance(value, (list, tuple, dict)) and name in inspect.signature(model.forward).parameters
    }


def _finish(module: fx.GraphModule, model: nn.Module, rungs: list[Rung]) -> fx.GraphModule:
    """Make the captured graph a program: out-of-place, without dead code, with the model's training flags."""
    training = {name: part.training for name, part in model.named_modules(remove_duplicate=False)}
    for name, part in module.named_modules(remove_duplicate=False):
        part.training = training.get(name, model.training)
    inplace.make_functional(module)
    module.graph.eliminate_dead_code(is_impure_node=is_impure)
    edit.finish(module)
    module.graph.lint()
    module.meta.update(rungs=tuple(rungs), stage="float")
    return module


def is_impure(node: fx.Node) -> bool:
    """Whether a node may do something besides computing its result: write in place, assert, run code nobody knows."""
    if node.op in ("placeholder", "output") or inplace.is_in_place(node) or ops.kind(node) in ("assert", "setitem", "copy"):
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    return node.op != "get_attr" and ops.lookup(node) is None


def _join(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _from_export(model: nn.Module, call: Arguments, program: torch.export.ExportedProgram) -> fx.GraphModule:
    graph = fx.Graph()
    bound = bind(model, call)
    nodes = _placeholders(graph, model)
    args: list[Any] = []
    for name in bound.signature.parameters:
        if name in bound.arguments:
            args.append(nodes[name])
    positional = tuple(args[: len(call.args)])
    kwargs = {name: nodes[name] for name in call.kwargs}
    graph.output(inline(graph, model, "", program, Arguments(positional, kwargs)))
    return TracedModule(model, graph, type(model).__name__)


def _placeholders(graph: fx.Graph, model: nn.Module) -> dict[str, fx.Node]:
    """Placeholders with the names and defaults of the model's forward."""
    nodes: dict[str, fx.Node] = {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        target = _target_of(parameter)
        default = () if parameter.default is inspect.Parameter.empty else (parameter.default,)
        nodes[name] = graph.create_node("placeholder", target, default, {}, name=name)
    return nodes


def around_island(model: nn.Module, rungs: list[Rung]) -> fx.GraphModule:
    """A graph module that owns the model's tensors and children, and whose graph calls the model's code."""
    root = nn.Module()
    for name, child in model._modules.items():
        root.add_module(name, child)
    for name, parameter in model._parameters.items():
        root.register_parameter(name, parameter)
    for name, buffer in model._buffers.items():
        root.register_buffer(name, buffer, persistent=name not in model._non_persistent_buffers_set)
    island = Island(model)
    island.training = model.training
    root.add_module(TOP, island)
    graph = fx.Graph()
    nodes = _placeholders(graph, model)
    args, kwargs = _forwarded(model, nodes)
    graph.output(graph.create_node("call_module", TOP, args, kwargs))
    module = TracedModule(root, graph, type(model).__name__)
    for name, value in {**root._modules, **root._parameters, **root._buffers}.items():
        if not hasattr(module, name):
            setattr(module, name, value)
    module.training = model.training
    module.meta.update(rungs=tuple(rungs), stage="float")
    return module


def _forwarded(model: nn.Module, nodes: dict[str, fx.Node]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TraceError(f"{type(model).__name__}.forward takes {parameter}; an island needs named arguments.")
        if parameter.kind is parameter.KEYWORD_ONLY:
            kwargs[name] = nodes[name]
        else:
            args.append(nodes[name])
    return tuple(args), kwargs


def _resolve(module: fx.GraphModule, model: nn.Module, defeated: dict[str, str], call: Arguments | None) -> list[Rung]:
    """Second and third rung for every call of a module that defeated symbolic tracing."""
    if not defeated:
        return []
    calls = record_calls(model, call, set(defeated)) if call is not None else {}
    rungs: list[Rung] = []
    for name, reason in defeated.items():
        nodes = [node for node in module.graph.nodes if node.op == "call_module" and node.target == name]
        if not nodes:
            continue
        part = module.get_submodule(name)
        if name not in calls:
            rungs.append(Rung(name, "island", _join(reason, "without example_inputs torch.export cannot capture it")))
            continue
        try:
            program, fixed = capture(part, calls[name][0])
        except TraceError as error:
            rungs.append(Rung(name, "island", _join(reason, str(error))))
            rungs += _compile_children(part, calls[name][0], prefix=name)
            continue
        for node in nodes:
            _inline_call(module, node, program, prefix=name)
        rungs.append(Rung(name, "exported", _join(reason, fixed)))
    return rungs


class _Function(nn.Module):
    """A Python function in the place of a module, so that it can be captured."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _open_functions(module: fx.GraphModule, call: Arguments | None) -> list[Rung]:
    """Capture the functions that tracing took for one operator (``torch.fx.wrap``) and the op table does not know."""
    unknown = [n for n in module.graph.nodes if n.op == "call_function" and ops.lookup(n) is None and not _is_aten(n)]
    if not unknown or call is None:
        return [Rung(n.name, "island", "without example_inputs torch.export cannot capture it") for n in unknown]
    recorder = Recorder(module, keep=set(unknown))
    recorder.record(call)
    rungs = []
    fed = _fed_by_inputs(module)
    for node in unknown:
        where = f"{ops.owner_name(node)}:{getattr(node.target, '__name__', node.target)}".lstrip(":")
        try:
            arguments, constants = Arguments(*recorder.kept[node]), _constants_among(node, recorder.kept[node], fed)
            program, fixed = capture(_Function(node.target), arguments, constants=constants, sizes=False)
        except TraceError as error:
            rungs.append(Rung(where, "island", str(error)))
            continue
        _inline_call(module, node, program, prefix="")
        rungs.append(Rung(where, "exported", _join("a wrapped function", fixed)))
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


def _inline_call(module: fx.GraphModule, node: fx.Node, program: torch.export.ExportedProgram, prefix: str) -> None:
    with module.graph.inserting_before(node):
        result = inline(module.graph, module, prefix, program, Arguments(node.args, dict(node.kwargs)))
    for user in list(node.users):
        index = user.args[1] if user.target is operator.getitem and not isinstance(result, fx.Node) else None
        if index is not None and not isinstance(index, fx.Node):
            user.replace_all_uses_with(result[index])
            module.graph.erase_node(user)
            continue
        user.args = fx.node.map_arg(user.args, lambda n: result if n is node else n)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda n: result if n is node else n)
    module.graph.erase_node(node)


def _compile_children(part: nn.Module, call: Arguments | None, prefix: str = "") -> list[Rung]:
    """Compile what can be compiled below an island, in place; undone as a whole where the island then fails to run."""
    candidates = {name for name, m in part.named_modules() if name and any(True for _ in m.parameters())}
    calls = record_calls(part, call, candidates) if call is not None else {}
    rungs: list[Rung] = []
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    _compile_below(part, prefix, "", calls, call is not None, rungs, replaced)
    if call is not None and replaced:
        try:
            record_calls(part, call, set())
        except Exception as error:  # the island's code may need anything of the children it had
            for parent, name, original in replaced:
                setattr(parent, name, original)
            return [Rung(prefix, "note", f"compiled children were put back: {_reason(error)}")]
    return rungs


def _compile_below(
    part: nn.Module,
    prefix: str,
    path: str,
    calls: dict[str, tuple[Arguments, Any]],
    called_only: bool,
    rungs: list[Rung],
    replaced: list[tuple[nn.Module, str, nn.Module]],
) -> None:
    for name, child in list(part.named_children()):
        inner = f"{path}.{name}" if path else name
        if next(child.parameters(), None) is None or isinstance(child, fx.GraphModule):
            continue
        if called_only and inner not in calls:
            _compile_below(child, prefix, inner, calls, called_only, rungs, replaced)
            continue
        full = f"{prefix}.{inner}" if prefix else inner
        compiled, reason = _capture_whole(child, calls[inner][0] if inner in calls else None)
        if compiled is None:
            rungs.append(Rung(full, "island", reason))
            _compile_below(child, prefix, inner, calls, called_only, rungs, replaced)
            continue
        rungs += [Rung(f"{full}.{r.module}".rstrip("."), r.rung, r.reason) for r in compiled.meta["rungs"]]
        replaced.append((part, name, child))
        setattr(part, name, compiled)
