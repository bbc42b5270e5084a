"""The graph contract, as a list of named rules.

Each rule looks at a graph module and at what was true before the pass, and yields what is wrong. A new invariant is a new
function in :data:`RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdRef

from fxcompress.errors import VerificationError
from fxcompress.graph import edit, taps
from fxcompress.graph.inputs import Arguments
from fxcompress.graph.module import calls
from fxcompress.graph.recorder import Look, Values
from fxcompress.graph.shapes import is_meta, module_of
from fxcompress.graph.tree import parts, tensors

__all__ = ["RULES", "Content", "Snapshot", "check", "check_metadata", "fingerprint", "look", "run", "snapshot"]


@dataclass(frozen=True)
class Snapshot:
    """What a pass must not change."""

    signature: tuple[tuple[str, Any], ...]
    training: dict[str, bool]
    requires_grad: dict[str, bool]
    shared: tuple[frozenset[str], ...]


def snapshot(module: fx.GraphModule) -> Snapshot:
    """Note what :data:`RULES` compares with."""
    groups: dict[int, set[str]] = {}
    requires: dict[str, bool] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
        requires[name] = parameter.requires_grad
    return Snapshot(
        signature=_signature(module),
        training={name: m.training for name, m in module.named_modules()},
        requires_grad=requires,
        shared=tuple(frozenset(names) for names in groups.values() if len(names) > 1),
    )


def _signature(module: fx.GraphModule) -> tuple[tuple[str, Any], ...]:
    return tuple((str(n.target), n.args) for n in module.graph.nodes if n.op == "placeholder")


def well_formed(module: fx.GraphModule, before: Snapshot) -> Iterator[str]:
    """The graph is acyclic, every argument is defined before use, every target exists."""
    try:
        module.graph.lint()
    except (RuntimeError, ValueError, AttributeError) as error:
        yield str(error)


def no_orphans(module: fx.GraphModule, before: Snapshot) -> Iterator[str]:
    """Every parameter and buffer is reached by a node."""
    for name in edit.orphans(module):
        yield f"nothing uses {name!r}"


def same_signature(module: fx.GraphModule, before: Snapshot) -> Iterator[str]:
    """Inputs keep their names, order and defaults."""
    now = _signature(module)
    if now != before.signature:
        yield f"the inputs were {before.signature} and are {now}"


def same_training_flags(module: fx.GraphModule, before: Snapshot) -> Iterator[str]:
    """Modules that stay keep their training flag."""
    for name, child in module.named_modules():
        if before.training.get(name, child.training) != child.training:
            yield f"{name!r} was training={before.training[name]}"


def same_gradients(module: fx.GraphModule, before: Snapshot) -> Iterator[str]:
    """Parameters that stay keep ``requires_grad``."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if before.requires_grad.get(name, parameter.requires_grad) != parameter.requires_grad:
            yield f"{name!r} was requires_grad={before.requires_grad[name]}"


def same_sharing(module: fx.GraphModule, before: Snapshot) -> Iterator[str]:
    """Names that shared one parameter share one, as far as they are still parameters."""
    now = dict(module.named_parameters(remove_duplicate=False))
    for group in before.shared:
        kept = [name for name in sorted(group) if name in now]
        if len({id(now[name]) for name in kept}) > 1:
            yield f"{', '.join(kept)} were one parameter and are several"


def taps_stay(module: fx.GraphModule, before: Snapshot) -> Iterator[str]:
    """Every value that was tapped still is."""
    found = taps.taps(module)
    for name in module.meta.get("taps", ()):
        if name not in found:
            yield f"the tap {name!r} is gone: the value it named is no longer computed"


Rule = Callable[[fx.GraphModule, Snapshot], Iterator[str]]

RULES: tuple[Rule, ...] = (
    well_formed,
    no_orphans,
    same_signature,
    same_training_flags,
    same_gradients,
    same_sharing,
    taps_stay,
)


def check(module: fx.GraphModule, before: Snapshot | None = None) -> None:
    """Raise VerificationError with every broken rule, or return quietly."""
    before = before if before is not None else snapshot(module)
    broken = [f"{rule.__name__}: {problem}" for rule in RULES for problem in rule(module, before)]
    if broken:
        shown = "\n  ".join(broken[:20])
        raise VerificationError(f"{len(broken)} broken rule(s) of the graph contract:\n  {shown}")


def run(module: fx.GraphModule, call: Arguments) -> Any:
    """The graph's result for ``call``, with every node's metadata held against what was really computed.

    Nodes without metadata get it. Raises VerificationError naming the first node that disagrees.
    """
    return look(module, call).result


def look(module: fx.GraphModule, call: Arguments, wanted: Iterable[str] = ()) -> Look:
    """What :func:`run` finds, and the values of the nodes named ``wanted``."""
    recorder = Values(module, wanted)
    result = recorder.record(call)
    check_metadata(recorder.found)
    return Look(result, recorder.values)


class Content(NamedTuple):
    """What a result depends on: the code, the tensors and how often each was written, the layers."""

    calls: list[Any]
    held: list[Any]
    layers: list[Any]


def fingerprint(module: fx.GraphModule, *, through: bool = False) -> Content:
    """The content of a graph module, equal while it computes the same.

    Tensors and layers are told by references: another one may come to lie at the address of one that is gone.
    ``through``: what reads a layer that only watches (its ``passes_on()`` is true) counts as reading what that one reads.
    """
    watching = _watching(module.graph) if through else {}
    called = {str(node.target) for node in module.graph.find_nodes(op="call_module") if node not in watching}
    layers = [(name, part) for name, part in parts(module).items() if edit.reached(name, called)]
    return Content(
        _calls_through(watching, module.graph) if watching else calls(module.graph),
        [(name, WeakIdRef(tensor), _writes(tensor)) for name, tensor, _ in tensors(module)],
        [(name, WeakIdRef(part), part.training, vars(part).get("activation")) for name, part in layers],
    )


def _watching(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Calls of layers that hand on the very tensor they are given, and what that is."""
    found: dict[fx.Node, fx.Node] = {}
    for node in graph.find_nodes(op="call_module"):
        passes_on = getattr(module_of(node), "passes_on", None)
        if passes_on is not None and passes_on():
            source = node.all_input_nodes[0]
            found[node] = found.get(source, source)
    return found


def _calls_through(watching: dict[fx.Node, fx.Node], graph: fx.Graph) -> list[Any]:
    """What the code says where the calls in ``watching`` are left out."""

    def behind(value: Any) -> Any:
        return fx.map_arg(value, lambda node: watching.get(node, node))

    left = [node for node in graph.nodes if node not in watching]
    return [(node.op, node.name, node.target, behind(node.args), behind(node.kwargs)) for node in left]


def _writes(tensor: Tensor) -> int:
    """How often a tensor was written; nobody counts that of one made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def check_metadata(found: dict[fx.Node, Any]) -> None:
    """Hold the metadata of a real run against the nodes'."""
    for node, real in found.items():
        stated = node.meta.get("tensor_meta")
        if stated is None:
            node.meta["tensor_meta"] = real
            continue
        for a, b in zip(_leaves(stated), _leaves(real), strict=False):
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                raise VerificationError(
                    f"metadata of {node.name!r} says {tuple(a.shape)} {a.dtype}, "
                    f"a real run gives {tuple(b.shape)} {b.dtype}."
                )


def _leaves(meta: Any) -> list[Any]:
    return [leaf for leaf in pytree.tree_leaves(meta, is_leaf=is_meta) if is_meta(leaf)]
