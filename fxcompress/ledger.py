"""The ledger: a row per pass, and under it every remark: what was left alone, and why."""

from __future__ import annotations

import functools
import json
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pydantic
from tabulate import tabulate

from fxcompress.files import write_text
from fxcompress.pass_base import Figures, Remark

__all__ = ["HEADERS", "Ledger", "Row", "cells"]

_SHOWN = 4
"""Nodes that a printed remark names; more are counted."""

HEADERS = ("pass", "nodes", "parameters", "MACs", "MB", "zeros", "SNR dB", "seconds")


@dataclass(frozen=True)
class Row:
    """One pass: the totals of the graph it left, and how far the outputs are from the original model's.

    ``snr``       10·log10 of output power over error power against the original model; inf: same bits; None: not measured
    ``sparsity``  share of weight elements that are zero
    ``figures``   what the pass measured of layers
    ``counted``   whether ``macs`` are known: they are not where no example inputs tell the shapes
    """

    step: str
    nodes: int
    parameters: int
    macs: int
    bytes: int
    sparsity: float
    snr: float | None
    seconds: float
    remarks: tuple[Remark, ...] = ()
    figures: tuple[Figures, ...] = ()
    counted: bool = True


@dataclass
class Ledger:
    """The rows of one run, in order."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Append the row of a pass that has run."""
        self.rows.append(row)

    def remarks(self, step: str | None = None) -> list[Remark]:
        """Every remark, or those of one pass."""
        return [remark for row in self.rows if step in (None, row.step) for remark in row.remarks]

    def __str__(self) -> str:
        table = tabulate([cells(row) for row in self.rows], HEADERS, disable_numparse=True, colalign=_ALIGN)
        lines = [table, *self.notes]
        for step, reason, nodes in self.reasons():
            more = f" and {len(nodes) - _SHOWN} more" if len(nodes) > _SHOWN else ""
            lines.append(f"  {step}: {', '.join(nodes[:_SHOWN])}{more}: {reason}")
        return "\n".join(lines)

    def reasons(self) -> list[tuple[str, str, list[str]]]:
        """Every pass with a remark, the reason, and the nodes it was given for, in order."""
        found: list[tuple[str, str, list[str]]] = []
        for row in self.rows:
            nodes: dict[str, list[str]] = defaultdict(list)
            for remark in row.remarks:
                nodes[remark.reason].append(remark.node or "model")
            found += [(row.step, reason, where) for reason, where in nodes.items()]
        return found

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON; an infinite SNR is written as the string ``exact``."""
        rows = []
        for row in self.rows:
            data = asdict(row)
            data["snr"] = "exact" if row.snr is not None and math.isinf(row.snr) else row.snr
            rows.append(data)
        return {"rows": rows, "notes": list(self.notes)}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Ledger:
        """The inverse of :meth:`as_data`; LookupError, TypeError or ValueError where the data are no ledger."""
        rows = [{**row, "snr": math.inf if row["snr"] == "exact" else row["snr"]} for row in data["rows"]]
        return _ledgers().validate_python({"rows": rows, "notes": list(data.get("notes", ()))})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ledger as JSON; the file appears whole or not at all."""
        write_text(path, json.dumps(self.as_data(), indent=1))


@functools.cache
def _ledgers() -> pydantic.TypeAdapter[Ledger]:
    return pydantic.TypeAdapter(Ledger)


_ALIGN = ("left", *("right",) * (len(HEADERS) - 1))


def cells(row: Row) -> Sequence[str]:
    """A row as it is printed, under :data:`HEADERS`."""
    snr = "" if row.snr is None else "exact" if math.isinf(row.snr) else f"{row.snr:.1f}"
    return (
        row.step,
        str(row.nodes),
        f"{row.parameters:,}",
        f"{row.macs / 1e6:,.1f}M" if row.counted else "unknown",
        f"{row.bytes / 1e6:.2f}",
        f"{row.sparsity:.1%}",
        snr,
        f"{row.seconds:.3f}",
    )
