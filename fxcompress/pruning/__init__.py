"""Pruning: masks over weights, and schedules for them."""

from fxcompress.pruning.magnitude_pruner import L1UnstructuredPruner, MagnitudePruner, RandomPruner
from fxcompress.pruning.pruning_scheduler import (
    AGPScheduler,
    CubicScheduler,
    IterativeScheduler,
    OneShotScheduler,
    PruningScheduler,
)

__all__ = [
    "AGPScheduler",
    "CubicScheduler",
    "IterativeScheduler",
    "L1UnstructuredPruner",
    "MagnitudePruner",
    "OneShotScheduler",
    "PruningScheduler",
    "RandomPruner",
]
