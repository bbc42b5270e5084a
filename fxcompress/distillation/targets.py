"""What comes with a batch: labels or probabilities, and the samples' numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxcompress.distillation.losses.logits import check_labels
from fxcompress.errors import DataError
from fxcompress.graph.inputs import Arguments, tensors_in

__all__ = ["check_samples", "classification", "sample_numbers"]


def classification(logits: Tensor, targets: Any, ignore_index: int) -> Tensor:
    """Cross entropy, zero where no label counts; DataError where targets are none for these logits."""
    _check_targets(targets, logits)
    if not targets.is_floating_point():
        check_labels(targets, logits.shape[1], ignore_index)
        if not bool((targets != ignore_index).any()):
            return logits.sum() * 0.0
    return F.cross_entropy(logits, targets, ignore_index=ignore_index)


def _check_targets(targets: Any, logits: Tensor) -> None:
    """DataError unless targets are labels for these logits, or probabilities of their shape."""
    if not isinstance(targets, Tensor):
        raise DataError(f"targets are a {type(targets).__name__}; they are a tensor of labels. (Or give task_loss.)")
    wanted = logits.shape if targets.is_floating_point() else logits.shape[:1] + logits.shape[2:]
    if targets.shape != wanted:
        what = "probabilities (labels are int64)" if targets.is_floating_point() else "labels"
        raise DataError(
            f"targets are {list(targets.shape)} {what}, and the student's logits {list(logits.shape)} take {list(wanted)}."
        )


def check_samples(call: Arguments) -> None:
    """DataError where a batch holds no sample: means over nothing are NaN."""
    first = next((tensor for tensor in tensors_in(tuple(call)) if tensor.dim()), None)
    if first is not None and not len(first):
        raise DataError(f"the batch holds no sample: its first tensor is {list(first.shape)}.")


def sample_numbers(index: Any) -> Tensor:
    """The samples' numbers in the dataset as a tensor; DataError where they are none."""
    numbers = index if isinstance(index, Tensor) else torch.as_tensor(index, device="cpu")
    if numbers.dim() != 1 or numbers.is_floating_point() or numbers.dtype is torch.bool:
        raise DataError(
            f"index holds the samples' numbers in the dataset, (B,) of int64, not {list(numbers.shape)} of {numbers.dtype}."
        )
    return numbers.long()
