"""What every loss does first: leave autocast, go up to float32, and divide by lengths that may be zero."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxcompress.errors import DataError

__all__ = ["Features", "full_precision", "layers", "nothing", "raised", "same_batch", "same_shape", "unit"]

P = ParamSpec("P")

Features = Tensor | Sequence[Tensor]
"""The feature of one layer, or those of several; the losses of several layers are added up."""


def full_precision(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Compute ``loss`` outside autocast, its half-precision arguments in float32.

    Its first two arguments, called ``student`` and ``teacher`` where they come by keyword, are tensors, or sequences of
    tensors, with samples in them: DataError otherwise.
    """

    @functools.wraps(loss)
    def computed(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        compared = pytree.tree_leaves([*args[:2], *(kwargs[name] for name in ("student", "teacher") if name in kwargs)])
        for value in compared:
            if not isinstance(value, Tensor):
                raise DataError(f"{loss.__name__} was given a {type(value).__name__}; it compares tensors.")
            if not value.numel():
                raise DataError(f"{loss.__name__} was given a tensor of shape {tuple(value.shape)}: it has no values.")
        device = compared[0].device.type if compared else "cpu"
        with torch.autocast(device, enabled=False):
            return loss(*pytree.tree_map(raised, args), **pytree.tree_map(raised, kwargs))

    return computed


def raised(value: Any) -> Any:
    """Half-precision tensors in float32; anything else as it is."""
    is_half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_half else value


def layers(student: Features, teacher: Features) -> list[tuple[Tensor, Tensor]]:
    """Student and teacher layer by layer, each pair of one batch; DataError where the counts differ."""
    one, other = _listed(student), _listed(teacher)
    if len(one) != len(other) or not one:
        raise DataError(f"{len(one)} layers of the student are compared with {len(other)} of the teacher.")
    for pair in zip(one, other, strict=True):
        same_batch(*pair)
    return list(zip(one, other, strict=True))


def _listed(features: Features) -> list[Tensor]:
    return [features] if isinstance(features, Tensor) else list(features)


def same_batch(student: Tensor, teacher: Tensor) -> None:
    """DataError unless both hold the same number of samples."""
    if student.shape[:1] != teacher.shape[:1]:
        raise DataError(f"the student's batch is {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}.")


def same_shape(student: Tensor, teacher: Tensor) -> None:
    """DataError unless both shapes are equal."""
    if student.shape != teacher.shape:
        raise DataError(
            f"the student's feature is {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}: "
            "project and resize it first."
        )


def nothing(*tensors: Tensor) -> Tensor:
    """A zero that every tensor has a (zero) gradient of."""
    return torch.stack([tensor.sum() * 0.0 for tensor in tensors]).sum()


def unit(x: Tensor, dim: int = -1, eps: float = 1e-12) -> Tensor:
    """``x / ‖x‖₂`` along ``dim``; what is shorter than ``eps`` becomes zero, with gradient zero."""
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    long = length > eps
    return torch.where(long, x, 0.0) / torch.where(long, length, 1.0)
