"""How good a model is on data: metrics by name, over every process's share of the batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fxcompress.data import check_batch, fed, fitting
from fxcompress.distributed import gather, rank, world
from fxcompress.errors import DataError
from fxcompress.graph.tree import device_of, evaluating
from fxcompress.registry import Registry
from fxcompress.training.order import batch_size
from fxcompress.training.terms import split_target

__all__ = ["METRICS", "evaluate"]

T = TypeVar("T")


def _logits(output: Any) -> Tensor:
    """The main tensor of an output: itself, the first of a tuple, ``out`` or the first of a dict."""
    if isinstance(output, Mapping):
        output = output.get("out", next(iter(output.values())))
    found: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return found


def _accuracy(output: Any, target: Tensor) -> Tensor:
    return (_logits(output).argmax(1) == target).double().mean()


def _top5(output: Any, target: Tensor) -> Tensor:
    logits = _logits(output)
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    return (best == target.unsqueeze(1)).any(1).double().mean()


class Metrics(Registry):
    """Metrics by name, and which way each is better.

    Less is better of a metric that was registered with ``lower_is_better``, and of one whose name ends in ``loss`` or
    ``error`` where nothing was said; more is better of any other.
    """

    def __init__(self, entries: Mapping[str, Any]) -> None:
        super().__init__("metric", entries)
        self._lower: dict[str, bool] = {}

    def register(self, name: str | None = None, *, lower_is_better: bool | None = None) -> Callable[[T], T]:
        """A decorator that adds a function under ``name``, or its own, with the way it is better."""
        add = super().register(name)

        def directed(metric: T) -> T:
            add(metric)
            if lower_is_better is not None:
                self._lower[name or metric.__name__] = lower_is_better  # type: ignore[attr-defined]
            return metric

        return directed

    def lower_is_better(self, name: str) -> bool:
        """Whether less of the metric ``name`` is better, be it registered or not."""
        return self._lower.get(self._key(name) or name, name.endswith(("loss", "error")))


METRICS = Metrics(
    {
        "accuracy": _accuracy,
        "top5": _top5,
        "cross_entropy_loss": lambda output, target: nn.functional.cross_entropy(_logits(output), target),
        "mse_loss": lambda output, target: nn.functional.mse_loss(_logits(output), target),
    },
)
"""Metrics by name: ``(output, target)`` → the mean over a batch's samples."""


def evaluate(model: nn.Module, data: Iterable[Any], metrics: Sequence[str] = ("accuracy",)) -> dict[str, float]:
    """The metrics by name, means over all samples, in eval mode; under ``torchrun`` each process takes its share of batches.

    The model is left in the mode it came in. Raises DataError where there is no batch, or one without a target.
    """
    functions = {name: METRICS[name] for name in metrics}
    device = device_of(model)
    sums, samples = dict.fromkeys(functions, 0.0), 0
    with evaluating(model), torch.no_grad():
        for position, batch in enumerate(fed(data)):
            if position % world() != rank():
                continue
            call, target = split_target(model, batch, device)
            check_batch(call, position)
            if target is None:
                raise DataError(f"batch {position} has no target to compare with.")
            with fitting(position):
                output, size = call(model), batch_size(batch)
                for name, function in functions.items():
                    sums[name] += float(function(output, target)) * size
            samples += size
    shares = gather((samples, sums))
    total = sum(count for count, _ in shares)
    if not total:
        raise DataError("the dataloader is empty: there is nothing to evaluate on.")
    return {name: sum(part[name] for _, part in shares) / total for name in functions}
