"""Pruning: channels and layers that go, masks over weights, and schedules."""

from fxcompress.pruning.gradual import GradualPruner
from fxcompress.pruning.layer_plan import LayerPlan
from fxcompress.pruning.layer_pruner import LayerPruner
from fxcompress.pruning.magnitude_pruner import L1UnstructuredPruner, MagnitudePruner, RandomPruner
from fxcompress.pruning.pruning_plan import PruningPlan
from fxcompress.pruning.pruning_scheduler import (
    AGPScheduler,
    CubicScheduler,
    IterativeScheduler,
    OneShotScheduler,
    PruningScheduler,
)
from fxcompress.pruning.recipe import apply_recipe, carry_optimizer, get_recipe
from fxcompress.pruning.sensitivity_analyzer import SensitivityAnalyzer
from fxcompress.pruning.sensitivity_files import read_analysis
from fxcompress.pruning.structured_pruner import ChannelPruner, FilterPruner, StructuredPruner

__all__ = [
    "AGPScheduler",
    "ChannelPruner",
    "CubicScheduler",
    "FilterPruner",
    "GradualPruner",
    "IterativeScheduler",
    "L1UnstructuredPruner",
    "LayerPlan",
    "LayerPruner",
    "MagnitudePruner",
    "OneShotScheduler",
    "PruningPlan",
    "PruningScheduler",
    "RandomPruner",
    "SensitivityAnalyzer",
    "StructuredPruner",
    "apply_recipe",
    "carry_optimizer",
    "get_recipe",
    "read_analysis",
]
