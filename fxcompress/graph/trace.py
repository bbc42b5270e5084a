"""From a module to a graph, by a ladder that refuses no model.

1. Symbolic tracing keeps layers as ``call_module`` nodes under their own names. Functions that it took for one operator
   (``torch.fx.wrap``) are traced with *sized* values, which know their shapes.
2. The smallest module that defeats it (control flow on shapes, iteration over a proxy) is captured with ``torch.export``
   and inlined as ATen operators.
3. What both refuse stays a Python *island*; its traceable children are compiled in place.

``graph_module.meta["rungs"]`` names the part that stands on each lower rung, and why.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from fxcompress.errors import TraceError
from fxcompress.graph import spellings
from fxcompress.graph.capture import capture, inline
from fxcompress.graph.collector import collector_paused
from fxcompress.graph.copying import copied_model
from fxcompress.graph.drop_path import make_drop_paths
from fxcompress.graph.finishing import finished
from fxcompress.graph.functions import inline_call, open_functions
from fxcompress.graph.guards import guard_fixed, guard_given
from fxcompress.graph.hooks import ONCE, drop_hooks, has_hooks
from fxcompress.graph.inputs import Arguments, arguments, bind, frozen_state, record_calls, tensors_in, undisturbed
from fxcompress.graph.island import around_island, regions
from fxcompress.graph.known import leading_size
from fxcompress.graph.meta_run import propagate
from fxcompress.graph.modes import flipped, noted_mode, only, switching_layers
from fxcompress.graph.module import TracedModule
from fxcompress.graph.recorder import Recorder, placeholder_values
from fxcompress.graph.results import output_snr, same_structure
from fxcompress.graph.rungs import Rung, join
from fxcompress.graph.select import classes_of
from fxcompress.graph.shapes import describe
from fxcompress.graph.signatures import (
    concrete_arguments,
    forwarded,
    left_out,
    name_placeholders,
    named_arguments,
    nested_arguments,
    placeholders,
    stars,
)
from fxcompress.graph.symbolic import LadderTracer, first_line, symbolic
from fxcompress.graph.tree import parts, tensors, unwrapped

__all__ = ["Rung", "is_traced", "region_inputs", "trace"]


def is_traced(model: nn.Module) -> bool:
    """Whether ``model`` came out of :func:`trace`."""
    return isinstance(model, fx.GraphModule) and "rungs" in model.meta


@undisturbed()
@collector_paused()
def trace(model: nn.Module, example_inputs: Any = None, *, copied: bool = False, shared: bool = False) -> fx.GraphModule:
    """Capture ``model`` as a graph module with the same signature, names, parameters and outputs.

    The caller's model is copied, never changed; DistributedDataParallel, DataParallel and ``torch.compile`` are taken off.
    ``example_inputs`` (a tensor, a tuple of positionals, a dict by keyword) let the second rung work and give every node
    its shape; optional arguments left out of them keep their defaults.
    ``copied`` says that ``model`` is a copy that nobody else uses, and may be taken apart; ``shared`` lets parameters use
    the model's memory, for a caller who calls :func:`fxcompress.graph.sharing.own` before anything writes to it.

    Raises TraceError where the model cannot be copied, DataError where example inputs do not fit its signature.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"trace() takes an nn.Module, got a {type(model).__name__}.")
    wrapped, model = model, unwrapped(model)
    scripted = [name for name, part in model.named_modules() if isinstance(part, torch.jit.ScriptModule)]
    if scripted:
        whole = scripted[0] or "the model"
        raise TraceError(f"{whole} is compiled by torch.jit, and holds no Python code to trace. Give it as it was before.")
    held = list(tensors(model))
    sharded = [name for name, tensor, _ in held if type(tensor).__name__ in ("DTensor", "FlatParameter")]
    if sharded:
        raise TraceError(f"{sharded[0]} is one process's shard (FSDP): gather the whole model on one device first.")
    lazy = [name for name, tensor, _ in held if nn.parameter.is_lazy(tensor)]
    if lazy:
        raise TraceError(f"{lazy[0]} has no shape yet: its layer is lazy. Call the model once on a batch, then compress it.")
    call = arguments(example_inputs) if example_inputs is not None else None
    if call is not None:
        bind(model, call)
    model = model if copied else copied_model(model, shared)
    classes = classes_of(model)
    traced = model if is_traced(model) else _trace(model, call)
    assert isinstance(traced, fx.GraphModule)
    traced.meta.setdefault("classes", classes)
    if unwrapped(wrapped) is not wrapped:
        traced.meta["rungs"] = (Rung("", "note", f"{type(wrapped).__name__} was taken off"), *traced.meta["rungs"])
    if call is not None:
        for name, inputs in region_inputs(traced, call).items():
            if traced is not model or not _fits_metadata(regions(traced)[name], inputs):
                propagate(regions(traced)[name], inputs)
    return traced


def _fits_metadata(module: fx.GraphModule, call: Arguments) -> bool:
    """Whether the shapes noted in a graph are those that ``call`` makes."""
    stated = [node.meta.get("tensor_meta") for node in module.graph.nodes if node.op == "placeholder"]
    return stated == [describe(value) for value in placeholder_values(module, call)]


def region_inputs(model: fx.GraphModule, call: Arguments) -> dict[str, Arguments]:
    """Arguments of the first call of every compiled region; runs the model only where there are islands."""
    names = set(regions(model))
    inputs = {"": call} if "" in names else {}
    inner = names - {""}
    if inner:
        inputs |= {name: recorded for name, (recorded, _) in record_calls(model, call, inner).items()}
    return inputs


def _trace(model: nn.Module, call: Arguments | None) -> fx.GraphModule:
    make_drop_paths(model)
    module, reason = _capture_whole(model, call)
    if module is not None:
        return module
    starred = stars(model)
    if call is not None and any(bind(model, call).arguments.get(parameter.name) for parameter in starred):
        raise TraceError(f"{type(model).__name__}.forward was given {starred[0]}; an island needs named arguments.")
    notes = [Rung("", "note", left_out(star)) for star in starred]
    return around_island(model, [Rung("", "island", reason), *notes, *_compile_children(model, call)])


def _capture_whole(model: nn.Module, call: Arguments | None) -> tuple[fx.GraphModule | None, str]:
    """``model`` as one graph, by the first two rungs; or None, and why both refuse its own forward."""
    if call is not None and any(isinstance(value, PackedSequence) for value in [*call.args, *call.kwargs.values()]):
        return None, "it takes a packed sequence, whose shape depends on its data"
    with named_arguments(model, call) as notes:
        module, reason = _capture_named(model, call)
        given = bind(model, call).arguments if call is not None else {}
    if module is not None:
        module.meta["rungs"] += tuple(Rung("", "note", note) for note in notes)
        for node in module.graph.find_nodes(op="placeholder"):
            if node.args == (None,) and given.get(str(node.target)) is not None:
                guard_given(node)
    return module, reason


def _capture_named(model: nn.Module, call: Arguments | None, *, single: bool = False) -> tuple[fx.GraphModule | None, str]:
    hooked = [name for name, part in parts(model).items() if has_hooks(part)]
    concrete = bound = concrete_arguments(model, call)
    if spellings.module_kind(model) in _LAYERS and not hooked:
        return _around_layer(model, concrete), ""
    examples = bind(model, call).arguments if call is not None else {}
    tracer = LadderTracer(examples, single=single)
    with noted_mode() as mode:
        graph, failure = symbolic(tracer, model, bound)
        if graph is None and call is not None and (nested := nested_arguments(model, call)):
            tracer, bound = LadderTracer(examples, single=single), {**concrete, **nested}
            graph, failure = symbolic(tracer, model, bound)
    rungs = [Rung("", "note", FIXED.format(name, value)) for name, value in concrete.items()]
    module: fx.GraphModule
    if graph is not None:
        name_placeholders(graph, model)
        module = TracedModule(tracer.root, graph, type(model).__name__)
        if tracer.decisions.singular and not (call is not None and _serves_one(module, model, call)):
            return _capture_named(model, call, single=True)
        rungs += [Rung(name, "note", note) for name, note in tracer.notes]
        rungs += _other_mode(module, model, LadderTracer(examples), bound) if mode.asked else []
        rungs += _resolve(module, model, tracer.defeated, call)
        rungs += open_functions(module, call)
        for node in module.graph.nodes if tracer.opened else ():
            if node.op == "call_module" and (layer := module.get_submodule(node.target)) in tracer.opened:
                drop_hooks(layer)
        return finished(module, model, [*rungs, *_hook_notes(hooked, rungs)]), ""
    if call is None:
        return None, join(failure, "without example_inputs torch.export cannot capture it")
    try:
        program, fixed = capture(model, call)
        module = _from_export(model, call, program)
    except TraceError as error:
        return None, join(failure, str(error))
    rungs += [Rung("", "exported", join(failure, fixed)), *_hook_notes(hooked, rungs)]
    return finished(module, model, rungs), ""


def _around_layer(model: nn.Module, concrete: dict[str, Any]) -> fx.GraphModule:
    """One layer whose code is not for symbolic tracing (LSTM, MultiheadAttention): a graph that calls it."""
    name = spellings.module_kind(model)
    root, graph = nn.Module(), fx.Graph()
    root.add_module(name, model)
    nodes = placeholders(graph, model)
    for argument, value in concrete.items():
        guard_fixed(nodes[argument], argument, value)
    args, kwargs = forwarded(model, {**nodes, **concrete})
    called = graph.create_node("call_module", name, args, kwargs)
    graph.output(tuple(graph.call_function(operator.getitem, (called, number)) for number in (0, 1)))
    notes = [Rung("", "note", FIXED.format(argument, value)) for argument, value in concrete.items()]
    notes.append(Rung("", "note", f"it is one layer, which the graph calls {name!r}: its tensors are {name}.…"))
    module = finished(TracedModule(root, graph, type(model).__name__), root.train(model.training), notes)
    module.meta["classes"] = classes_of(module)
    return module


def _serves_one(module: fx.GraphModule, model: nn.Module, call: Arguments) -> bool:
    """Whether a graph that holds what code does for several samples computes what the model does for one."""
    size = leading_size(call)

    def first(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:1] if tensor.dim() and tensor.shape[0] == size else tensor

    one = Arguments(*pytree.tree_map_only(torch.Tensor, first, tuple(call)))
    results = []
    for whose in (model, module):
        try:
            with frozen_state(whose):
                results.append(one.fresh()(whose))
        except Exception:  # what the model itself refuses the graph may refuse
            return not results
    return same_structure(*results) and output_snr(*results) > _SAME


_SAME = 80.0
"""dB to which results agree but for the order of sums."""

FIXED = "argument {!r} is fixed to {!r}"

_LAYERS = ("lstm", "gru", "rnn", "multihead_attention")
"""Layers that return two values, by code that asks for shapes."""


def _other_mode(module: fx.GraphModule, model: nn.Module, tracer: LadderTracer, bound: dict[str, Any]) -> list[Rung]:
    """Give a graph the layers that switch by its mode; a note for what else the model's code does in its other mode."""
    with flipped(model):
        other, _ = symbolic(tracer, model, bound)
    return switching_layers(module, model, other) if other is not None else [Rung("", "note", only(model))]


def _hook_notes(hooked: list[str], rungs: list[Rung]) -> list[Rung]:
    """A note for every module whose hooks are operators now: those outside islands."""
    islands = {rung.module for rung in rungs if rung.rung == "island"}
    return [Rung(name, "note", ONCE) for name in hooked if not any(f"{name}.".startswith(f"{i}.") for i in islands)]


def _from_export(model: nn.Module, call: Arguments, program: torch.export.ExportedProgram) -> fx.GraphModule:
    graph = fx.Graph()
    bound = bind(model, call)
    nodes = placeholders(graph, model)
    args: list[Any] = []
    for name in bound.signature.parameters:
        if name in bound.arguments:
            args.append(nodes[name])
    for name, parameter in bound.signature.parameters.items():
        if name not in bound.arguments:
            guard_fixed(nodes[name], name, parameter.default)
    positional = tuple(args[: len(call.args)])
    kwargs = {name: nodes[name] for name in call.kwargs}
    graph.output(inline(graph, model, "", program, Arguments(positional, kwargs)))
    return TracedModule(model, graph, type(model).__name__)


def _resolve(module: fx.GraphModule, model: nn.Module, defeated: dict[str, str], call: Arguments | None) -> list[Rung]:
    """Second and third rung for every call of a module that defeated symbolic tracing.

    Sizes that the code of one part decides by are fixed for the others of its class, which takes a fraction of the time.
    """
    nodes = {name: [n for n in module.graph.nodes if n.op == "call_module" and n.target == name] for name in defeated}
    recorder = Recorder(module, keep={node for calls in nodes.values() for node in calls})
    if call is not None and recorder.keep:
        recorder.record(call)
    rungs: list[Rung] = []
    decided: dict[type, set[int]] = {}
    for name, reason in defeated.items():
        calls = [(node, Arguments(*recorder.kept[node])) for node in nodes[name] if node in recorder.kept]
        if not calls and nodes[name]:
            rungs.append(Rung(name, "island", join(reason, "without example_inputs torch.export cannot capture it")))
        if not calls:
            continue
        part = module.get_submodule(name)
        try:
            programs = _programs(part, [given for _, given in calls], decided.setdefault(type(part), set()))
        except TraceError as error:
            rungs.append(Rung(name, "island", join(reason, str(error))))
            rungs += _compile_children(part, calls[0][1], prefix=name)
            continue
        for (node, _), (program, _) in zip(calls, programs, strict=True):
            inline_call(module, node, program, prefix=name)
        rungs.append(Rung(name, "exported", join(reason, *dict.fromkeys(fixed for _, fixed in programs))))
    return rungs


def _programs(part: nn.Module, calls: list[Arguments], decided: set[int]) -> list[tuple[torch.export.ExportedProgram, str]]:
    """What ``part`` computes at each of its calls, and what is fixed there: captured anew for every form of arguments."""
    forms = [repr(pytree.tree_map_only(torch.Tensor, lambda leaf: (leaf.shape, leaf.dtype), tuple(call))) for call in calls]
    made = {form: capture(part, call, decided=decided) for form, call in dict(zip(forms, calls, strict=True)).items()}
    return [made[form] for form in forms]


def _compile_children(part: nn.Module, call: Arguments | None, prefix: str = "") -> list[Rung]:
    """Compile what can be compiled below an island, in place; undone as a whole where the island then fails to run."""
    candidates = {name for name, m in part.named_modules() if name and any(True for _ in m.parameters())}
    calls = record_calls(part, call, candidates) if call is not None else None
    children = _Children(prefix, calls)
    children.compile(part)
    if call is not None and children.replaced:
        try:
            record_calls(part, call, set())
        except Exception as error:  # the island's code may need anything of the children it had
            children.put_back()
            return [Rung(prefix, "note", f"compiled children were put back: {first_line(error)}")]
    return children.rungs


class _Children:
    """Compiles the largest modules below an island that one graph can hold.

    ``prefix``  the island's name in the whole model
    ``calls``   how every module below it was called; None without example inputs
    """

    def __init__(self, prefix: str, calls: Mapping[str, tuple[Arguments, Any]] | None) -> None:
        self.prefix, self.calls = prefix, calls
        self.rungs: list[Rung] = []
        self.replaced: list[tuple[nn.Module, str, nn.Module]] = []

    def compile(self, part: nn.Module, path: str = "") -> None:
        """Compile the children of ``part``, which is ``path`` below the island, or else theirs."""
        for name, child in list(part.named_children()):
            inner = f"{path}.{name}" if path else name
            if next(child.parameters(), None) is None or isinstance(child, fx.GraphModule):
                continue
            if self.calls is not None and inner not in self.calls:
                self.compile(child, inner)
                continue
            full = f"{self.prefix}.{inner}" if self.prefix else inner
            call = self.calls[inner][0] if self.calls is not None else None
            hindered = _hindrance(child, call) if call is not None else ""
            compiled, reason = (None, hindered) if hindered else _capture_whole(child, call)
            if compiled is None:
                self.rungs.append(Rung(full, "island", reason))
                self.compile(child, inner)
                continue
            self.rungs += [Rung(f"{full}.{r.module}".rstrip("."), r.rung, r.reason) for r in compiled.meta["rungs"]]
            self.replaced.append((part, name, child))
            setattr(part, name, compiled)

    def put_back(self) -> None:
        """Give every parent the children it had."""
        for parent, name, original in self.replaced:
            setattr(parent, name, original)


CAST = "it is called under autocast, with values of another type than its parameters"
TRANSFORMED = "it is called inside a transform of torch.func, where nobody may look at values"


def _hindrance(module: nn.Module, call: Arguments) -> str:
    """Why a call inside an island cannot be compiled, or an empty string."""
    if any(torch._C._functorch.is_functorch_wrapped_tensor(value) for value in tensors_in(tuple(call))):
        return TRANSFORMED
    return CAST if _is_cast(module, call) else ""


def _is_cast(module: nn.Module, call: Arguments) -> bool:
    """Whether floating-point values that go into ``module`` are in a type that none of its parameters has."""
    own = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    given = {value.dtype for value in tensors_in(tuple(call)) if value.is_floating_point()}
    return bool(own and given) and own.isdisjoint(given)
