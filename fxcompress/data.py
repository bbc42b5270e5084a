"""Batches: what a dataloader may yield, and how a batch becomes a call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxcompress.errors import DataError, FxCompressError
from fxcompress.graph.inputs import Arguments, tensors_in
from fxcompress.graph.module import signature
from fxcompress.graph.tree import device_of

__all__ = ["Once", "batches", "check_batch", "fed", "fitting", "split_batch"]


def fed(data: Any) -> Iterable[Any]:
    """What gives batches: any iterable as it is, one tensor as its only batch. Raises DataError for anything else."""
    if isinstance(data, torch.Tensor):
        return [data]
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)):
        raise DataError(f"the data is a {type(data).__name__}; a dataloader is any iterable of batches.")
    return data


class Once(Iterator[Any]):
    """Batches that can be read once; DataError where they are asked for again after their end."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches, self._ended = batches, False

    def __next__(self) -> Any:
        if self._ended:
            raise DataError("the data can be read once, and an earlier step has read it: give a DataLoader or a list.")
        try:
            return next(self._batches)
        except StopIteration:
            self._ended = True
            raise


def split_batch(batch: Any, model: nn.Module) -> tuple[Arguments, Any]:
    """A batch as a call of ``model`` and its target: a tensor, a tuple or list (input, target, ...), or a dict by keyword.

    Of a dict, the target is what ``forward`` does not take; several of these stay a dict.
    """
    if isinstance(batch, Arguments):
        return batch, None
    if isinstance(batch, torch.Tensor):
        return Arguments((batch,), {}), None
    if isinstance(batch, Mapping):
        return _by_keyword(batch, model)
    if isinstance(batch, (tuple, list)) and batch:
        return Arguments((batch[0],), {}), batch[1] if len(batch) > 1 else None
    raise DataError(
        f"a batch is a {type(batch).__name__}; a dataloader yields tensors, (input, target) tuples, or dicts by keyword."
    )


def _by_keyword(batch: Mapping[Any, Any], model: nn.Module) -> tuple[Arguments, Any]:
    parameters = signature(model).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    left = {} if open_ended else {key: value for key, value in batch.items() if key not in parameters}
    if batch and len(left) == len(batch):
        takes, keys = f"{type(model).__name__}.forward{signature(model)}", ", ".join(map(repr, batch))
        raise DataError(f"{takes} takes none of the keys of a batch, {keys}; a dict is passed by keyword.")
    target = next(iter(left.values())) if len(left) == 1 else left or None
    return Arguments((), {key: value for key, value in batch.items() if key not in left}), target


def check_batch(call: Arguments, position: int) -> None:
    """Refuse a batch that holds no samples, or values that are not finite."""
    tensors = tensors_in(tuple(call))
    if not tensors:
        raise DataError(f"batch {position} holds no tensor.")
    for tensor in tensors:
        if tensor.numel() == 0:
            raise DataError(f"batch {position} is empty: its input has shape {tuple(tensor.shape)}.")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum())) and not _finite(tensor):
            raise DataError(
                f"batch {position} holds NaN or infinite values; calibrating with them would poison every range. "
                "Clean the data first."
            )


def _finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


@contextmanager
def fitting(position: int) -> Iterator[None]:
    """Say which batch it is that a model, a loss or a metric refuses: DataError for whatever torch raises in the block."""
    try:
        yield
    except (FxCompressError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"batch {position} does not fit the model, the loss or the metric: {reason}") from error


def batches(data: Iterable[Any], model: nn.Module, limit: int | None = None) -> Iterator[Arguments]:
    """Up to ``limit`` checked batches of ``data`` as calls of ``model``, on its device."""
    device = device_of(model)
    taken = signature(model)
    for position, batch in enumerate(fed(data)):
        if limit is not None and position >= limit:
            return
        call, _ = split_batch(batch, model)
        check_batch(call, position)
        try:
            taken.bind(*call.args, **call.kwargs)
        except TypeError as error:
            raise DataError(f"batch {position} does not fit {taken}: {error}.") from error
        yield call.to(device)
