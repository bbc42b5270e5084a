"""Structured pruning: whole channels go. Each pruner is a short plan over a traced graph."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.errors import ConfigError
from fxcompress.graph.channels import ChannelGroup, Channels
from fxcompress.graph.inputs import arguments
from fxcompress.graph.select import Layer, listed, resolved_step
from fxcompress.graph.shapes import example_of
from fxcompress.graph.trace import is_traced, region_inputs
from fxcompress.graph.tree import check_module
from fxcompress.ledger import Ledger
from fxcompress.manager import PassManager, tried_call
from fxcompress.options import Seed, check_given
from fxcompress.pass_base import Context
from fxcompress.plan import Plan
from fxcompress.pruning.finetuning import finetune
from fxcompress.pruning.layer_pruner import LayerPruner
from fxcompress.pruning.pruning_plan import GroupPlan, PruningPlan
from fxcompress.training import History

__all__ = ["ChannelPruner", "FilterPruner", "LayerPruner", "StructuredPruner"]


class StructuredPruner:
    """Removes the least important channels, with everything that depends on them.

    ``sparsity``        share of channels that go, of every group, or over all groups with ``global_pruning``, in [0, 1)
    ``pruning_dim``     0: groups are named and scored by the layers that make their channels; 1: by those that read them
    ``criterion``       ``l1_norm``, ``l2_norm``, ``bn_scale``, ``taylor``, ``hrank``, ``fpgm`` or ``random``
    ``exclude_layers``  layers by name, glob, ``re:`` or ``type:`` that keep every output channel (ChannelPruner: every input
                        channel), with everything tied to them; their other side follows what is pruned around them
    ``round_to``        what remains of a layer is a multiple of this, where it has more

    ``target`` asks for a share of ``parameters``, ``macs`` or measured ``latency`` instead; ``layers`` gives single groups a
    share of their own; ``whole_groups`` names grouped convolutions that lose whole groups (None: those that come nearer to
    their share so); ``uniform_across_layers`` keeps like layers alike; ``policy`` is ``exact``, ``approximate`` or
    ``compensate`` (which also recalibrates BatchNorm where data is given). Shapes come from ``example_inputs`` or data. The
    caller's model stays as it is. :attr:`ledger` holds the rows of the last call.
    """

    def __init__(
        self,
        sparsity: float = 0.5,
        pruning_dim: int = 0,
        criterion: str = "l1_norm",
        global_pruning: bool = False,
        exclude_layers: Sequence[Layer] = (),
        round_to: int = 8,
        *,
        layers: Mapping[str, float] | None = None,
        target: Mapping[str, float] | None = None,
        min_kept: int = 1,
        max_ratio: float = 1.0,
        normalisation: str = "mean",
        uniform_across_layers: bool = False,
        prune_heads: bool = False,
        prune_head_dim: bool = True,
        whole_groups: Sequence[str] | None = None,
        policy: str = "approximate",
        example_inputs: Any = None,
        prove: bool = True,
        strict: bool = False,
        seed: Seed = 0,
        progress: bool | None = None,
    ) -> None:
        check_given(StructuredPruner, locals())
        if pruning_dim not in (0, 1) or isinstance(pruning_dim, bool):
            raise ConfigError(f"pruning_dim is {pruning_dim!r}; it is 0 (output channels) or 1 (input channels).")
        self.sparsity, self.pruning_dim, self.criterion = sparsity, pruning_dim, criterion
        self.global_pruning, self.round_to, self.example_inputs = global_pruning, round_to, example_inputs
        self.exclude_layers = listed("exclude_layers", exclude_layers)
        self.options: dict[str, Any] = {
            "sparsity": sparsity,
            "dimension": ("out", "in")[pruning_dim],
            "criterion": criterion,
            "global_pruning": global_pruning,
            "exclude_layers": self.exclude_layers,
            "round_to": round_to,
            "layers": dict(layers or {}),
            "target": dict(target or {}),
            "min_kept": min_kept,
            "max_ratio": max_ratio,
            "normalisation": normalisation,
            "uniform": uniform_across_layers,
            "prune_heads": prune_heads,
            "prune_head_dim": prune_head_dim,
            "whole_groups": None if whole_groups is None else list(whole_groups),
            "policy": policy,
            "prove": prove,
            "strict": strict,
            "seed": seed,
        }
        self.ledger = Ledger()
        self._progress = progress
        self.plan()

    def plan(self, pruning_plan: PruningPlan | None = None, *, recalibrate: bool = False, **options: Any) -> Plan:
        """What :meth:`prune` runs."""
        chosen = {**self.options, **options}
        if pruning_plan is not None:
            chosen |= {**pruning_plan.options, "plan": {"groups": pruning_plan.as_data()["groups"]}}
        steps: list[Any] = ["open-attention", {"prune-channels": chosen}]
        return Plan.parse([*steps, "recalibrate-batchnorm"] if recalibrate else steps)

    def compute_importance(
        self, model: nn.Module, example_inputs: Any = None, data: Iterable[Any] | None = None
    ) -> dict[str, Tensor]:
        """Channel group → the score of every unit, [units], in the positions of a plan; the smallest go first."""
        found: dict[str, Tensor] = {}
        for step, channels, context in self._analysed(model, example_inputs, data):
            found |= step.importance(channels, context)
        return {name: scores.reshape(-1) for name, scores in found.items()}

    def get_pruning_plan(
        self,
        model: nn.Module,
        sparsity: float | Mapping[str, float] | None = None,
        example_inputs: Any = None,
        data: Iterable[Any] | None = None,
        *,
        earlier: int = 0,
    ) -> PruningPlan:
        """Which units would go: a table to print, edit, save, and apply to this model or a fresh copy of it.

        ``sparsity`` is a share, or group (or layer, or glob) → share; groups that are not named then stay whole. Shares are
        of the model as it was before the last ``earlier`` cuts.
        """
        options: dict[str, Any] = {"earlier": earlier}
        if isinstance(sparsity, Mapping):
            options |= {"sparsity": 0.0, "layers": dict(sparsity), "target": {}}
        elif sparsity is not None:
            options |= {"sparsity": sparsity, "target": {}}
        plan = PruningPlan(options={k: self.options[k] for k in _ANALYSIS})
        for step, channels, context in self._analysed(model, example_inputs, data, **options):
            chosen = step.choose(channels, context)
            if channels.whole:
                plan.options["whole_groups"] = [*plan.options.get("whole_groups", ()), *channels.whole]
            for group in channels.groups:
                plan.groups[group.name] = GroupPlan(group.size, chosen[group.name], len(group.blocks))
        return plan

    def groups(self, model: nn.Module, example_inputs: Any = None) -> list[ChannelGroup]:
        """The channel groups of a model."""
        return [group for _, channels, _ in self._analysed(model, example_inputs, None) for group in channels.groups]

    def prune(
        self,
        model: nn.Module,
        pruning_plan: PruningPlan | str | os.PathLike[str] | None = None,
        example_inputs: Any = None,
        data: Iterable[Any] | None = None,
    ) -> fx.GraphModule:
        """The smaller model; the plan is an object, the path of a saved one, or chosen now."""
        if isinstance(pruning_plan, (str, os.PathLike)):
            pruning_plan = PruningPlan.load(pruning_plan)
        if pruning_plan is not None and not isinstance(pruning_plan, PruningPlan):
            raise ConfigError(f"the plan is a {type(pruning_plan).__name__}; get_pruning_plan makes one, or name its file.")
        _check_finite(model)
        recalibrate = self.options["policy"] == "compensate" and data is not None
        return self._run(self.plan(pruning_plan, recalibrate=recalibrate), model, example_inputs, data)

    def finetune_after_prune(
        self, model: nn.Module, dataloader: Iterable[Any], *, loss: Any = "cross_entropy", **options: Any
    ) -> History:
        """Train the pruned model in place; returns its history. ``options`` are those of a :class:`Recipe`, or of
        :func:`fxcompress.training.train`."""
        return finetune(model, dataloader, loss=loss, **{"progress": self._progress, **options})

    def _inputs(self, model: nn.Module, example_inputs: Any) -> Any:
        given = self.example_inputs if example_inputs is None else example_inputs
        if given is None and is_traced(model):
            assert isinstance(model, fx.GraphModule)
            return example_of(model)
        return given

    def _analysed(
        self, model: nn.Module, example_inputs: Any, data: Iterable[Any] | None, **options: Any
    ) -> Iterator[tuple[Any, Channels, Context]]:
        """(pass, channels, context) of every region of a traced copy."""
        step: Any = Plan.parse([{"prune-channels": {**self.options, **options}}]).steps[0]
        _check_finite(model)
        known = self._inputs(model, example_inputs)
        call = tried_call(model) if known is None and data is None else known
        if call is None and data is None:
            raise ConfigError("the first layer does not tell what the model takes: give example_inputs or data.")
        opened = self._run(Plan.parse(["open-attention"]), model, call, data)
        call = arguments(call if call is not None else self._inputs(opened, None))
        context = Context(inputs=region_inputs(opened, call), data=data, seed=self.options["seed"], progress=self._progress)
        step = resolved_step(step, opened)
        for region, channels in step.analysed(opened, context).items():
            with context.in_region(region):
                yield step, channels, context

    def _run(self, plan: Plan, model: nn.Module, example_inputs: Any, data: Iterable[Any] | None) -> fx.GraphModule:
        manager = PassManager(plan, progress=self._progress)
        self.ledger = manager.ledger
        return manager.run(model, self._inputs(model, example_inputs), data)


_ANALYSIS = ("exclude_layers", "prune_heads", "prune_head_dim", "policy", "dimension")


def _check_finite(model: nn.Module) -> None:
    check_module(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ConfigError(
                f"{name} is on the meta device and has no values that could be ranked. Load the weights first."
            )
        if not nn.parameter.is_lazy(parameter) and not _is_finite(parameter.detach()):
            raise ConfigError(f"{name} holds NaN or infinite values; no criterion ranks them. Mend the weights first.")


def _is_finite(tensor: Tensor) -> bool:
    """Whether every element is; a finite sum proves it at a fortieth of the cost."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


class FilterPruner(StructuredPruner):
    """Structured pruning by the filters that make channels: :class:`StructuredPruner` with ``pruning_dim`` 0."""

    def __init__(self, sparsity: float = 0.5, **options: Any) -> None:
        super().__init__(sparsity, pruning_dim=0, **options)


class ChannelPruner(StructuredPruner):
    """Structured pruning by the weights that read channels: :class:`StructuredPruner` with ``pruning_dim`` 1."""

    def __init__(self, sparsity: float = 0.5, **options: Any) -> None:
        super().__init__(sparsity, pruning_dim=1, **options)
