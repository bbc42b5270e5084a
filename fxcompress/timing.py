"""Timing side by side: candidates take turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

__all__ = ["Timing", "interleaved"]


class Timing(NamedTuple):
    """Seconds per call over ``runs`` measured calls."""

    median: float
    p90: float
    min: float
    runs: int


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    runs: int = 30,
    warmup: int = 3,
    seconds: float = 20.0,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time every candidate ``runs`` times in turn, after ``warmup`` rounds; stop early after ``seconds``.

    On a GPU every call ends with a synchronisation. ``tick`` is called after every round, for a progress bar.
    """
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    deadline = time.perf_counter() + seconds
    with torch.no_grad():
        for round_ in range(warmup + runs):
            for name, candidate in candidates.items():
                started = time.perf_counter()
                candidate()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if round_ >= warmup:
                    taken[name].append(time.perf_counter() - started)
            tick()
            if round_ >= warmup + 5 and time.perf_counter() > deadline:
                break
    return {name: _summary(times) for name, times in taken.items()}


def _summary(times: list[float]) -> Timing:
    ordered = sorted(times)
    p90 = ordered[min(len(ordered) - 1, round(0.9 * (len(ordered) - 1)))]
    return Timing(statistics.median(ordered), p90, ordered[0], len(ordered))
