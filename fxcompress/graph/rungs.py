"""Where a part of a model stands on the tracing ladder."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

__all__ = ["Rung", "has_islands", "join"]


@dataclass(frozen=True)
class Rung:
    """Where a part of the model stands: ``sized``, ``exported`` or ``island`` (or ``note``), and why it is not higher."""

    module: str
    rung: str
    reason: str


def has_islands(model: fx.GraphModule) -> bool:
    """Whether some part of a traced model stays Python, which may do anything with the values it is given."""
    return any(rung.rung == "island" for rung in model.meta["rungs"])


def join(*parts: str) -> str:
    """Reasons that hold together, empty ones left out."""
    return "; ".join(part for part in parts if part)
