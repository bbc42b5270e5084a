"""What the runs of a model's history told: ledgers, plans, measurements, remarks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element

from fxcompress.html.markup import Child, name, tag
from fxcompress.html.plots import bars
from fxcompress.html.tables import box, table
from fxcompress.ledger import HEADERS, Ledger, cells
from fxcompress.pass_base import Figures
from fxcompress.pruning.sensitivity_page import sensitivity_parts
from fxcompress.report.facts import Case

__all__ = ["ledgers", "left_alone", "plans", "sensitivity"]


def ledgers(case: Case) -> Child:
    """A table per run: a row per pass."""
    if not case.runs:
        return tag("p", "The model carries no ledger: no run of passes made it.", class_="soft")
    return [
        (_ledger(f"A row per pass{_of_run(n, case)}", ledger), map(_note, ledger.notes))
        for n, (_, ledger) in enumerate(case.runs)
    ]


def _note(text: str) -> Element:
    return tag("p", text)


def _of_run(number: int, case: Case) -> str:
    return f", run {number + 1} of {len(case.runs)}" if len(case.runs) > 1 else ""


def _ledger(caption: str, ledger: Ledger) -> Element:
    rows: list[list[Child]] = []
    previous: Sequence[str] = ()
    for row in ledger.rows:
        found = cells(row)
        rows.append(
            [
                name(found[0]),
                *(_moved(old, new) for old, new in zip(previous[1:-1] or found[1:-1], found[1:-1], strict=True)),
                found[-1],
            ]
        )
        previous = found
    return table(caption, HEADERS, rows)


def _moved(old: str, new: str) -> Child:
    """A number that the pass changed stands out."""
    return new if old == new else tag("span", new, class_="moved")


def plans(case: Case) -> Child:
    """The plan of every run, folded away."""
    return [_plan(f"The passes that ran, as a plan{_of_run(n, case)}", text) for n, (text, _) in enumerate(case.runs)]


def _plan(title: str, text: str) -> Element:
    return tag("details", tag("summary", title), box("The plan", tag("pre", text.rstrip())))


_BARS = 30


def sensitivity(case: Case) -> Child:
    """What passes measured of layers, and the analysis that was given."""
    plots = [
        _figures(figures, row.step, _of_run(n, case))
        for n, (_, ledger) in enumerate(case.runs)
        for row in ledger.rows
        for figures in row.figures
        if figures.values
    ]
    analysis = case.sensitivity
    given = None if analysis is None else [tag("h3", "Sensitivity to pruning"), sensitivity_parts(analysis)]
    return [tag("div", plots, class_="plots") if plots else None, given] if plots or given else None


def _figures(figures: Figures, step: str, run: str) -> Element:
    ranked = sorted(figures.values, key=lambda layer: -figures.values[layer])
    worst = {layer: figures.values[layer] for layer in ranked[:_BARS]}
    listed = f"the {len(worst)} largest of {len(ranked)}" if len(ranked) > len(worst) else f"{len(ranked)} layers"
    return bars(figures.title, f"Measured by {step}{run}; {listed}.", figures.unit, worst)


def left_alone(case: Case) -> Child:
    """What passes did not do and why, and which operators run in float."""
    rows = [row for n, (_, ledger) in enumerate(case.runs) for row in _reasons(ledger, _of_run(n, case))]
    said = (
        table(f"{len(rows)} remarks", ("pass", "why", "where"), rows, left=(0, 1, 2), tall=len(rows) > 16) if rows else None
    )
    quantized = case.after.integer_nodes > 0
    floats = [(name(row.node), row.kind, f"{row.macs:,}", row.reason) for row in case.after.floats] if quantized else []
    headers = ("operator", "kind", "multiply-accumulates", "why")
    listing = table(f"{len(floats)} operators run in float", headers, floats, left=(0, 1, 3), tall=len(floats) > 16)
    if not rows and not floats:
        return tag("p", "Nothing was left alone.", class_="soft")
    share = f"{case.after.mac_share:.1%}" if case.after.counted else "An unknown share"
    head = (
        f"{share} of the multiply-accumulates and {case.after.integer_nodes:,} of "
        f"{case.after.total_nodes:,} operators run in integers."
    )
    return [said, [tag("h3", "Left in float"), tag("p", head), listing] if floats else None]


def _reasons(ledger: Ledger, run: str) -> Iterable[tuple[Child, ...]]:
    for step, reason, nodes in ledger.reasons():
        where = [[", " if place else "", name(node)] for place, node in enumerate(nodes)]
        shown: Child = where if len(nodes) <= 6 else tag("details", tag("summary", f"{len(nodes)} places"), where)
        yield [name(step), run], tag("span", reason, class_="wrap"), tag("div", shown, class_="wrap")
