"""A plan of layers to leave out. It prints, is edited, saved, and applied to a fresh model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from tabulate import tabulate

from fxcompress.errors import ConfigError, did_you_mean, shown
from fxcompress.files import read_text, write_text
from fxcompress.options import only
from fxcompress.yaml_text import read_yaml

__all__ = ["LayerPlan", "PartPlan"]


@dataclass
class PartPlan:
    """One removable part: its score, and whether it goes."""

    score: float
    remove: bool


@dataclass
class LayerPlan:
    """Part → whether it goes. ``str(plan)`` is a table; edit ``parts[name].remove``, or :meth:`veto` parts."""

    parts: dict[str, PartPlan] = field(default_factory=dict)
    units: str = "auto"

    @property
    def removed(self) -> list[str]:
        """The parts that go, in graph order."""
        return [name for name, part in self.parts.items() if part.remove]

    def veto(self, *names: str) -> LayerPlan:
        """Keep these parts; returns the plan. Raises ConfigError for a name it does not have."""
        for name in names:
            if name not in self.parts:
                raise ConfigError(f"the plan has no part {name!r}.{did_you_mean(name, self.parts)}")
            self.parts[name].remove = False
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as YAML; the file appears whole or not at all."""
        parts = {name: {"score": part.score, "remove": part.remove} for name, part in self.parts.items()}
        write_text(path, yaml.safe_dump({"units": self.units, "parts": parts}, sort_keys=False))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LayerPlan:
        """Read a plan that :meth:`save` wrote; ConfigError where the file is missing or damaged."""
        try:
            data = read_yaml(read_text(path))
        except (OSError, ValueError) as error:  # PlanError is one
            raise ConfigError(f"{shown(path)} is not a plan of layers: {error}") from error
        try:
            return cls._from_data(data)
        except ConfigError as error:
            raise ConfigError(f"{shown(path)} is not a plan of layers: {error}") from error

    @classmethod
    def _from_data(cls, data: Any) -> LayerPlan:
        if not isinstance(data, Mapping) or not isinstance(data.get("parts"), Mapping):
            raise ConfigError("it is a mapping with 'parts': {name: {score: …, remove: …}}.")
        only(data, ("units", "parts"), ())
        units = data.get("units", "auto")
        if units not in _UNITS:
            raise ConfigError(f"units is {shown(units)}; it is {', '.join(_UNITS[:-1])} or {_UNITS[-1]}.")
        return cls({str(name): _part(str(name), entry) for name, entry in data["parts"].items()}, units)

    def __str__(self) -> str:
        rows = [(name, f"{part.score:.4g}", "goes" if part.remove else "stays") for name, part in self.parts.items()]
        return tabulate(rows, ("part", "score", ""), disable_numparse=True)


def _part(name: str, entry: Any) -> PartPlan:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("remove"), bool):
        raise ConfigError(f"part {shown(name)} needs remove: true or false.")
    only(entry, ("score", "remove"), ("parts", name))
    score = entry.get("score", 0.0)
    if isinstance(score, bool) or not isinstance(score, (int, float)) or (isinstance(score, int) and abs(score) > 1e300):
        raise ConfigError(f"part {shown(name)}: score is {shown(score)}; it is a number.")
    return PartPlan(float(score), entry["remove"])


_UNITS = ("auto", "blocks", "layers")
