"""Weights that are computed from others become plain: those a layer computes, and those the graph computes for a layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from fxcompress.graph import edit, inplace, ops
from fxcompress.graph.hooks import computes_a_weight
from fxcompress.graph.shapes import describe
from fxcompress.graph.tree import parts

__all__ = ["computed", "constants", "fold_computed", "settle"]


def settle(model: nn.Module, keep: type[nn.Module] | tuple[()] = (), *, pruned: bool = True) -> Iterator[tuple[str, str]]:
    """Turn the computed weights of layers into plain ones, in place; yields (layer, what was done).

    Parametrizations all of whose parts are of the class ``keep`` stay; so do masks of ``torch.nn.utils.prune`` unless
    ``pruned``.
    """
    for name, module in parts(model).items():
        for leaf in _parametrized(module, keep):
            parametrize.remove_parametrizations(_own_class(module), leaf, leave_parametrized=True)
            yield name, f"the parametrization of its {leaf} is now part of the {leaf}"
        for hook in [h for h in module._forward_pre_hooks.values() if computes_a_weight(h)]:
            if pruned or not isinstance(hook, torch_prune.BasePruningMethod):
                _remove(module, hook)
                yield name, f"{type(hook).__name__} is now part of the weight"


def _parametrized(module: nn.Module, keep: type[nn.Module] | tuple[()]) -> list[str]:
    if not parametrize.is_parametrized(module):
        return []
    parts: Any = module.parametrizations
    return [leaf for leaf, chain in list(parts.items()) if not all(isinstance(part, keep) for part in chain)]


def _own_class(module: nn.Module) -> nn.Module:
    """Copies of a layer share the class that holds the parametrized property; give this one a class of its own."""
    cls = type(module)
    module.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
    return module


def _remove(module: nn.Module, hook: Any) -> None:
    if isinstance(hook, torch_prune.BasePruningMethod):
        torch_prune.remove(module, hook._tensor_name)
    elif type(hook).__name__ == "WeightNorm":
        nn.utils.remove_weight_norm(module, hook.name)
    else:
        nn.utils.remove_spectral_norm(module, hook.name)


def fold_computed(module: fx.GraphModule, *, shared: bool = True) -> Iterator[tuple[fx.Node, str]]:
    """Compute once the weights and biases that the graph computes from tensors alone, in place; yields what was done.

    Standardized weights, joined biases, scaled and transposed weights: whatever no input reaches. The result keeps the name
    of the tensor it was made from, where nothing else reads that and the elements stay in order; without ``shared``, what it
    was made from must not be read anywhere else.
    """
    known = constants(module)
    for node in list(module.graph.nodes):
        call = ops.read(node) if node.op == "call_function" else None
        if call is None or call.op.family != "contraction":
            continue
        for argument in ("weight", "bias"):
            value = call[argument]
            if isinstance(value, fx.Node) and value in known:
                cone = _cone(value)
                sources = list(dict.fromkeys(str(n.target) for n in cone if n.op == "get_attr"))
                own = _read_alone(module, sources, cone)
                if len(own) < len(sources) and not shared:
                    continue
                own = [] if any(ops.kind(source) in _TURNING for source in cone) else own
                _store(module, value, _name(module, value, own, f"{node.name}_{argument}"))
                yield node, f"its {argument} is now computed once, from {', '.join(sources)}"


def constants(module: fx.GraphModule) -> set[fx.Node]:
    """Nodes whose values depend on parameters and buffers alone."""
    found: set[fx.Node] = set()
    written = inplace.overwritten(module)
    for node in module.graph.nodes:
        if node.op == "get_attr" or (
            node not in written and _is_function(node) and all(source in found for source in node.all_input_nodes)
        ):
            found.add(node)
    return found


_TURNING = ("t", "transpose", "permute", "movedim")
"""Kinds that put elements in another order, in which a checkpoint does not have them."""

_RANDOM = ("dropout", "rand", "randn", "bernoulli")


def _is_function(node: fx.Node) -> bool:
    """Whether a node gives the same for the same inputs, and does nothing else."""
    if node.op not in ("call_function", "call_method") or not node.all_input_nodes or inplace.is_impure(node):
        return False
    call = ops.read(node)
    if call is None or call.kind in _RANDOM:
        return False
    return call.kind not in ("batch_norm", "instance_norm") or call["running_mean"] is None


def _cone(value: fx.Node) -> list[fx.Node]:
    """A node and what it is computed from, in graph order."""
    found = edit.ancestors(value)
    return [node for node in value.graph.nodes if node in found]


def _read_alone(module: fx.GraphModule, sources: list[str], cone: list[fx.Node]) -> list[str]:
    """The tensors among ``sources`` that serve the last node of ``cone`` and nothing else."""
    readers, tied, within = edit.readers(module), edit.tied(module), set(cone)
    if any(user not in within for node in cone[:-1] for user in node.users):
        return []
    alone = [name for name in sources if all(reader in within for reader in readers.get(name, ()))]
    return [name for name in alone if id(edit.get_tensor(module, name)) not in tied]


def _name(module: fx.GraphModule, value: fx.Node, own: list[str], fresh: str) -> str:
    """The name of the parameter that ``value`` is made from, if it is of its size and read for nothing else."""
    size, parameters = computed(module, value).numel(), dict(module.named_parameters(remove_duplicate=False))
    for name in own:
        if name in parameters and parameters[name].numel() == size:
            return name
    while hasattr(module, fresh):
        fresh += "_"
    return fresh


def computed(module: fx.GraphModule, node: fx.Node) -> Any:
    """The value of a node that depends on parameters and buffers alone."""
    if node.op == "get_attr":
        return edit.get_tensor(module, str(node.target))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: computed(module, source))
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _store(module: fx.GraphModule, value: fx.Node, name: str) -> None:
    """Put a parameter with what ``value`` computes in its place."""
    with torch.no_grad():
        found: Tensor = computed(module, value).detach().clone()
    learned = [
        n for n in _cone(value) if n.op == "get_attr" and isinstance(edit.get_tensor(module, str(n.target)), nn.Parameter)
    ]
    edit.set_tensor(module, name, found, buffer=not learned)
    with module.graph.inserting_before(value):
        fetched = module.graph.get_attr(name)
    fetched.meta["tensor_meta"] = describe(edit.get_tensor(module, name))
    edit.replace(value, fetched)
    for node in reversed(list(module.graph.nodes)):
        if not node.users and not inplace.is_impure(node) and node.op != "get_attr":
            module.graph.erase_node(node)
