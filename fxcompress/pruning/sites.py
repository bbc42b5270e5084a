"""Where a mask goes: one weight, with all that reads it.

A mask is ``where(mask, weight, 0)`` between a weight and what reads it, so that the dense weight stays learnable underneath
and no optimizer step brings a masked weight back. On a layer it is a parametrization; on a weight that a graph fetches for
a function (``F.linear(x, self.w)``) it is a node of the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from fxcompress.graph import edit

__all__ = ["Mask", "Site", "below_masks"]


class Mask(nn.Module):
    """``where(mask, weight, 0)``; ``mask`` is a boolean buffer of the weight's shape, True stays."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, 0)


@dataclass(frozen=True, eq=False)
class Site:
    """One weight: ``owners`` are the modules that hold it, ``fetches`` the graphs that fetch it by name for a function.

    A tied weight is one site with several owners, and its mask goes on all of them. ``input_dim`` is the dimension that
    runs over inputs, ``groups`` how many blocks of inputs follow one another along it.
    """

    name: str
    input_dim: int
    groups: int
    owners: tuple[tuple[nn.Module, str], ...]
    fetches: tuple[tuple[fx.GraphModule, str], ...]

    def dense(self) -> Tensor:
        """The weight below the mask."""
        if not self.owners:
            return edit.get_tensor(*self.fetches[0])
        module, leaf = self.owners[0]
        if not parametrize.is_parametrized(module, leaf):
            value: Tensor = getattr(module, leaf)
            return value
        held = _list(module, leaf)
        parts = iter(held)
        if held.is_tensor:
            value = held.original
        else:
            value = next(parts)(*(getattr(held, f"original{index}") for index in range(held.ntensors)))
        for part in parts:
            value = value if isinstance(part, Mask) else part(value)
        return value

    def masks(self) -> list[Mask]:
        """The masks on the weight: one for each reader that has one."""
        found = [part for module, leaf in self.owners for part in _parts(module, leaf) if isinstance(part, Mask)]
        return found + [mask for graph, target in self.fetches for _, mask in _mask_nodes(graph, target)]

    def value(self) -> Tensor:
        """The weight that is computed with."""
        masks = self.masks()
        return masks[0].forward(self.dense()) if masks else self.dense()

    def set_mask(self, mask: Tensor) -> None:
        """Put ``mask`` on the weight wherever it is read, in the place of one it has."""
        present = self.masks()
        for held in present:
            held.mask.copy_(mask)
        shared = present[0] if present else Mask(torch.empty_like(self.dense(), dtype=torch.bool).copy_(mask))
        for module, leaf in self.owners:
            if not any(isinstance(part, Mask) for part in _parts(module, leaf)):
                _put_on(module, leaf, shared)
        for graph, target in self.fetches:
            if not any(True for _ in _mask_nodes(graph, target)):
                _insert(graph, target, shared)

    def bake(self) -> None:
        """Multiply the mask into the weight, and take it off everywhere."""
        for module, leaf in self.owners:
            if any(isinstance(part, Mask) for part in _parts(module, leaf)):
                _take_off(module, leaf)
        for graph, target in self.fetches:
            for node, mask in list(_mask_nodes(graph, target)):
                tensor = edit.get_tensor(graph, target)
                with torch.no_grad():
                    tensor.copy_(mask(tensor))
                edit.bypass(node)
            edit.finish(graph)


def _put_on(module: nn.Module, leaf: str, mask: Mask) -> None:
    """Parametrize a weight and keep its Parameter as it is: torch would renew its place in autograd, which DDP watches."""
    weight = module._parameters.get(leaf)
    if weight is not None:
        module._parameters[leaf] = _stand_in(weight)
    parametrize.register_parametrization(module, leaf, mask, unsafe=True)  # a mask keeps shape and dtype
    module.get_submodule("parametrizations").train(module.training)
    if weight is not None:
        _list(module, leaf)._parameters["original"] = weight


def _take_off(module: nn.Module, leaf: str) -> None:
    """Write the masked weight into its Parameter and end the parametrization; the layer's parameters keep their order."""
    held = _list(module, leaf)
    cls = type(module)  # torch takes the property off the class, which copies of the layer share
    module.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
    weight = held._parameters.get("original")
    if weight is not None:
        with torch.no_grad():
            weight.copy_(getattr(module, leaf))
        held._parameters["original"] = _stand_in(weight)
    parametrize.remove_parametrizations(module, leaf, leave_parametrized=True)
    present = module._parameters.pop(leaf)
    module._parameters = {leaf: present if weight is None else weight, **module._parameters}


def _stand_in(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)


def _list(module: nn.Module, leaf: str) -> Any:
    holder: Any = module.parametrizations
    return holder[leaf]


def _parts(module: nn.Module, leaf: str) -> list[nn.Module]:
    return list(_list(module, leaf)) if parametrize.is_parametrized(module, leaf) else []


def _fetching(graph: fx.GraphModule, target: str) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "get_attr" and node.target == target]


def _mask_nodes(graph: fx.GraphModule, target: str) -> Iterator[tuple[fx.Node, Mask]]:
    for fetch in _fetching(graph, target):
        for user in fetch.users:
            module = graph.get_submodule(str(user.target)) if user.op == "call_module" else None
            if isinstance(module, Mask):
                yield user, module


def _insert(graph: fx.GraphModule, target: str, mask: Mask) -> None:
    name = edit.add_module(graph, f"{target}_mask", mask)
    for fetch in _fetching(graph, target):
        node = edit.insert_after(fetch, name, (fetch,))
        node.meta.update({key: value for key, value in fetch.meta.items() if key == "tensor_meta"})
        for user in [user for user in fetch.users if user is not node]:
            user.replace_input_with(fetch, node)
    graph.recompile()


def below_masks(module: nn.Module, leaf: str) -> Tensor | nn.Module | None:
    """What makes a weight itself: its Parameter, below masks, or the parametrization that computes it from several."""
    if parametrize.is_parametrized(module, leaf):
        parts = _list(module, leaf)
        return parts.original if parts.is_tensor else parts
    return module._parameters.get(leaf)
