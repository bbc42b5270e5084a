"""Trials of a sensitivity analysis: which parts are tried, the plan that tries them, and what it would save."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import fx

from fxcompress.errors import ConfigError
from fxcompress.graph import ops
from fxcompress.graph.cost import cost, macs
from fxcompress.graph.inputs import Arguments
from fxcompress.graph.island import regions
from fxcompress.manager import PassManager
from fxcompress.options import only
from fxcompress.plan import Plan
from fxcompress.pruning.magnitude_pruner import MagnitudePruner, indivisible
from fxcompress.pruning.prunable import sites
from fxcompress.pruning.structured_pruner import StructuredPruner

__all__ = ["Channels", "Masks", "Trials", "check_options", "trials"]


class Trials(Protocol):
    """A way to prune parts of one model by name."""

    names: list[str]

    def steps(self, low: float, high: float, count: int) -> list[float]:
        """The sparsities to try."""

    def plan(self, shares: Mapping[str, float]) -> Plan:
        """The plan that prunes the parts by these shares; it runs as it is."""

    def pruned(self, shares: Mapping[str, float]) -> fx.GraphModule:
        """The model, pruned by :meth:`plan`."""

    def macs(self, shares: Mapping[str, float]) -> float:
        """The share of multiply-accumulates that is left."""


def trials(pruning_type: str, model: fx.GraphModule, call: Arguments | None, options: Mapping[str, Any]) -> Trials:
    """The trials of a pruning type over a traced model. Raises ConfigError where it has nothing to prune."""
    if pruning_type == "structured":
        found: Trials = Channels(model, call, options)
    else:
        found = Masks(model, call, pruning_type, options)
    if not found.names:
        raise ConfigError(f"the model has nothing that {pruning_type} pruning could take away; there is nothing to analyse.")
    return found


def check_options(pruning_type: str, options: Mapping[str, Any]) -> None:
    """Raise ConfigError for options that the pruner of a pruning type does not have."""
    pruner: type = StructuredPruner if pruning_type == "structured" else MagnitudePruner
    known = [name for name in inspect.signature(pruner).parameters if name not in ("sparsity", "pruning_type")]
    only(options, known, ("pruner_options",))


class Masks:
    """Masks, layer by layer. For N:M the sparsities are those that whole weights of every M allow."""

    def __init__(self, model: fx.GraphModule, call: Arguments | None, pruning_type: str, options: Mapping[str, Any]) -> None:
        self.model, self.call = model, call
        self.pruner = MagnitudePruner(pruning_type=pruning_type, **options)
        found = sites(model, self.pruner.selection.on(model))
        self.m = self.pruner.n_m[1] if pruning_type == "semi_structured" else None
        self.names = [name for name, site in found.items() if self.m is None or indivisible(site, self.m) is None]
        nodes = [node for graph in regions(model).values() for node in graph.graph.nodes if node.op.startswith("call")]
        self._total = sum(macs(node) for node in nodes)
        self._by_layer = {name: sum(macs(n) for n in nodes if ops.owner_name(n) == name) for name in self.names}

    def steps(self, low: float, high: float, count: int) -> list[float]:
        if self.m is not None:
            return [n / self.m for n in range(1, self.m) if low <= n / self.m <= high]
        return _spaced(low, high, count)

    def plan(self, shares: Mapping[str, float]) -> Plan:
        asked = {name: share for name, share in shares.items() if share}
        return self.pruner.plan(asked) if asked else Plan()

    def pruned(self, shares: Mapping[str, float]) -> fx.GraphModule:
        return _run(self.plan(shares), self.model, self.call)

    def macs(self, shares: Mapping[str, float]) -> float:
        saved = sum(share * self._by_layer[name] for name, share in shares.items())
        return 1 - saved / self._total if self._total else 1.0


class Channels:
    """Channels, group by group."""

    def __init__(self, model: fx.GraphModule, call: Arguments | None, options: Mapping[str, Any]) -> None:
        if call is None:
            raise ConfigError("structured analysis needs shapes: give example_inputs, or data that can be read again.")
        self.model, self.call = model, call
        self.pruner = StructuredPruner(**{"round_to": 1, "prove": False, "progress": False, **options})
        self.names = [group.name for group in self.pruner.groups(model, call) if group.size > 1]
        self._dense = cost(model).macs

    def steps(self, low: float, high: float, count: int) -> list[float]:
        return _spaced(low, high, count)

    def plan(self, shares: Mapping[str, float]) -> Plan:
        asked = {name: share for name, share in shares.items() if share}
        return self.pruner.plan(sparsity=0.0, layers=asked) if asked else Plan()

    def pruned(self, shares: Mapping[str, float]) -> fx.GraphModule:
        return _run(self.plan(shares), self.model, self.call)

    def macs(self, shares: Mapping[str, float]) -> float:
        return cost(self.pruned(shares)).macs / self._dense if self._dense else 1.0


def _run(plan: Plan, model: fx.GraphModule, call: Arguments | None) -> fx.GraphModule:
    if not plan.steps:
        return copy.deepcopy(model)
    return PassManager(plan, verify=False, reproducer=False, progress=False).run(model, call)


def _spaced(low: float, high: float, count: int) -> list[float]:
    points = torch.linspace(low, high, count, dtype=torch.float64, device="cpu").tolist() if count > 1 else [high]
    return [round(point, 6) for point in points]
