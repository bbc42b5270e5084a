"""One word for tensors: equal where their names, shapes, types and bytes are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["digest", "state_of"]


def digest(tensors: Iterable[tuple[str, Tensor]], *words: object) -> str:
    """A digest of named tensors, and of whatever else is to be told apart; meta tensors have no bytes."""
    made = hashlib.blake2b(digest_size=16)
    for word in words:
        made.update(f"{word}\n".encode())
    for name, tensor in tensors:
        made.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if not tensor.is_meta:
            made.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return made.hexdigest()


def state_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter and buffer by name, in the order of the names."""
    return sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items())
