"""Where a part of a model stands on the tracing ladder."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Rung", "join"]


@dataclass(frozen=True)
class Rung:
    """Where a part of the model stands: ``sized``, ``exported`` or ``island`` (or ``note``), and why it is not higher."""

    module: str
    rung: str
    reason: str


def join(*parts: str) -> str:
    """Reasons that hold together, empty ones left out."""
    return "; ".join(part for part in parts if part)
