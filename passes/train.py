"""train: let the weights learn from labelled data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import fx, nn

from fxcompress.errors import ConfigError
from fxcompress.graph.frozen import freeze_statistics
from fxcompress.options import validated
from fxcompress.pass_base import APPROXIMATE, Context, Pass, Promise
from fxcompress.pruning.magnitude_pruner import MagnitudePruner
from fxcompress.pruning.pruning_scheduler import SCHEDULERS
from fxcompress.training import LOSSES, Callback, History, KeepZeros, OnEpoch, Recipe, evaluate, train

__all__ = ["Train", "judge", "report"]


@dataclass(frozen=True)
class Train(Pass, Recipe):
    """Train the graph on batches of (input, target): fine-tuning, or quantization-aware training of an observed graph.

    Options: those of a :class:`~fxcompress.training.Recipe`, and ``loss``, a name in LOSSES, with its ``loss_options``;
    ``schedule``, a pruning scheduler's ``type`` and options, which masks weights as epochs pass, chosen by ``mask``, the
    options of MagnitudePruner; ``keep_zeros``: weights that are zero stay zero; ``freeze_bn_epochs``: statistics of batch
    normalisation are frozen from this epoch on. ``metric`` and ``patience`` look at the validation data, where the run was
    given some. A run that keeps its stages is resumed in the middle of training, exactly.
    """

    name: ClassVar[str] = "train"
    takes: ClassVar[tuple[str, ...]] = ("float", "observed")
    needs: ClassVar[tuple[str, ...]] = ("data", "labels")
    promise: ClassVar[Promise] = APPROXIMATE
    costly: ClassVar[bool] = True
    on_device: ClassVar[bool] = True

    loss: str = "cross_entropy"
    loss_options: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    mask: dict[str, Any] = field(default_factory=dict)
    freeze_bn_epochs: Annotated[int, Field(ge=-1)] = -1
    keep_zeros: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        LOSSES[self.loss]
        if self.mask and not self.schedule:
            raise ConfigError("mask says which weights a schedule prunes, and there is no schedule.")
        validated(MagnitudePruner, self.mask, ("mask",))
        if self.schedule:
            self._scheduler(None)

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        history = train(
            model,
            context.require_data("'train'"),
            self,
            loss=partial(LOSSES[self.loss], **self.loss_options),
            evaluate=judge(context, self.metric),
            callbacks=self._callbacks(model),
            progress=context.progress,
            **context.resumable("train"),
        )
        report(history, context)

    def _callbacks(self, model: nn.Module) -> list[Callback]:
        found: list[Callback] = []
        if self.schedule:
            found.append(OnEpoch(self._scheduler(model).step))
        if self.freeze_bn_epochs >= 0:
            found.append(OnEpoch(lambda epoch: freeze_statistics(model) if epoch >= self.freeze_bn_epochs else None))
        if self.keep_zeros:
            found.append(KeepZeros(model))
        return found

    def _scheduler(self, model: nn.Module | None) -> Any:
        options = {key: value for key, value in self.schedule.items() if key != "type"}
        cls = SCHEDULERS[self.schedule.get("type", "AGPScheduler")]
        return cls(
            **validated(cls, options, ("schedule",)),
            pruner=None if model is None else MagnitudePruner(**self.mask),
            model=model,
        )


def report(history: History, context: Context) -> None:
    """Say in the ledger how training went."""
    if history.rows:
        first, last = history.rows[0], history.rows[-1]
        context.note("", f"{len(history)} epochs, loss {first['loss']:.4g} → {last['loss']:.4g}")
    if history.stopped:
        context.note("", f"stopped early: {history.stopped}")


def judge(context: Context, metric: str) -> Callable[[nn.Module], dict[str, float]] | None:
    """What judges a model after every epoch, where the run was given validation data."""
    if context.validation is None:
        return None
    data = context.validation
    return lambda model: evaluate(model, data, ["accuracy"] if metric == "loss" else [metric])
