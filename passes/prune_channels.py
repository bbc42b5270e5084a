"""prune-channels: whole channels go, with everything that belongs to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import fx

from fxcompress.errors import ConfigError, PassError, VerificationError, did_you_mean
from fxcompress.graph.channels import Channels, analyse, predict
from fxcompress.graph.channels.analysis import group_name
from fxcompress.graph.channels.blame import Before, culprits
from fxcompress.graph.channels.calls import place
from fxcompress.graph.channels.cut import Cut, cut
from fxcompress.graph.channels.kept import Kept
from fxcompress.graph.channels.proof import Proof, tolerance
from fxcompress.graph.channels.rewriting import UnprovableError
from fxcompress.graph.island import regions
from fxcompress.graph.results import UNSTEADY
from fxcompress.graph.select import Layer, Selection
from fxcompress.graph.settling import settle
from fxcompress.options import Count, Fraction, Seed
from fxcompress.pass_base import APPROXIMATE, Context, Pass, Promise
from fxcompress.pruning.compensation import compensation, fold
from fxcompress.pruning.dense import Dense, dense_of
from fxcompress.pruning.importance import check_criterion, scores
from fxcompress.pruning.latency import latency
from fxcompress.pruning.pruning_plan import GroupPlan, PruningPlan
from fxcompress.pruning.selection import Budget, choose, missed, removed_classes, sparsities, whole_groups
from fxcompress.pruning.sites import Mask

__all__ = ["PruneChannels"]

ANALYSIS = ("exclude_layers", "prune_heads", "prune_head_dim", "whole_groups", "policy", "dimension")
"""The options that decide which groups there are."""


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Remove the least important channels: parameters, buffers, attributes and the numbers in the graph shrink together.

    Options: ``sparsity``, the share of channels that go from every group, or over all groups with ``global_pruning``;
    ``layers``, a share for single groups (or patterns); ``target``, instead, the share of ``parameters``, ``macs`` or
    ``latency`` that stays; ``criterion`` with ``dimension`` (score a channel by the weights that make it, ``out``, or that
    read it, ``in``), ``reduction`` and ``normalisation``; ``round_to``, ``min_kept``, ``max_ratio``, ``uniform``;
    ``exclude_layers``, which keep every channel that they make (``dimension`` ``in``: that they read) with everything tied
    to it, and follow what is pruned around them; ``prune_heads`` and ``prune_head_dim`` for
    attention; ``whole_groups``, grouped convolutions that lose whole groups (None: those that come nearer to
    their share so), where the others lose equal numbers of channels from every group; ``policy``: ``exact`` leaves alone
    what changes remaining values, ``approximate`` allows it, ``compensate`` folds the mean of removed channels into biases;
    ``plan``, a saved pruning plan to apply instead of choosing; ``part`` of what is asked goes now, counted, as everything
    asked, of the model before the ``earlier`` prune-channels steps that belong to this one;
    ``prove``: hold the analysis and the smaller model against the dense one; ``strict``: an operator nobody knows is an
    error instead of a frozen channel.
    """

    name: ClassVar[str] = "prune-channels"
    needs: ClassVar[tuple[str, ...]] = ("inputs",)
    promise: ClassVar[Promise] = APPROXIMATE
    costly: ClassVar[bool] = True
    replaces: ClassVar[bool] = True

    sparsity: Fraction = 0.5
    layers: dict[str, float] = field(default_factory=dict)
    target: dict[Literal["parameters", "macs", "latency"], float] = field(default_factory=dict)
    criterion: str = "l1_norm"
    global_pruning: bool = False
    dimension: Literal["out", "in"] = "out"
    reduction: Literal["sum", "mean", "max", "norm"] | None = None
    normalisation: Literal["mean", "max", "none"] = "mean"
    round_to: Count = 8
    min_kept: Count = 1
    max_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    uniform: bool = False
    exclude_layers: tuple[Layer, ...] = ()
    prune_heads: bool = False
    prune_head_dim: bool = True
    whole_groups: tuple[str, ...] | None = None
    policy: Literal["exact", "approximate", "compensate"] = "approximate"
    plan: dict[str, Any] | None = None
    part: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    earlier: Annotated[int, Field(ge=0)] = 0
    prove: bool = True
    strict: bool = False
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_criterion(self.criterion)
        self._whole_budget()
        if self.plan is not None:
            PruningPlan.from_data(self.plan)
        if len(self.target) > 1 or any(not 0.0 < share <= 1.0 for share in self.target.values()):
            raise ConfigError(f"target is {self.target!r}; it is one of parameters, macs, latency with a share in (0, 1].")

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        found = self.analysed(model, context)
        groups = [group for channels in found.values() for group in channels.groups]
        if self.plan is not None:
            PruningPlan.from_data(self.plan).check(groups)
        if not groups and not self.earlier:
            raise _nothing(found)
        for region, channels in found.items():
            with context.in_region(region):
                found[region] = self._prune(channels, context)
        if groups and not any(channels.groups for channels in found.values()):
            raise _nothing(found)

    def analysed(self, model: fx.GraphModule, context: Context) -> dict[str, Channels]:
        """The channel groups of every region of a traced model, whose computed weights are made plain first."""
        Selection(None, self.exclude_layers).check(model)
        found: dict[str, Channels] = {}
        for region, module in regions(model).items():
            with context.in_region(region):
                for name, reason in settle(module, Mask):
                    context.note(name, reason)
                found[region] = self.analyse(module, context)
                self._report(found[region], context)
        self._check_whole_groups(found)
        return found

    def _check_whole_groups(self, found: dict[str, Channels]) -> None:
        """Raise ConfigError for a name in ``whole_groups`` that no grouped convolution has."""
        names = [
            f"{region}.{group_name(site)}".lstrip(".")
            for region, channels in found.items()
            for site in channels.walk.grouped
        ]
        for pattern in self.whole_groups or ():
            if not any(name in Selection((pattern,)) for name in names):
                raise ConfigError(f"no grouped convolution is called {pattern!r}.{did_you_mean(pattern, names)}")

    def _prune(self, channels: Channels, context: Context) -> Channels:
        """Choose, cut and prove in one region; returns the analysis that was cut."""
        module = channels.walk.module
        if not channels.groups:
            return channels
        call = context.example() if self.prove else None
        refused: dict[str, str] = {}
        blamed: dict[str, str] = {}
        dense = self._dense(module)
        cost = self._dense_cost(channels, context) if self.target and self.plan is None else None
        while True:
            removed = self._removed(channels, context, cost)
            folded = compensation(channels, removed, context) if self.policy == "compensate" else {}
            held = (Proof(channels, removed, call, self.seed), Before(channels.walk)) if call is not None else None
            try:
                done = cut(channels, removed)
            except UnprovableError as error:
                refused[error.node] = "no form of its numbers is proved right"
                context.skip(error.node, f"nothing is cut through it: {error}")
                channels = self.analyse(module, context, refused).without(blamed)
                continue
            found = self._check(*held, context) if held is not None else {}
            if not found:
                break
            blamed |= found
            channels = channels.without(blamed)
        fold(channels, removed, folded)
        module.meta["pruning"] = [*module.meta.get("pruning", []), self._record(channels, removed, done, cost)]
        self._account(channels, removed, dense, context)
        return channels

    def analyse(self, module: fx.GraphModule, context: Context, refused: dict[str, str] | None = None) -> Channels:
        """The channel groups of one region under this pass's options."""
        prefix = f"{context.region}." if context.region else ""
        before = self._earlier(module)
        chosen = before[0]["options"].get("whole_groups", ()) if before else self.whole_groups
        named = Selection(chosen or ())
        channels = self._analyse(module, prefix, lambda name: prefix + name in named, refused)
        if chosen is None and self.plan is None and not self.target and not self.global_pruning:
            found = whole_groups(channels, self._whole_budget())
            if found:
                channels = self._nearer(channels, self._analyse(module, prefix, found.__contains__, refused))
        if self.strict and channels.walk.opaque:
            node, reason = next(iter(channels.walk.opaque.items()))
            raise PassError(f"{node.name!r}: {reason}. With strict=True every operator must have a rule.")
        return channels

    def _analyse(
        self, module: fx.GraphModule, prefix: str, whole: Callable[[str], bool], refused: dict[str, str] | None
    ) -> Channels:
        frozen = self._excluded(module, prefix) if self.exclude_layers else {}
        channels = analyse(
            module,
            frozen=frozen,
            exact=self.policy == "exact",
            heads=self.prune_heads,
            head_dims=self.prune_head_dim,
            dimension=self.dimension,
            whole=whole,
            refused=refused,
        )
        channels.groups = [replace(group, name=prefix + group.name) for group in channels.groups]
        channels.whole = tuple(prefix + name for name in map(group_name, channels.walk.grouped) if whole(name))
        return channels

    def _nearer(self, channels: Channels, coarser: Channels) -> Channels:
        """The analysis whose roundings come nearer to the shares asked; what ``coarser`` froze counts as missed."""
        (misses, wanted), (others, left) = (missed(each, self._whole_budget()) for each in (channels, coarser))
        return coarser if others + max(0.0, wanted - left) < misses else channels

    def _excluded(self, module: fx.GraphModule, prefix: str) -> dict[str, str]:
        """Tensors of layers that are excluded by name, with the reason."""
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        return {
            name: f"layer {pattern!r} is excluded by name"
            for pattern in self.exclude_layers
            for name, _ in named
            if prefix + name in Selection((pattern,))
        }

    def importance(self, channels: Channels, context: Context) -> dict[str, torch.Tensor]:
        """Group → the score of every unit."""
        return scores(
            channels,
            self.criterion,
            data=context.data if self.criterion in ("taylor", "hrank") else None,
            dimension=self.dimension,
            reduction=self.reduction,
            seed=self.seed,
            skip=context.note,
        )

    def choose(self, channels: Channels, context: Context, cost: float | None = None) -> dict[str, list[int]]:
        """The units that go, by group; ``cost`` is what the dense model was measured to cost."""
        found, budget = self.importance(channels, context), self._budget(self._dense(channels.walk.module))
        if not self.target and self.global_pruning and self.part < 1.0:
            last = choose(channels, found, replace(self, part=1.0)._budget(budget.dense))
            floors = {g.name: (g.size - len(last[g.name])) // len(g.blocks) for g in channels.groups}
            budget = replace(budget, floors=floors)  # nothing that the last step would rather keep
        if not self.target:
            return choose(channels, found, budget)
        (what, share), measure = next(iter(self.target.items())), self._measure(channels, context)
        dense, asked = self._dense_cost(channels, context) if cost is None else cost, 1 - self.part * (1 - share)
        chosen = choose(channels, found, budget, measure, asked * dense)
        left = measure(chosen) / dense if dense else 0.0
        context.note("", f"{left:.1%} of its {what} {'are' if what != 'latency' else 'is'} left where {asked:.1%} was asked")
        return chosen

    def _earlier(self, module: fx.GraphModule) -> list[dict[str, Any]]:
        """The records of the steps before this one that belong to it."""
        records: list[dict[str, Any]] = module.meta.get("pruning") or []
        return records[-self.earlier :] if self.earlier else []

    def _dense(self, module: fx.GraphModule) -> Dense:
        return dense_of(self._earlier(module), next(iter(self.target), None))

    def _dense_cost(self, channels: Channels, context: Context) -> float:
        """What the model before the earlier steps cost in what ``target`` names."""
        known = self._dense(channels.walk.module).cost
        return self._measure(channels, context)({}) if known is None else known

    def _whole_budget(self) -> Budget:
        """Everything that is asked, of the model as it is."""
        return Budget(
            self.sparsity,
            self.layers,
            self.global_pruning,
            self.round_to,
            self.min_kept,
            self.max_ratio,
            self.normalisation,
            self.uniform,
        )

    def _budget(self, dense: Dense) -> Budget:
        """What is asked by now, of the model before the earlier steps."""
        layers = {name: share * self.part for name, share in self.layers.items()}
        return replace(self._whole_budget(), sparsity=self.sparsity * self.part, layers=layers, dense=dense)

    def _measure(self, channels: Channels, context: Context) -> Callable[[dict[str, list[int]]], float]:
        what = next(iter(self.target))
        call = context.example()
        if what == "latency" and call is not None:
            return lambda chosen: latency(channels, removed_classes(channels, chosen), call)
        count = {"parameters": predict.parameters, "macs": predict.macs}[what]
        return lambda chosen: float(count(channels, Kept.without(channels.root, removed_classes(channels, chosen))))

    def _removed(self, channels: Channels, context: Context, cost: float | None) -> np.ndarray:
        if self.plan is None:
            return removed_classes(channels, self.choose(channels, context, cost))
        plan = PruningPlan.from_data(self.plan)
        return removed_classes(channels, {name: group.remove for name, group in plan.groups.items()})

    def _report(self, channels: Channels, context: Context) -> None:
        for frozen in channels.frozen:
            context.skip(frozen.layer, frozen.reason)
        for node, reason in channels.walk.opaque.items():
            context.skip(node, f"{reason}: what reaches it stays")
        inexact = [group for group in channels.groups if group.inexact]
        units = sum(group.size for group in channels.groups)
        if units:
            share = 1 - sum(group.size for group in inexact) / units
            context.note("", f"{share:.1%} of {units} removable units go without changing what remains ({self.policy})")
        for group in inexact:
            context.note(group.name, group.inexact)

    def _record(self, channels: Channels, removed: np.ndarray, done: Cut, cost: float | None) -> dict[str, Any]:
        """What was done, as plain data: enough to do it again to a fresh model, and to know that it was the same."""
        lost, groups = np.zeros(len(channels.root), dtype=bool), {}
        lost[removed] = True
        for group in channels.groups:
            gone = np.flatnonzero(lost[group.blocks]).tolist()
            groups[group.name] = GroupPlan(group.size, gone, len(group.blocks))
        options = {name: getattr(self, name) for name in ANALYSIS if getattr(self, name) != getattr(type(self), name)}
        options |= {"whole_groups": list(channels.whole)} if channels.whole else {}
        dense = {} if cost is None else {"dense": {next(iter(self.target)): cost}}
        return {**PruningPlan(groups, options).as_data(), "kept": done.kept(), "literals": dict(done.calls), **dense}

    def _account(self, channels: Channels, removed: np.ndarray, dense: Dense, context: Context) -> None:
        total, gone = sum(group.size for group in channels.groups), len(removed)
        context.note("", f"{gone} of {total} units removed ({gone / total if total else 0.0:.2%})")
        if self.earlier:
            units, kept = dense.total(channels.groups)
            lost = units - kept + gone
            context.note("", f"{lost} of the {units} before the schedule are gone ({lost / units if units else 0.0:.2%})")
        if self.plan is not None or self.target or self.global_pruning:
            return
        asked, is_gone = sparsities(channels, self._budget(dense)), np.zeros(len(channels.root), dtype=bool)
        is_gone[removed] = True
        for group in channels.groups:
            size, wanted = dense.size(group) * len(group.blocks), asked[group.name] * dense.size(group) * len(group.blocks)
            lost = size - group.size + int(is_gone[group.blocks].sum())
            if abs(lost - wanted) >= len(group.blocks):
                context.note(
                    group.name, f"{lost} of {size} units removed where {wanted:.1f} were asked (round_to, min_kept)"
                )

    def _check(self, proof: Proof, before: Before, context: Context) -> dict[str, str]:
        """Hold the cut against both oracles; where one objects, undo it and return the groups it objects to, and why.

        Raises VerificationError where no group can be named, or none would be left.
        """
        errors = proof.errors()
        allowed = tolerance(proof.channels.walk.module)
        if all(error <= allowed for error in errors.values()):
            context.note("", "proved: " + ", ".join(f"{oracle} error {error:.1e}" for oracle, error in errors.items()))
            if not proof.moved:
                context.note("", "the outputs do not depend on what was removed, so the proof says little about this model")
            return {}
        before.restore()
        oracle, error = next((oracle, error) for oracle, error in errors.items() if not error <= allowed)
        if (moved := proof.unsteadiness()) > allowed:
            raise VerificationError(
                f"the {oracle} oracle finds a relative error of {error:.2g}, and a rounding of the inputs moves the outputs "
                f"of the model itself by {moved:.2g} (allowed: {allowed:.0e}). {UNSTEADY} Your model is as it was."
            )
        found = culprits(proof)
        if not found or len(found) == len(proof.channels.groups):
            raise VerificationError(
                f"the {oracle} oracle finds a relative error of {error:.2g} (rounding explains {allowed:.0e}): "
                "the channel analysis of this model is wrong. Your model is as it was; please report it."
            )
        for name, reason in found.items():
            context.skip(name, f"it stays, for {reason}: the analysis is wrong about it; please report it")
        return found


def _nothing(found: dict[str, Channels]) -> PassError:
    reasons = [reason for region, channels in found.items() for reason in _reasons(region, channels)]
    return PassError("no channel can be removed, every one is frozen:\n  " + "\n  ".join(reasons[:20] or ["no layers"]))


def _reasons(region: str, channels: Channels) -> list[str]:
    """Why nothing can go, layer by layer."""
    prefix = f"{region}." if region else ""
    layers = {frozen.layer: frozen.reason for frozen in channels.frozen}
    opaque = {place(node): reason for node, reason in channels.walk.opaque.items()}
    return [f"{prefix}{name}: {reason}" for name, reason in {**opaque, **layers}.items()]
