"""One run of a benchmark: what the caller chose, and where tables and progress go."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tabulate import tabulate

from benchmarks.peer_process import Peers

__all__ = ["QUICK", "Run"]

T = TypeVar("T")
QUICK = ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5")
"""The models of a quick sweep."""


@dataclass
class Run:
    """``quick`` asks for few rounds and small cases; ``models`` for some models only; ``peers`` is their Python."""

    quick: bool = False
    peers: Path | None = None
    models: tuple[str, ...] = ()
    sample: int | None = None
    seed: int = 0
    tables: list[dict[str, Any]] = field(default_factory=list)

    def pick(self, full: T, quick: T) -> T:
        return quick if self.quick else full

    def chosen(self, full: Sequence[str], quick: Sequence[str]) -> tuple[str, ...]:
        """The models the caller named, or the benchmark's own."""
        return self.models or tuple(self.pick(full, quick))

    def peer_process(self, threads: int = 1) -> Peers:
        return Peers(self.peers, threads)

    def tell(self, what: str) -> None:
        """Where a long run stands, apart from the tables."""
        print(time.strftime("%H:%M:%S"), what, file=sys.stderr, flush=True)

    def table(self, title: str, rows: Sequence[dict[str, Any]]) -> None:
        """Print the rows and keep them for the file."""
        self.tables.append({"title": title, "rows": list(rows)})
        heads = list(dict.fromkeys(head for row in rows for head in row))
        cells = [[_cell(row.get(head)) for head in heads] for row in rows]
        print(f"\n{title}", tabulate(cells, heads, disable_numparse=True), sep="\n", flush=True)

    def sweep(self, examine: Callable[[str], dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
        """A row for every model, the ones that fail included; progress as it goes."""
        chosen = self.chosen(names, QUICK)
        if self.sample is not None and self.sample < len(chosen):
            chosen = tuple(sorted(random.Random(self.seed).sample(chosen, self.sample)))
        rows: list[dict[str, Any]] = []
        for name in chosen:
            try:
                rows.append(examine(name))
            except Exception as error:  # a failure is a row of the table
                rows.append({"model": name, "failed": f"{type(error).__name__}: {str(error)[:400]}"})
            self.tell(f"{len(rows)} of {len(chosen)}: {', '.join(_cell(value) for value in rows[-1].values())}")
        return rows


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"
