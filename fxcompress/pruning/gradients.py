"""Gradients of a loss over data, for criteria that ask how much the loss would move."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress.data import check_batch, split_batch
from fxcompress.errors import DataError
from fxcompress.graph.inputs import tensors_in
from fxcompress.graph.tree import evaluating

__all__ = ["Loss", "gradients"]

Loss = Callable[[Any, Any], Tensor]


def gradients(model: nn.Module, data: Iterable[Any], loss: Loss | None = None) -> dict[str, Tensor]:
    """Parameter → the gradient of the loss, summed over the batches, in eval mode; the model is left as it was.

    ``loss(output, target)`` is cross entropy unless given. Raises DataError for no batch, or one without a target.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    totals = {name: torch.zeros_like(p) for name, p in parameters.items()}
    device = next(iter(parameters.values())).device if parameters else torch.device("cpu")
    seen = 0
    with evaluating(model), _learning(parameters), torch.inference_mode(False), torch.enable_grad():
        for position, batch in enumerate(data):
            call, target = split_batch(batch, model)
            check_batch(call, position)
            value = _loss(call.to(device)(model), target, loss, position)
            found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            for total, gradient in zip(totals.values(), found, strict=True):
                if gradient is not None:
                    total += gradient
            seen += 1
    if not seen:
        raise DataError("the dataloader is empty: there are no gradients to take.")
    return totals


@contextmanager
def _learning(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Every parameter asks for its gradient; afterwards those that did."""
    asked = [(p, p.requires_grad) for p in parameters.values()]
    try:
        for p, _ in asked:
            p.requires_grad_()
        yield
    finally:
        for p, wants in asked:
            p.requires_grad_(wants)


def _loss(output: Any, target: Any, loss: Loss | None, position: int) -> Tensor:
    if loss is not None:
        return loss(output, target)
    if target is None:
        raise DataError(f"batch {position} has no target: give batches of (input, target), or a loss of your own.")
    logits = output if isinstance(output, Tensor) else tensors_in(output)[0]
    return F.cross_entropy(logits, target.to(logits.device))
