"""A pruning plan: which units of which channel groups go. It prints, is edited, saved, and applied to a fresh model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from tabulate import tabulate

from fxcompress.errors import ConfigError, did_you_mean, shown
from fxcompress.files import read_text, write_text
from fxcompress.graph.channels import ChannelGroup
from fxcompress.options import only
from fxcompress.yaml_text import read_yaml

__all__ = ["GroupPlan", "PruningPlan"]


@dataclass
class GroupPlan:
    """One group: its number of units (``size``, in ``blocks`` of equal size) and the positions of those that go."""

    size: int
    remove: list[int]
    blocks: int = 1

    @property
    def kept(self) -> int:
        """The number of units that stay."""
        return self.size - len(self.remove)


@dataclass
class PruningPlan:
    """Group → what goes from it; ``options`` are the analysis options under which the groups were found.

    ``str(plan)`` is a table; :meth:`save` and :meth:`load` keep it as YAML. Edit ``groups[name].remove``, or
    :meth:`veto` a group.
    """

    groups: dict[str, GroupPlan] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def veto(self, *names: str) -> PruningPlan:
        """Keep every unit of these groups; returns the plan. Raises ConfigError for a name it does not have."""
        for name in names:
            if name not in self.groups:
                raise ConfigError(f"the plan has no group {name!r}.{did_you_mean(name, self.groups)}")
            self.groups[name].remove = []
        return self

    @property
    def sparsity(self) -> float:
        """The share of units that go."""
        total = sum(group.size for group in self.groups.values())
        return sum(len(group.remove) for group in self.groups.values()) / total if total else 0.0

    def as_data(self) -> dict[str, Any]:
        """Plain data, the inverse of :meth:`from_data`."""
        groups = {
            name: {"size": g.size, "remove": list(g.remove), **({"blocks": g.blocks} if g.blocks != 1 else {})}
            for name, g in self.groups.items()
        }
        return {"groups": groups, "options": dict(self.options)}

    @classmethod
    def from_data(cls, data: Any) -> PruningPlan:
        """A plan from plain data; ConfigError names what is wrong in it."""
        if not isinstance(data, Mapping) or not isinstance(data.get("groups"), Mapping):
            raise ConfigError("a pruning plan is a mapping with 'groups': {name: {size: …, remove: […]}}.")
        only(data, ("groups", "options"), ())
        options = data.get("options") or {}
        if not isinstance(options, Mapping):
            raise ConfigError(f"the options of a pruning plan are {shown(options)}; they are a mapping.")
        groups = {str(name): _group(str(name), entry) for name, entry in data["groups"].items()}
        return cls(groups, dict(options))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as YAML; the file appears whole or not at all."""
        write_text(path, yaml.safe_dump(self.as_data(), sort_keys=False))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningPlan:
        """Read a plan that :meth:`save` wrote; ConfigError where the file is missing or damaged."""
        try:
            data = read_yaml(read_text(path))
        except (OSError, ValueError) as error:  # PlanError is one
            raise ConfigError(f"{shown(path)} is not a pruning plan: {error}") from error
        try:
            return cls.from_data(data)
        except ConfigError as error:
            raise ConfigError(f"{shown(path)}: {error}") from error

    def __str__(self) -> str:
        rows = [
            (name, g.blocks, g.size, g.kept, f"{len(g.remove) / g.size:.1%}" if g.size else "")
            for name, g in self.groups.items()
        ]
        return tabulate(rows, ("channel group", "blocks", "units", "kept", "removed"), disable_numparse=True)

    def check(self, groups: Iterable[ChannelGroup]) -> None:
        """Raise ConfigError naming every group that does not fit what a model has."""
        found = {group.name: group for group in groups}
        wrong = []
        for name, plan in self.groups.items():
            if name not in found:
                wrong.append(f"no group is called {name!r}.{did_you_mean(name, found)}")
                continue
            group = found[name]
            if (plan.size, plan.blocks) != (group.size, len(group.blocks)):
                wrong.append(
                    f"{name!r} has {group.size} units in {len(group.blocks)} block(s), not {plan.size} in {plan.blocks}"
                )
            elif problem := _unequal(plan):
                wrong.append(f"{name!r}: {problem}")
        if wrong:
            raise ConfigError("the pruning plan does not fit the model:\n  " + "\n  ".join(wrong))


def _group(name: str, entry: Any) -> GroupPlan:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("size"), int):
        raise ConfigError(f"group {name!r} of a pruning plan needs size and remove.")
    only(entry, ("size", "remove", "blocks"), ("groups", name))
    remove, size, blocks = entry.get("remove", []), entry["size"], entry.get("blocks", 1)
    if not isinstance(remove, (list, tuple)) or any(isinstance(i, bool) or not isinstance(i, int) for i in remove):
        raise ConfigError(f"group {name!r}: remove is a list of positions.")
    if any(not 0 <= i < size for i in remove) or len(set(remove)) < len(remove):
        raise ConfigError(f"group {name!r}: positions to remove are distinct numbers from 0 to {size - 1}.")
    if not isinstance(blocks, int) or blocks < 1 or size % blocks:
        raise ConfigError(f"group {name!r}: {size} units are not {blocks!r} equal blocks.")
    return GroupPlan(size, sorted(remove), blocks)


def _unequal(plan: GroupPlan) -> str:
    """Why a group's removals are not allowed; an empty string where they are."""
    if len(plan.remove) >= plan.size:
        return "nothing of it would be left"
    each = plan.size // plan.blocks
    counts = {sum(1 for i in plan.remove if i // each == block) for block in range(plan.blocks)}
    return f"its {plan.blocks} blocks must lose equal numbers" if len(counts) > 1 else ""
