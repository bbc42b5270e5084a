"""distill: let the graph learn from a teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx

from fxcompress.distillation import logits_of, make_distiller
from fxcompress.errors import ConfigError
from fxcompress.graph.island import regions
from fxcompress.pass_base import APPROXIMATE, Context, Pass, Promise
from fxcompress.passes.train import judge, report
from fxcompress.training import LOSSES, KeepZeros, Recipe, train

__all__ = ["Distill"]


@dataclass(frozen=True)
class Distill(Pass, Recipe):
    """Train the graph on batches of (input, target), or (input, target, index), and on what a teacher makes of them.

    The teacher is the one the run was given, or the model as it came in, before anything was pruned or quantized, or as
    ``keep-teacher`` found it.

    Options: ``type``, a distiller's name, and its ``options``; ``loss``, a name in LOSSES, with its ``loss_options``, where
    the task is not classification; ``keep_zeros``: weights that are zero stay zero; and those of a
    :class:`~fxcompress.training.Recipe`. A run that keeps its stages is resumed in the middle, exactly.
    """

    name: ClassVar[str] = "distill"
    takes: ClassVar[tuple[str, ...]] = ("float", "observed")
    needs: ClassVar[tuple[str, ...]] = ("data", "labels")
    promise: ClassVar[Promise] = APPROXIMATE
    costly: ClassVar[bool] = True
    on_device: ClassVar[bool] = True

    type: str = "LogitDistiller"
    options: dict[str, Any] = field(default_factory=dict)
    loss: str | None = None
    loss_options: dict[str, Any] = field(default_factory=dict)
    keep_zeros: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss is not None:
            LOSSES[self.loss]
        elif self.loss_options:
            raise ConfigError("loss_options are a loss's, and there is no loss.")
        make_distiller({"type": self.type, **self.options})

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        example = context.inputs.get("") if "" in regions(model) else None
        distiller = make_distiller(
            {"type": self.type, "seed": self.seed, **self.options},
            teacher=context.teacher,
            student=model,
            example_inputs=example,
            task_loss=self._task_loss(),
        )
        validated = judge(context, self.metric)
        history = train(
            distiller,
            context.require_data("'distill'"),
            self,
            evaluate=None if validated is None else lambda trained: validated(trained.student),
            callbacks=[KeepZeros(distiller.student)] if self.keep_zeros else [],
            progress=context.progress,
            **context.resumable("distill"),
        )
        report(history, context)
        for row in distiller.all_rows():
            context.note(row.student, f"follows the teacher's {row.teacher}: {row.how}")
        learned = distiller.student_model().state_dict()
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if isinstance(value, torch.Tensor):
                    value.copy_(learned[name])

    def _task_loss(self) -> Callable[[Any, Any], Any] | None:
        if self.loss is None:
            return None
        function, key = partial(LOSSES[self.loss], **self.loss_options), self.options.get("output")
        return lambda output, targets: function(logits_of(output, key), targets)
