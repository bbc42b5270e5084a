"""Channel pruning by and by: what a schedule asks, counted in the channels of the dense model."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxcompress.errors import ConfigError
from fxcompress.pruning.structured_pruner import StructuredPruner

__all__ = ["GradualPruner"]


class GradualPruner:
    """Lets a scheduler drive a :class:`StructuredPruner` during training.

    Every :meth:`prune_step` takes from each group what is missing to ``round(sparsity · units)`` of the units that the dense
    model had, so that however many steps there are, the end is exact. The pruner's own ``sparsity`` and ``target`` count for
    nothing; a ``round_to`` above 1 would undo small steps and is refused.
    """

    def __init__(self, pruner: StructuredPruner, example_inputs: Any = None) -> None:
        if pruner.options["round_to"] != 1:
            raise ConfigError(f"round_to is {pruner.options['round_to']}; pruning by and by needs a pruner with round_to=1.")
        self.pruner, self.example_inputs = pruner, example_inputs
        self.dense: dict[str, int] = {}

    def prune_step(self, model: nn.Module, sparsity: float) -> nn.Module:
        """The model with this share of the dense model's channels gone; ``model`` itself where none are missing."""
        sizes = {group.name: group.size for group in self.pruner.groups(model, self.example_inputs)}
        for name, size in sizes.items():
            self.dense.setdefault(name, size)
        missing = {name: round(sparsity * self.dense[name]) - (self.dense[name] - size) for name, size in sizes.items()}
        shares = {name: min(count, sizes[name] - 1) / sizes[name] for name, count in missing.items() if count > 0}
        if not any(shares.values()):
            return model
        plan = self.pruner.get_pruning_plan(model, shares, self.example_inputs)
        return self.pruner.prune(model, plan, self.example_inputs)

    def state_dict(self) -> dict[str, Any]:
        """The sizes that the groups of the dense model had."""
        return {"dense": dict(self.dense)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dense = {str(name): int(size) for name, size in state["dense"].items()}
