"""Channel pruning by and by: what a schedule asks, counted in the channels of the dense model."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxcompress.pruning.structured_pruner import StructuredPruner

__all__ = ["GradualPruner"]


class GradualPruner:
    """Lets a scheduler drive a :class:`StructuredPruner` during training.

    Every :meth:`prune_step` takes what is missing to the share of the dense model's channels, rounded as the pruner rounds,
    so that however many steps there are, they end where a single one would. The pruner's own ``sparsity`` and ``target``
    count for nothing. What earlier steps took stands in the model itself, and is saved with it.
    """

    def __init__(self, pruner: StructuredPruner, example_inputs: Any = None) -> None:
        self.pruner, self.example_inputs = pruner, example_inputs
        self.steps = 0

    def prune_step(self, model: nn.Module, sparsity: float) -> nn.Module:
        """The model with this share of the dense model's channels gone; ``model`` itself where none are missing."""
        plan = self.pruner.get_pruning_plan(model, sparsity, self.example_inputs, earlier=self.steps)
        if not plan.sparsity:
            return model
        self.steps += 1
        return self.pruner.prune(model, plan, self.example_inputs)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps that pruned something."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])
