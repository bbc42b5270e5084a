"""Training: one loop for distillation, quantization-aware training and fine-tuning, on one process or many."""

from fxcompress.distributed import gather, is_main, merge, rank, spread, world
from fxcompress.training.callbacks import Callback, KeepZeros, OnEpoch, TensorBoard
from fxcompress.training.history import History
from fxcompress.training.loop import Trainer, train
from fxcompress.training.metrics import METRICS, evaluate
from fxcompress.training.recipe import LOSSES, LR_SCHEDULES, OPTIMIZERS, Horizon, Recipe

__all__ = [
    "LOSSES",
    "LR_SCHEDULES",
    "METRICS",
    "OPTIMIZERS",
    "Callback",
    "History",
    "Horizon",
    "KeepZeros",
    "OnEpoch",
    "Recipe",
    "TensorBoard",
    "Trainer",
    "evaluate",
    "gather",
    "is_main",
    "merge",
    "rank",
    "spread",
    "train",
    "world",
]
