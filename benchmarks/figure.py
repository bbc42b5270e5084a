"""A figure: what was measured, and what was asked of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

__all__ = ["COLUMNS", "Figure", "shown", "text"]

COLUMNS = ("figure", "value", "unit", "asked", "met", "note")


@dataclass(frozen=True)
class Figure:
    """One measured value; ``at_least`` or ``at_most`` is what was asked of it, neither where it only informs.

    ``value`` is None where it could not be measured; ``note`` then says why.
    """

    figure: str
    value: float | None
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""

    @property
    def asked(self) -> str:
        """The bound, as it is printed."""
        bounds = [
            f"{sign} {_number(bound)}" for sign, bound in (("≥", self.at_least), ("≤", self.at_most)) if bound is not None
        ]
        return ", ".join(bounds)

    @property
    def met(self) -> bool | None:
        """Whether the bound holds; None where nothing was asked or nothing was measured."""
        if not self.asked or self.value is None:
            return None
        if math.isnan(self.value):
            return False
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)

    def row(self) -> dict[str, Any]:
        """The columns, as they are saved; what JSON has no number for is saved as text."""
        value = self.value
        if value is not None and not math.isfinite(value):
            return {**self._rest(), "value": str(value)}
        return {**self._rest(), "value": value}

    def _rest(self) -> dict[str, Any]:
        values = {"unit": self.unit, "asked": self.asked, "met": self.met, "note": self.note}
        return {"figure": self.figure, "value": None, **values}


def shown(rows: Iterable[dict[str, Any]]) -> str:
    """Rows of figures as a table."""
    return tabulate([text(row) for row in rows], COLUMNS, disable_numparse=True)


def text(row: dict[str, Any]) -> list[str]:
    """The cells of a row, in the order of the columns."""
    met = {True: "yes", False: "NO", None: ""}
    cells = {**row, "value": _number(row["value"]), "met": met[row["met"]]}
    return [cells[column] for column in COLUMNS]


def _number(value: float | str | None) -> str:
    """Four digits that count, and counts as they are."""
    if value is None:
        return "not measured"
    if isinstance(value, str) or value == int(value):
        return value if isinstance(value, str) else f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
