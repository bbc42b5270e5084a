"""The verbs passes edit a graph with. Each leaves the graph well-formed; :func:`finish` sweeps up once per pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, fx, nn

from fxcompress.graph import ops
from fxcompress.graph.island import TOP
from fxcompress.graph.module import TracedModule

__all__ = [
    "add_module",
    "ancestors",
    "bypass",
    "copy_into",
    "ensure",
    "finish",
    "get_tensor",
    "insert_after",
    "insert_before",
    "insert_layer",
    "is_stored",
    "orphans",
    "reached",
    "readers",
    "replace",
    "set_argument",
    "set_bias",
    "set_tensor",
    "tied",
]


def _split(name: str) -> tuple[str, str]:
    prefix, _, leaf = name.rpartition(".")
    return prefix, leaf


def get_tensor(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer called ``name``."""
    prefix, leaf = _split(name)
    value = getattr(module.get_submodule(prefix), leaf)
    assert isinstance(value, Tensor)
    return value


def is_stored(module: nn.Module, name: str) -> bool:
    """Whether ``name`` is a parameter or buffer itself, not computed from others (by a mask, a parametrization)."""
    prefix, leaf = _split(name)
    owner = module.get_submodule(prefix)
    return leaf in owner._parameters or leaf in owner._buffers


def set_tensor(module: nn.Module, name: str, value: Tensor, *, buffer: bool = False) -> None:
    """Put ``value`` under ``name``: a parameter that keeps its ``requires_grad``, or a buffer.

    The old tensor is replaced, never written to, so that whoever shares it keeps its values.
    """
    prefix, leaf = _split(name)
    owner = ensure(module, prefix)
    old = owner._parameters.pop(leaf, None)
    owner._buffers.pop(leaf, None)
    if old is None and leaf in owner.__dict__:
        del owner.__dict__[leaf]
    if buffer:
        owner.register_buffer(leaf, value.detach())
    else:
        wants = value.is_floating_point() and (old.requires_grad if old is not None else True)
        owner.register_parameter(leaf, nn.Parameter(value.detach(), requires_grad=wants))


def ensure(module: nn.Module, prefix: str) -> nn.Module:
    """The submodule ``prefix``, empty modules made on the way where there are none."""
    for part in prefix.split(".") if prefix else ():
        if part not in module._modules:
            module.add_module(part, nn.Module().train(module.training))
        child = module._modules[part]
        assert child is not None
        module = child
    return module


def add_module(module: nn.Module, name: str, child: nn.Module) -> str:
    """Register ``child`` under ``name``, or under the next free ``name_1``, ``name_2``; returns the name taken."""
    prefix, leaf = _split(name)
    owner = ensure(module, prefix)
    free, count = leaf, 0
    while free in owner._modules or hasattr(owner, free):
        count += 1
        free = f"{leaf}_{count}"
    owner.add_module(free, child.train(owner.training))
    return f"{prefix}.{free}" if prefix else free


def readers(module: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """Which nodes read each tensor: qualified name → nodes, in graph order (a shared tensor under its first name)."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    aliases = {name: first.setdefault(id(tensor), name) for name, tensor in tensors}
    owned: dict[str, list[str]] = {}
    for name, canonical in aliases.items():
        owned.setdefault(_split(name)[0], []).append(canonical)
    found: dict[str, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if node.op == "call_module":
            for name in owned.get(str(node.target), ()):
                found.setdefault(name, []).append(node)
        elif node.op == "get_attr":
            reading = [r for user in node.users for r in (user.users if user.meta.get("observer") else (user,))]
            found.setdefault(aliases.get(str(node.target), str(node.target)), []).extend(reading)
    return {name: found.get(canonical, []) for name, canonical in aliases.items()}


def tied(module: nn.Module) -> set[int]:
    """The ids of parameters that several modules own, so that changing one changes the others."""
    owners: dict[int, int] = {}
    for part in module.modules():
        for parameter in part._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + (parameter is not None)
    return {key for key, count in owners.items() if count > 1}


def insert_after(node: fx.Node, target: Callable[..., Any] | str, args: tuple[Any, ...], **kwargs: Any) -> fx.Node:
    """A call of ``target`` (a function, or a module's name) right after ``node``; its origin is ``node``'s."""
    with node.graph.inserting_after(node):
        return _inherit(_create(node.graph, target, args, kwargs), node)


def insert_before(node: fx.Node, target: Callable[..., Any] | str, args: tuple[Any, ...], **kwargs: Any) -> fx.Node:
    """A call of ``target`` right before ``node``; its origin is ``node``'s."""
    with node.graph.inserting_before(node):
        return _inherit(_create(node.graph, target, args, kwargs), node)


def insert_layer(node: fx.Node, name: str, layer: nn.Module, args: tuple[Any, ...], **kwargs: Any) -> fx.Node:
    """A call of a new layer right before ``node``, called ``name`` inside the module that ``node`` belongs to.

    It is in the mode of that module.
    """
    module = node.graph.owning_module
    assert module is not None
    owner = ops.owner_name(node)
    return insert_before(node, add_module(module, f"{owner}.{name}".lstrip("."), layer), args, **kwargs)


def _create(graph: fx.Graph, target: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    if isinstance(target, str):
        return graph.call_module(target, args, kwargs)
    return graph.call_function(target, args, kwargs)


def _inherit(node: fx.Node, source: fx.Node) -> fx.Node:
    for key in ("nn_module_stack", "stack_trace"):
        if key in source.meta:
            node.meta[key] = source.meta[key]
    return node


def replace(node: fx.Node, by: fx.Node) -> None:
    """Give every user of ``node`` (a tap on it too) the value of ``by`` and erase ``node``."""
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def bypass(node: fx.Node) -> None:
    """Take out a node that passes its first input through."""
    replace(node, node.all_input_nodes[0])


def ancestors(node: fx.Node) -> set[fx.Node]:
    """``node`` and everything it is computed from."""
    seen, queue = {node}, [node]
    while queue:
        for source in queue.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                queue.append(source)
    return seen


def copy_into(graph: fx.Graph, node: fx.Node, values: dict[fx.Node, fx.Node]) -> fx.Node:
    """``node`` in another graph, with whatever leads to it that ``values`` (old node → new) does not hold yet."""
    if node not in values:
        for source in node.all_input_nodes:
            copy_into(graph, source, values)
        values[node] = graph.node_copy(node, lambda old: values[old])
    return values[node]


def finish(module: fx.GraphModule) -> None:
    """Drop what nothing uses (fetched tensors, parameters, buffers, modules) and let the code follow."""
    for node in reversed(module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    if TOP not in module._modules:
        _drop_orphans(module, _targets(module.graph.nodes))
    if isinstance(module, TracedModule):
        module.outdate()
    else:
        module.recompile()


def _targets(nodes: Iterable[fx.Node]) -> set[str]:
    return {str(node.target) for node in nodes if node.op in ("call_module", "get_attr")}


def orphans(module: fx.GraphModule) -> list[str]:
    """Parameters and buffers that no node reaches."""
    if TOP in module._modules:
        return []
    used = _targets(module.graph.nodes)
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in module.named_buffers(remove_duplicate=False)]
    return [name for name in names if not reached(name, used)]


def reached(name: str, used: set[str]) -> bool:
    """Whether ``used`` names a part or tensor called ``name``, or what it belongs to."""
    while name:
        if name in used:
            return True
        name = _split(name)[0]
    return False


def _drop_orphans(module: nn.Module, used: set[str], prefix: str = "") -> bool:
    """Remove what is not reached below ``module``; returns whether anything is left.

    A layer keeps the name of a tensor that is gone, with None behind it, as of a bias it never had: it prints itself by it.
    """
    for kept in (module._parameters, module._buffers):
        for leaf in [leaf for leaf in kept if prefix + leaf not in used]:
            kept[leaf] = None
            if isinstance(module, fx.GraphModule) or type(module) is nn.Module:
                del kept[leaf]
    for leaf, child in list(module._modules.items()):
        name = prefix + leaf
        if child is None or (name not in used and not _drop_orphans(child, used, name + ".")):
            del module._modules[leaf]
    held = (*module._parameters.values(), *module._buffers.values(), *module._modules.values())
    return any(value is not None for value in held)


def set_bias(module: fx.GraphModule, call: ops.Call, bias: Tensor) -> None:
    """Give a weighted call this bias: in the tensor it reads now, or in a new one where it had none."""
    if isinstance(call["bias"], ops.Attr):
        set_tensor(module, call["bias"].name, bias)
    elif call.node.op == "call_module":
        set_tensor(module, f"{call.node.target}.bias", bias)
    else:
        name = f"{call.node.name}_bias"
        set_tensor(module, name, bias)
        with module.graph.inserting_before(call.node):
            set_argument(call.node, "bias", module.graph.get_attr(name))


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Change one argument of a function call by its canonical name."""
    position = ops.argument_order(node).index(name)
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)
