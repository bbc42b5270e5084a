"""What a sensitivity analysis found: as a figure, JSON, CSV or Markdown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from fxcompress.errors import ConfigError
from fxcompress.files import write_text
from fxcompress.plan import Plan
from fxcompress.pruning.sensitivity_page import sensitivity_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ENDINGS", "Recommendation", "Summary", "plot", "scores", "write"]


@dataclass(frozen=True)
class Recommendation:
    """Part → sparsity, with the metric and the share of MACs measured for all together, and the plan that does it."""

    shares: dict[str, float]
    metric: float
    macs: float
    plan: Plan


@dataclass(frozen=True)
class Summary:
    """All that a report shows."""

    metric: str
    pruning_type: str
    baseline: float
    scores: dict[str, float]
    curves: dict[str, dict[float, float]]
    recommendation: Recommendation | None

    @property
    def steps(self) -> list[float]:
        """The sparsities that were tried, in ascending order."""
        return sorted(next(iter(self.curves.values())))

    def ranked(self) -> list[str]:
        """Parts, the most sensitive first."""
        return sorted(self.scores, key=lambda name: -self.scores[name])

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """A header, and a row per part: its score, the metric at every sparsity, what is recommended."""
        shares = self.recommendation.shares if self.recommendation else None
        header = ["part", "score", *(f"{step:g}" for step in self.steps), *(["recommended"] if shares is not None else [])]
        rows = []
        for name in self.ranked():
            values = [self.curves[name][step] for step in self.steps]
            rows.append([name, self.scores[name], *values, *([shares[name]] if shares is not None else [])])
        return header, rows


def scores(baseline: float, curves: Mapping[str, Mapping[float, float]], sign: float) -> dict[str, float]:
    """Part → by how much the metric is worse than ``baseline``, mean over the sparsities; ``sign``: -1 for a loss."""
    return {name: sum(sign * (baseline - value) for value in curve.values()) / len(curve) for name, curve in curves.items()}


def write(summary: Summary, path: Path) -> None:
    """Write the report in the form its ending names; the file appears whole or not at all."""
    form = _FORMS.get(path.suffix.lower())
    if form is None:
        raise ConfigError(f"a report is written as {', '.join(_FORMS)}; {str(path)!r} ends in none of them.")
    write_text(path, form(summary))


def _json(summary: Summary) -> str:
    advice = summary.recommendation
    data: dict[str, Any] = {
        "metric": summary.metric,
        "pruning_type": summary.pruning_type,
        "baseline": summary.baseline,
        "scores": summary.scores,
        "curves": {name: {str(step): value for step, value in curve.items()} for name, curve in summary.curves.items()},
        "recommendation": None
        if advice is None
        else {"sparsity": advice.shares, "metric": advice.metric, "macs": advice.macs, "plan": str(advice.plan)},
    }
    return json.dumps(data, indent=1)


def _csv(summary: Summary) -> str:
    text = io.StringIO()
    header, rows = summary.table()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def _markdown(summary: Summary) -> str:
    header, rows = summary.table()
    lines = [
        "# Sensitivity to pruning",
        "",
        f"{summary.pruning_type}; {summary.metric} of the dense model: {summary.baseline:.6g}. A column per sparsity of one",
        "part; the score is how much worse that is than the dense model, in the mean.",
        "",
        tabulate(rows, header, tablefmt="github", floatfmt=".4g"),
    ]
    advice = summary.recommendation
    if advice is not None:
        lines += [
            "",
            f"Recommended together: {summary.metric} {advice.metric:.6g}, {advice.macs:.1%} of the MACs. The plan:",
        ]
        lines += ["", "```yaml", str(advice.plan).rstrip(), "```"]
    return "\n".join(lines) + "\n"


_FORMS: dict[str, Callable[[Summary], str]] = {
    ".json": _json,
    ".csv": _csv,
    ".md": _markdown,
    ".markdown": _markdown,
    ".html": sensitivity_page,
}
ENDINGS = tuple(_FORMS)
"""How files end that a report can be written to."""

_NAMED = 10
"""Curves that the legend names; the others are grey."""


def plot(summary: Summary) -> Figure:
    """Curves beside scores; the most sensitive parts are named. Raises ConfigError where matplotlib is not installed."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("a plot needs matplotlib, which is not installed: pip install matplotlib") from error
    ranked, shown = summary.ranked(), min(len(summary.curves), 40)
    figure = Figure(figsize=(13, max(5.0, 1.5 + 0.24 * shown)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    colours = {name: colormaps["tab10"](place) for place, name in enumerate(ranked[:_NAMED])}
    for name in reversed(ranked):
        curve = summary.curves[name]
        style = (
            {"color": colours[name], "label": name, "linewidth": 1.8}
            if name in colours
            else {"color": "0.8", "linewidth": 0.8}
        )
        left.plot(summary.steps, [curve[step] for step in summary.steps], marker="o", markersize=3, **style)
    left.axhline(summary.baseline, color="black", linestyle="--", linewidth=1, label="dense")
    left.set(
        xlabel="sparsity of one part", ylabel=summary.metric, title=f"{summary.pruning_type} pruning, one part at a time"
    )
    handles, labels = left.get_legend_handles_labels()
    left.legend(handles[::-1], labels[::-1], fontsize=8, loc="best")
    named = ranked[:shown][::-1]
    right.barh(range(shown), [summary.scores[n] for n in named], color=[colours.get(n, "0.7") for n in named])
    right.set_yticks(range(shown), named, fontsize=8)
    left_out = len(ranked) - shown
    title = "mean loss against the dense model" + (f" (the worst {shown} of {len(ranked)})" if left_out else "")
    right.set(xlabel=f"score ({summary.metric})", title=title)
    right.axvline(0, color="black", linewidth=0.8)
    return figure
