"""What a training run did: a row per epoch."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fxcompress.errors import ConfigError
from fxcompress.files import write_text

__all__ = ["History"]


@dataclass
class History:
    """A row per epoch: ``epoch``, ``step``, ``lr``, ``loss``; per loss term ``loss/NAME`` (before its weight),
    ``weight/NAME`` and ``gradient/NAME`` (its gradient norm on the epoch's first batch, before the weight as well); what the
    evaluation gave; ``seconds``.

    ``stopped``  why training ended before its last epoch, or an empty string
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    stopped: str = ""

    def __getitem__(self, name: str) -> list[float]:
        """One column."""
        return [row[name] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def columns(self) -> list[str]:
        """Every column that some row has, in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def __str__(self) -> str:
        names = self.columns()
        return tabulate([[row.get(name, "") for name in names] for row in self.rows], names, floatfmt=".4g")

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"rows": [dict(row) for row in self.rows], "stopped": self.stopped}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON or CSV, by the file's ending; the file appears whole or not at all."""
        target = Path(path)
        if target.suffix not in (".json", ".csv"):
            raise ConfigError(f"a history is saved as .json or .csv, not {target.suffix or 'without an ending'!r}.")
        text = json.dumps(self.as_data(), indent=1) if target.suffix == ".json" else self._csv()
        write_text(target, text, newline="")

    def _csv(self) -> str:
        out = io.StringIO()
        writer = csv.DictWriter(out, self.columns())
        writer.writeheader()
        writer.writerows(self.rows)
        return out.getvalue()
