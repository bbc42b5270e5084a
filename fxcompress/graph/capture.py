"""The second rung: capture a module with ``torch.export`` and inline its ATen graph where the module was called.

Parameters and buffers keep their qualified names; sizes stay symbolic where ``torch.export`` allows it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.errors import TraceError
from fxcompress.graph.containers import containers
from fxcompress.graph.decisions import DECIDED_SIZES
from fxcompress.graph.guards import guard
from fxcompress.graph.inputs import Arguments, autocast_refused, bind, frozen_state, preserved_attributes
from fxcompress.graph.quiet import quiet
from fxcompress.graph.rungs import join

__all__ = ["capture", "inline"]


def capture(
    module: nn.Module,
    call: Arguments,
    *,
    constants: frozenset[int] = frozenset(),
    sizes: bool = True,
    decided: set[int] | None = None,
) -> tuple[torch.export.ExportedProgram, str]:
    """The exported program of ``module``, and what was fixed to get it (an empty string where every size is free).

    ``constants`` are the ids of argument tensors that are parameters and keep their sizes; without ``sizes`` only the batch
    is left free, which is much cheaper where code computes with sizes. ``decided`` are dimensions that code of this kind is
    known to decide by: they are fixed, and those found here are added. Raises TraceError with the reason where
    ``torch.export`` refuses too.
    """
    doubled = _doubled_batch(call, constants)
    batch_only = "only the batch size may vary"
    known = f"fixed to its sizes, by which such code decides: dimensions {sorted(decided)}" if decided else ""
    attempts: list[tuple[Arguments, Callable[[Any], Any], str]]
    attempts = [(doubled, partial(_all_dimensions, but=frozenset(decided or ())), known)] if sizes else []
    attempts += [(doubled, _first_dimension, batch_only), (call, _no_dimension, "all sizes are fixed")]
    failure: Exception | None = None
    for attempt, free, fixed in attempts:
        kept = {id(new) for new, old in zip(_tensors(attempt), _tensors(call), strict=True) if id(old) in constants}

        def asked(leaf: Any, free: Any = free, kept: set[int] = kept) -> Any:
            return None if id(leaf) in kept else free(leaf)

        try:
            shapes = {name: pytree.tree_map(asked, value) for name, value in bind(module, attempt).arguments.items()}
            with quiet(), frozen_state(module), preserved_attributes(module), autocast_refused():
                program = torch.export.export(module, attempt.args, attempt.kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:  # whatever torch.export raises means the same: this rung does not hold
            failure = failure or error
            continue
        if program.graph_signature.buffers_to_mutate:
            raise TraceError("it updates buffers while running")
        limits, dims = _limits(program, module, attempt, asked)
        if decided is not None:
            decided |= dims - {0}
        return _without_transforms(program), join(fixed, limits)
    raise TraceError(f"torch.export refused it: {_first_line(failure)}") from failure


def _limits(
    program: torch.export.ExportedProgram, module: nn.Module, call: Arguments, free: Callable[[Any], Any]
) -> tuple[str, set[int]]:
    """The sizes that ``module`` takes and ``program`` may not, because its code decides by them, in words and as dimensions.

    ``free`` gives the dimensions of an argument that were to be left free. Sizes that are one symbol vary together, as do
    fixed ones of the same dimension; each is asked with one more.
    """
    guards = getattr(program.module(), "_guards_fn", None)
    spec = program.call_spec.in_spec
    leaves = _spread(fx.Graph(), tuple(call), spec)
    known = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    names = [item.arg.name for item in program.graph_signature.input_specs if item.kind.name == "USER_INPUT"]
    together: dict[Any, list[tuple[int, int]]] = {}
    for place, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        for dim in free(leaf) or ():
            size = known[name].shape[dim]
            together.setdefault((dim, size) if isinstance(size, int) else str(size), []).append((place, dim))
    limited = []
    for places in together.values():
        other = _one_more(leaves, places)
        if guards is not None and not _runs(guards, *other):
            args, kwargs = pytree.tree_unflatten(other, spec)
            with frozen_state(module), preserved_attributes(module):
                limited += places if _runs(module, *args, **kwargs) else []
    described = ", ".join(f"dimension {dim} of {names[place]}" for place, dim in sorted(limited))
    return DECIDED_SIZES.format(described) if described else "", {dim for _, dim in limited}


def _one_more(leaves: list[Any], places: list[tuple[int, int]]) -> list[Any]:
    """Zeros in the place of tensors that have one entry more along the dimensions (number of the leaf, dimension)."""
    shapes = {place: list(leaves[place].shape) for place, _ in places}
    for place, dim in places:
        shapes[place][dim] += 1
    return [leaf.new_zeros(shapes[place]) if place in shapes else leaf for place, leaf in enumerate(leaves)]


def _runs(function: Any, *args: Any, **kwargs: Any) -> bool:
    try:
        with torch.no_grad():
            function(*args, **kwargs)
    except Exception:  # whatever it says: it does not take these
        return False
    return True


def _without_transforms(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """``program`` with what ``torch.vmap`` and its relatives do written out; TraceError where that cannot be."""
    if not any(_transforms(node) for node in program.graph.nodes):
        return program
    try:
        with quiet():
            plain: torch.export.ExportedProgram = program.run_decompositions({})
    except Exception as error:  # whatever torch raises means the same: this rung does not hold
        raise TraceError("its code transforms functions (torch.func), which a graph does not hold") from error
    if any(_transforms(node) for node in plain.graph.nodes):
        raise TraceError("its code transforms functions (torch.func), which a graph does not hold")
    return plain


def _transforms(node: fx.Node) -> bool:
    return "_functorch" in str(getattr(node.target, "__module__", ""))


def _all_dimensions(leaf: Any, but: frozenset[int]) -> Any:
    return (
        {dim: torch.export.Dim.AUTO for dim in range(leaf.dim()) if dim not in but}
        if isinstance(leaf, torch.Tensor)
        else None
    )


def _first_dimension(leaf: Any) -> Any:
    return {0: torch.export.Dim.AUTO} if isinstance(leaf, torch.Tensor) and leaf.dim() else None


def _no_dimension(leaf: Any) -> Any:
    return None


def _tensors(call: Arguments) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tuple(call)) if isinstance(leaf, torch.Tensor)]


def _doubled_batch(call: Arguments, constants: frozenset[int]) -> Arguments:
    """The call with leading dimensions of size one doubled: torch.export takes a size of one for a constant."""
    leaves = [leaf for leaf in _tensors(call) if id(leaf) not in constants]
    if not leaves or any(leaf.dim() == 0 or leaf.shape[0] != 1 for leaf in leaves):
        return call

    def double(leaf: torch.Tensor) -> torch.Tensor:
        return leaf if id(leaf) in constants else torch.cat([leaf, leaf])

    return Arguments(*pytree.tree_map_only(torch.Tensor, double, tuple(call)))


def _first_line(error: Exception | None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


def inline(graph: fx.Graph, root: nn.Module, prefix: str, program: torch.export.ExportedProgram, call: Arguments) -> Any:
    """Copy ``program`` into ``graph`` at its insertion point; returns its result as a structure of nodes.

    ``call`` holds the nodes (or literals) the module was called with; ``prefix`` is the module's qualified name, under
    which its tensors live in ``root``. What the program was captured for is guarded.
    """
    owner = root.get_submodule(prefix) if prefix else root
    values = _bind_tensors(graph, owner, prefix, program)
    given = {spec.arg.name: spec.arg for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"}
    leaves = _spread(graph, tuple(call), program.call_spec.in_spec)
    by_name = dict(zip(given, leaves, strict=True))
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in by_name:
                values[node] = leaf = by_name[node.name]
                if isinstance(leaf, fx.Node):
                    guard(leaf, node.name, getattr(given[node.name], "value", node.meta["val"]))
        elif node.op == "output":
            results = [values.get(leaf, leaf) if isinstance(leaf, fx.Node) else leaf for leaf in node.args[0]]
            return containers(graph, pytree.tree_unflatten(results, program.call_spec.out_spec))
        elif not _is_assertion(node):
            values[node] = _copy(graph, node, values, prefix)
    raise TraceError("the exported graph has no output")


def _is_assertion(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", str(node.target))
    return not node.users and ("_assert" in name or "sym_constrain" in name)


def _copy(graph: fx.Graph, node: fx.Node, values: dict[fx.Node, Any], prefix: str) -> fx.Node:
    for needed in node.all_input_nodes:
        if needed not in values:
            raise TraceError(f"the exported graph uses {needed.name!r} before it is computed")
    args = fx.node.map_arg(node.args, values.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
    copied = graph.create_node(node.op, node.target, args, kwargs, name=node.name)
    stack = node.meta.get("nn_module_stack") or {}
    copied.meta["nn_module_stack"] = {key: (_qualified(prefix, name), kind) for key, (name, kind) in stack.items()}
    copied.meta["stack_trace"] = node.meta.get("stack_trace")
    return copied


def _qualified(prefix: str, name: str) -> str:
    """A module's name in the whole model, from torch.export's name for it (``L['self'].a.b``)."""
    inner = str(name).removeprefix("L['self']").strip(".")
    return ".".join(part for part in (prefix, inner) if part)


def _bind_tensors(
    graph: fx.Graph, owner: nn.Module, prefix: str, program: torch.export.ExportedProgram
) -> dict[fx.Node, Any]:
    """Placeholders of lifted parameters, buffers and constants become get_attr nodes under their own names."""
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    values: dict[fx.Node, Any] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind.name == "USER_INPUT":
            continue
        name = str(spec.target)
        if spec.kind.name == "CONSTANT_TENSOR":
            name = _add_constant(owner, name, program.constants[name])
        placeholder = placeholders[spec.arg.name]
        if placeholder.users:
            values[placeholder] = graph.get_attr(f"{prefix}.{name}" if prefix else name)
    return values


def _add_constant(owner: nn.Module, name: str, value: torch.Tensor) -> str:
    name = name.replace(".", "_")
    while hasattr(owner, name):
        name += "_"
    owner.register_buffer(name, value.detach().clone(), persistent=True)
    return name


def _spread(graph: fx.Graph, value: Any, spec: pytree.TreeSpec) -> list[Any]:
    """The leaves of ``value`` as ``spec`` counts them; a node that stands for a container is taken apart by getitem."""
    if spec.is_leaf():
        return [value]
    children = spec.children() if callable(getattr(spec, "children", None)) else spec.children_specs
    if isinstance(value, fx.Node):
        keys = spec.context if spec.type in (dict,) else range(len(children))
        parts = [graph.call_function(operator.getitem, (value, key)) for key in keys]
    else:
        parts = [value[key] for key in spec.context] if spec.type is dict else list(value)
    return [leaf for part, child in zip(parts, children, strict=True) for leaf in _spread(graph, part, child)]
