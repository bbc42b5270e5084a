"""Timing in turns: every candidate once per round, so that a machine that slows down slows all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["Turns", "in_turns", "seconds", "stopwatch"]

Clock = Callable[[], float]


@dataclass(frozen=True)
class Turns:
    """Seconds of every candidate, a value per round."""

    taken: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.taken[name])

    def ratio(self, over: str, under: str) -> float:
        """The median over rounds of ``over``'s seconds in ``under``'s."""
        return statistics.median(self.ratios(over, under))

    def ratios(self, over: str, under: str) -> list[float]:
        """Round by round."""
        return [a / b for a, b in zip(self.taken[over], self.taken[under], strict=True)]


def seconds(work: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """How long one call takes."""
    started = clock()
    work()
    return clock() - started


def stopwatch(work: Callable[[], object], clock: Clock = time.perf_counter) -> Callable[[], float]:
    """``work`` as something that takes its own time."""
    return lambda: seconds(work, clock)


def in_turns(candidates: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1) -> Turns:
    """Call every candidate once per round; each returns its seconds. The first ``warmup`` rounds do not count."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    gc.collect()
    for turn in range(warmup + rounds):
        for name, candidate in candidates.items():
            spent = candidate()
            if turn >= warmup:
                taken[name].append(spent)
    return Turns(taken)
