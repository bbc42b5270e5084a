"""The model before the earlier steps of a schedule: what shares are counted of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fxcompress.graph.channels import ChannelGroup

__all__ = ["Dense", "dense_of"]


@dataclass(frozen=True)
class Dense:
    """Group → its ``units`` before the earlier steps, and those ``kept`` after them; ``cost``, the measured cost before."""

    units: Mapping[str, int] = field(default_factory=dict)
    kept: Mapping[str, int] = field(default_factory=dict)
    cost: float | None = None

    def size(self, group: ChannelGroup) -> int:
        """The units that a block of a group had; what it has, where its earlier ones are not known."""
        if self.kept.get(group.name) != group.size:
            return group.blocks.shape[1]
        return self.units[group.name] // len(group.blocks)

    def total(self, groups: Sequence[ChannelGroup]) -> tuple[int, int]:
        """All units before and those kept, with those of what is no group any more, as one that has one channel left."""
        names = self.units.keys() - {group.name for group in groups}
        before = sum(self.units[name] for name in names) + sum(self.size(group) * len(group.blocks) for group in groups)
        return before, sum(self.kept[name] for name in names) + sum(group.size for group in groups)


def dense_of(records: Sequence[Mapping[str, Any]], target: str | None) -> Dense:
    """What the records of earlier cuts, in order, say of the model before them, and of its cost in ``target``."""
    units: dict[str, int] = {}
    kept: dict[str, int] = {}
    for record in records:
        for name, group in record["groups"].items():
            units.setdefault(name, group["size"])
            kept[name] = group["size"] - len(group["remove"])
    return Dense(units, kept, records[0].get("dense", {}).get(target) if records else None)
