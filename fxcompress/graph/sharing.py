"""Copies of a model whose parameters use the model's memory until somebody may write to it.

A pass that replaces parameters and never writes to one needs no copy of those it replaces. So a model is copied with
*borrowed* parameters: objects of their own on the lender's memory. Before anything that may write, :func:`own` gives every
one that is still borrowed memory of its own.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from fxcompress.graph.tree import tensors

__all__ = ["borrowed", "own"]


def borrowed(lender: nn.Module) -> dict[int, nn.Parameter]:
    """id of a parameter → another one on the same memory; a memo for :func:`copy.deepcopy`.

    Version counters, gradients and flags are apart. What shares its memory with another parameter, or is of a class of its
    own, is not lent.
    """
    held = [(p, _memory(p)) for _, p, learned in tensors(lender) if learned]
    uses = Counter(place for _, place in held)
    return {
        id(p): nn.Parameter(p.data, p.requires_grad)
        for p, place in held
        if place is not None and uses[place] == 1 and type(p) is nn.Parameter and not p.is_inference()
    }


def own(module: nn.Module, lender: nn.Module) -> None:
    """Give every parameter of ``module`` that uses memory of ``lender`` its own; whoever holds the parameter sees it too."""
    lent = {_memory(p) for _, p, learned in tensors(lender) if learned} - {None}
    for _, parameter, learned in tensors(module):
        if learned and _memory(parameter) in lent:
            parameter.data = parameter.data.clone(memory_format=torch.preserve_format)


def _memory(tensor: torch.Tensor) -> int | None:
    """What tells the memory of a plain tensor from any other."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None
