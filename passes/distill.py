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
"""distill: let the model learn from a teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from torch import fx, nn

from fxcompress.distillation import BaseDistiller, logits_of, make_distiller
from fxcompress.errors import ConfigError
from fxcompress.pass_base import APPROXIMATE, Context, Pass, Promise
from fxcompress.passes.train import validation
from fxcompress.training import LOSSES, KeepZeros, Recipe, train

__all__ = ["Distill"]


@dataclass(frozen=True)
class Distill(Pass, Recipe):
    """Train the graph on batches of (input, target) and on what a teacher makes of them.

    The teacher is the one the run was given, or the model as it came in, before anything was pruned or quantized.

    Options: ``type``, a distiller's name, and its ``options``; those of a :class:`~fxcompress.training.Recipe`;
    ``keep_zeros``: weights that are zero stay zero. A run that keeps its stages is resumed in the middle, exactly.
    """Train the graph on batches of (input, target), or (input, target, index), with a teacher's help.

    The teacher is the one given to the run; without one, the model as it came in, or as ``keep-teacher`` found it, which
    needs no map of layers.

    Options: ``type``, a distiller's name, and ``options``, its parameters; ``loss``, a name in LOSSES, with its
    ``loss_options``, where the task is not classification; ``keep_zeros``: weights that are zero stay zero; and those of a
    :class:`~fxcompress.training.Recipe`. ``metric`` and ``patience`` look at the validation data, where the run was given
    some. A run that keeps its stages is resumed in the middle of training, exactly.
    """

    name: ClassVar[str] = "distill"
    takes: ClassVar[tuple[str, ...]] = ("float", "observed")
    needs: ClassVar[tuple[str, ...]] = ("data",)
    promise: ClassVar[Promise] = APPROXIMATE
    costly: ClassVar[bool] = True

    type: str = "LogitDistiller"
    options: dict[str, Any] = field(default_factory=dict)
    loss: str | None = None
    loss_options: dict[str, Any] = field(default_factory=dict)
    keep_zeros: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        make_distiller({"type": self.type, **self.options})

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        example = context.inputs.get("") if "" in regions(model) else None
        config = {"type": self.type, **self.options}
        distiller = make_distiller(config, teacher=context.teacher, student=model, example_inputs=example)
        validated = judge(context, self.metric)
        if self.loss is not None:
            LOSSES[self.loss]
        elif self.loss_options:
            raise ConfigError("loss_options are a loss's, and there is no loss.")
        self._distiller()

    def _distiller(self, **given: Any) -> BaseDistiller:
        return make_distiller({"type": self.type, "seed": self.seed, **self.options}, **given)

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        assert context.teacher is not None
        distiller = self._distiller(example_inputs=context.inputs.get(""), task_loss=self._task_loss()).register_hooks(
            context.teacher, model
        )
        history = train(
            distiller,
            context.require_data("'distill'"),
            self,
            evaluate=None if validated is None else lambda trained: validated(trained.student),
            evaluate=self._validation(context),
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
        model.load_state_dict(distiller.student_model().state_dict())
        for row in distiller.all_rows():
            context.note(row.student, f"follows the teacher's {row.teacher}: {row.how}")
        if history.rows:
            first, last = history.rows[0], history.rows[-1]
            context.note("", f"{len(history)} epochs, loss {first['loss']:.4g} → {last['loss']:.4g}")
        if history.stopped:
            context.note("", f"stopped early: {history.stopped}")

    def _task_loss(self) -> Callable[[Any, Any], Any] | None:
        if self.loss is None:
            return None
        function, key = partial(LOSSES[self.loss], **self.loss_options), self.options.get("output")
        return lambda output, targets: function(logits_of(output, key), targets)

    def _validation(self, context: Context) -> Callable[[nn.Module], dict[str, float]] | None:
        judge = validation(context, self.metric)
        return None if judge is None else lambda distiller: judge(distiller.student)  # type: ignore[arg-type]
