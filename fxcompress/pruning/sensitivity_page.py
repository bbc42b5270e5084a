"""A sensitivity analysis on a page: curves, scores, what is recommended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxcompress.html.markup import Child, name, page, tag
from fxcompress.html.plots import bars, curves
from fxcompress.html.tables import box, table

if TYPE_CHECKING:
    from fxcompress.pruning.sensitivity_report import Summary

__all__ = ["sensitivity_page", "sensitivity_parts"]

_BARS = 30


def sensitivity_page(summary: Summary) -> str:
    """The analysis as a page of its own."""
    return page("Sensitivity to pruning", sensitivity_parts(summary))


def sensitivity_parts(summary: Summary) -> Child:
    """The analysis under a heading of somebody else's, for a page that shows more."""
    ranked = summary.ranked()
    worst = {part: summary.scores[part] for part in ranked[:_BARS]}
    said = ", ".join(f"{part} {score:.4g}" for part, score in list(worst.items())[:3])
    title = f"{summary.metric} with one part pruned"
    plots = [
        curves(
            title,
            f"The dense model's {summary.metric} is {summary.baseline:.6g}. Most sensitive: {', '.join(ranked[:3])}.",
            ("sparsity of one part", summary.metric),
            {part: summary.curves[part] for part in ranked},
            ("dense", summary.baseline),
        ),
        bars(f"How much worse {summary.metric} is, in the mean", f"The larger, the more sensitive: {said}.", "", worst),
    ]
    header, rows = summary.table()
    cells: list[list[Child]] = [[name(row[0]), *map(_number, row[1:])] for row in rows]
    return [
        tag("p", f"{summary.pruning_type.replace('_', '-')} pruning, one part of the model at a time.", class_="soft"),
        tag("div", plots, class_="plots"),
        tag("h3", "Part by part"),
        table(f"{summary.metric} at every sparsity of {len(rows)} parts", header, cells, tall=len(rows) > 16),
        _advice(summary),
    ]


def _number(value: Any) -> str:
    return f"{value:.4g}"


def _advice(summary: Summary) -> Child:
    advice = summary.recommendation
    if advice is None:
        return None
    found = (
        f"All together: {summary.metric} {advice.metric:.6g} with {advice.macs:.1%} of the multiply-accumulates. The plan:"
    )
    return [tag("h3", "Recommended"), tag("p", found), box("The recommended plan", tag("pre", str(advice.plan).rstrip()))]
