"""Pruning in depth: whole residual blocks or layers go."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx, nn

from fxcompress.errors import ConfigError
from fxcompress.graph.select import Layer, listed, resolved_step
from fxcompress.graph.trace import region_inputs
from fxcompress.ledger import Ledger
from fxcompress.manager import PassManager, example_call, tried_call
from fxcompress.options import Seed, check_given
from fxcompress.pass_base import Context
from fxcompress.plan import Plan
from fxcompress.pruning.depth import least
from fxcompress.pruning.finetuning import finetune
from fxcompress.pruning.layer_plan import LayerPlan, PartPlan
from fxcompress.training import History

__all__ = ["LayerPruner"]


class LayerPruner:
    """Removes whole residual blocks, or layers whose input and output shapes agree.

    ``sparsity``        share of the removable parts that go, exact to one, in [0, 1)
    ``criterion``       ``l1_norm``, ``l2_norm``, ``bn_scale``, ``taylor``, ``cosine`` or ``random`` (see ``prune-layers``)
    ``exclude_layers``, ``include_layers``  parts by name, glob, ``re:`` or ``type:``
    ``units``           ``blocks``, ``layers``, or ``auto``: blocks where there are any, else layers

    Shapes come from ``example_inputs`` or data. The caller's model stays as it is. :attr:`ledger` holds the rows of the last
    call, with the name of everything left out and the reason for everything that could not be.
    """

    def __init__(
        self,
        sparsity: float = 0.5,
        criterion: str = "l1_norm",
        exclude_layers: Sequence[Layer] = (),
        include_layers: Sequence[Layer] | None = None,
        *,
        units: str = "auto",
        example_inputs: Any = None,
        seed: Seed = 0,
        progress: bool | None = None,
    ) -> None:
        check_given(LayerPruner, locals())
        self.options: dict[str, Any] = {
            "sparsity": sparsity,
            "criterion": criterion,
            "exclude_layers": listed("exclude_layers", exclude_layers),
            "include_layers": None if include_layers is None else listed("include_layers", include_layers),
            "units": units,
            "seed": seed,
        }
        self.example_inputs, self._progress = example_inputs, progress
        self.ledger = Ledger()
        self.plan()

    def plan(self, **options: Any) -> Plan:
        """What :meth:`prune` runs."""
        return Plan.parse([{"prune-layers": {**self.options, **options}}])

    def compute_importance(
        self, model: nn.Module, example_inputs: Any = None, data: Iterable[Any] | None = None
    ) -> dict[str, float]:
        """Removable part → its score; the smallest go first."""
        call = example_call(self.example_inputs if example_inputs is None else example_inputs, data, model)
        call = tried_call(model) if call is None and data is None else call
        traced = self._manager(Plan()).run(model, call, data)
        context = Context(
            inputs=region_inputs(traced, call) if call is not None else {},
            data=data,
            seed=self.options["seed"],
            progress=self._progress,
        )
        step: Any = resolved_step(self.plan().steps[0], traced)
        scores: dict[str, float] = step.importance(traced, step.candidates(traced, context), context)
        return scores

    def get_pruning_plan(
        self, model: nn.Module, sparsity: float | None = None, example_inputs: Any = None, data: Iterable[Any] | None = None
    ) -> LayerPlan:
        """Which parts would go: a table to print, edit, save, and apply to this model or a fresh copy of it."""
        asked = self.plan(**({} if sparsity is None else {"sparsity": sparsity})).steps[0]
        scores = self.compute_importance(model, example_inputs, data)
        gone = set(least(scores, asked.sparsity))  # type: ignore[attr-defined]
        return LayerPlan({name: PartPlan(score, name in gone) for name, score in scores.items()}, self.options["units"])

    def prune(
        self,
        model: nn.Module,
        pruning_plan: LayerPlan | str | os.PathLike[str] | None = None,
        example_inputs: Any = None,
        data: Iterable[Any] | None = None,
    ) -> fx.GraphModule:
        """The shallower model; the plan is an object, the path of a saved one, or chosen now."""
        if isinstance(pruning_plan, (str, os.PathLike)):
            pruning_plan = LayerPlan.load(pruning_plan)
        if pruning_plan is not None and not isinstance(pruning_plan, LayerPlan):
            raise ConfigError(f"the plan is a {type(pruning_plan).__name__}; get_pruning_plan makes one, or name its file.")
        plan = self.plan()
        if pruning_plan is not None:
            plan = self.plan(remove=pruning_plan.removed, units=pruning_plan.units)
        return self._manager(plan).run(model, self.example_inputs if example_inputs is None else example_inputs, data)

    def finetune_after_prune(
        self, model: nn.Module, dataloader: Iterable[Any], *, loss: Any = "cross_entropy", **options: Any
    ) -> History:
        """Train the pruned model in place; returns its history (:func:`fxcompress.pruning.finetuning.finetune`)."""
        return finetune(model, dataloader, loss=loss, **{"progress": self._progress, **options})

    def _manager(self, plan: Plan) -> PassManager:
        manager = PassManager(plan, progress=self._progress)
        self.ledger = manager.ledger
        return manager
