"""Copies of a model whose parameters use the model's memory until somebody may write to it.

A pass that replaces parameters and never writes to one needs no copy of those it replaces. So a model is copied with
*borrowed* parameters: objects of their own on the lender's memory. Before anything that may write, :func:`own` gives every
one that is still borrowed memory of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fxcompress.graph.tree import tensors

__all__ = ["alone", "borrowed", "own"]


def alone(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers that share their memory with no other."""
    held = [(tensor, _memory(tensor)) for _, tensor, _ in tensors(module)]
    uses = Counter(place for _, place in held)
    return [tensor for tensor, place in held if place is not None and uses[place] == 1 and not tensor.is_inference()]


def borrowed(lent: Iterable[Tensor]) -> dict[int, nn.Parameter]:
    """id of a parameter → another one on the same memory; a memo for :func:`copy.deepcopy`.

    Version counters, gradients and flags are apart. What is of a class of its own is not lent.
    """
    return {id(p): nn.Parameter(p.data, p.requires_grad) for p in lent if type(p) is nn.Parameter}


def own(module: nn.Module, lender: nn.Module) -> None:
    """Give every parameter of ``module`` that uses memory of ``lender`` its own; whoever holds the parameter sees it too."""
    lent = {_memory(p) for _, p, learned in tensors(lender) if learned} - {None}
    for _, parameter, learned in tensors(module):
        if learned and _memory(parameter) in lent:
            parameter.data = parameter.data.clone(memory_format=torch.preserve_format)


def _memory(tensor: Tensor) -> int | None:
    """What tells the memory of a plain tensor from any other."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None
