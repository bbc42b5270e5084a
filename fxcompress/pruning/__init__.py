"""Pruning: channels that go, masks over weights, and schedules for both."""

from fxcompress.pruning.magnitude_pruner import L1UnstructuredPruner, MagnitudePruner, RandomPruner
from fxcompress.pruning.pruning_plan import PruningPlan
from fxcompress.pruning.pruning_scheduler import (
    AGPScheduler,
    CubicScheduler,
    IterativeScheduler,
    OneShotScheduler,
    PruningScheduler,
)
from fxcompress.pruning.structured_pruner import ChannelPruner, FilterPruner, StructuredPruner

__all__ = [
    "AGPScheduler",
    "ChannelPruner",
    "CubicScheduler",
    "FilterPruner",
    "IterativeScheduler",
    "L1UnstructuredPruner",
    "MagnitudePruner",
    "OneShotScheduler",
    "PruningPlan",
    "PruningScheduler",
    "RandomPruner",
    "StructuredPruner",
]
