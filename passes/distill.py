"""distill: let the graph learn from a teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from fxcompress.distillation import make_distiller
from fxcompress.graph.island import regions
from fxcompress.pass_base import APPROXIMATE, Context, Pass, Promise
from fxcompress.passes.train import judge, report
from fxcompress.training import KeepZeros, Recipe, train

__all__ = ["Distill"]


@dataclass(frozen=True)
class Distill(Pass, Recipe):
    """Train the graph on batches of (input, target) and on what a teacher makes of them.

    The teacher is the one the run was given, or the model as it came in, before anything was pruned or quantized.

    Options: ``type``, a distiller's name, and its ``options``; those of a :class:`~fxcompress.training.Recipe`;
    ``keep_zeros``: weights that are zero stay zero. A run that keeps its stages is resumed in the middle, exactly.
    """

    name: ClassVar[str] = "distill"
    takes: ClassVar[tuple[str, ...]] = ("float", "observed")
    needs: ClassVar[tuple[str, ...]] = ("data",)
    promise: ClassVar[Promise] = APPROXIMATE
    costly: ClassVar[bool] = True

    type: str = "LogitDistiller"
    options: dict[str, Any] = field(default_factory=dict)
    keep_zeros: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        make_distiller({"type": self.type, **self.options})

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        example = context.inputs.get("") if "" in regions(model) else None
        config = {"type": self.type, **self.options}
        distiller = make_distiller(config, teacher=context.teacher, student=model, example_inputs=example)
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
        learned = distiller.student_model().state_dict()
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if isinstance(value, torch.Tensor):
                    value.copy_(learned[name])
