"""What a model is mended with, and what it is judged on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxcompress.data import batches, split_batch
from fxcompress.errors import DataError
from fxcompress.graph.inputs import Arguments

__all__ = ["Evidence"]


@dataclass(frozen=True)
class Evidence:
    """Batches to mend a model with, and others to judge it on: what was fitted to a batch flatters it there.

    ``mending``, ``judging``  the batches; ``targets``, those of ``judging``
    ``where``  what kind of samples it is judged on, in words
    """

    mending: list[Arguments]
    judging: list[Arguments]
    targets: list[Any]
    where: str

    @classmethod
    def of(cls, data: Iterable[Any], model: fx.GraphModule, number: int) -> Evidence:
        """Up to ``number`` batches of each kind: to judge, those that follow the calibrated ones; where the data ends there,
        the last quarter of the first ``number``; where there is one batch only, the same."""
        calibrated = model.meta.get("calibrated", 0)
        first, after = [], []
        for position, pair in enumerate(_pairs(data, model, calibrated + number if calibrated else number)):
            if calibrated and position >= calibrated:
                after.append(pair)
            elif position < number:
                first.append(pair)
        if not first:
            raise DataError("the dataloader is empty: there is nothing to mend the model with.")
        if after:
            return cls._made(first, after, "that nothing was fitted to")
        if len(first) == 1:
            return cls._made(first, first, "that it is mended with, for there is one batch only")
        kept = max(1, round(len(first) / 4))
        return cls._made(first[:-kept], first[-kept:], "of the calibrated ones, kept apart from those it is mended with")

    @classmethod
    def _made(cls, mending: list[tuple[Arguments, Any]], judging: list[tuple[Arguments, Any]], where: str) -> Evidence:
        return cls([call for call, _ in mending], [call for call, _ in judging], [target for _, target in judging], where)


def _pairs(data: Iterable[Any], model: fx.GraphModule, limit: int) -> Iterator[tuple[Arguments, Any]]:
    """Batches as calls, each with its target, from one walk over the data: a loader may shuffle."""
    targets: list[Any] = []

    def noting() -> Iterator[Any]:
        for batch in data:
            targets.append(split_batch(batch, model)[1])
            yield batch

    for position, call in enumerate(batches(noting(), model, limit)):
        yield call, targets[position]
