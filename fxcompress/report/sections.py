"""The parts of a report, each from the facts it shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from xml.etree.ElementTree import Element

from fxcompress.html.markup import Child, name, tag
from fxcompress.html.plots import bars, columns
from fxcompress.html.tables import box, table
from fxcompress.ledger import HEADERS, Ledger, cells
from fxcompress.pass_base import Figures
from fxcompress.pruning.sensitivity_page import sensitivity_parts
from fxcompress.report.changes import Line, counts
from fxcompress.report.drawing import MARKS, draw, draw_alone
from fxcompress.report.facts import Case, Layer, Measure

__all__ = ["case_sections", "decibels"]


def case_sections(case: Case, anchor: str, level: int = 2) -> Element:
    """Everything about one compressed model under headings of ``level``, with links whose names begin with ``anchor``."""
    parts: list[tuple[str, Child]] = [
        ("Before and after", _cards(case)),
        ("Ledger", _ledgers(case)),
        ("Layers", _layers(case.layers)),
        ("Sensitivity", _sensitivity(case)),
        ("Graph", _graph(case.lines) if case.compared else _graph_alone(case.lines)),
        ("Left alone, and why", _left_alone(case)),
        (
            "Plan",
            [tag("details", tag("summary", _run_title(n, case)), _plan(text)) for n, (text, _) in enumerate(case.runs)],
        ),
    ]
    shown = [(title, content) for title, content in parts if content is not None]
    links = [tag("li", tag("a", title, href=f"#{anchor}-{n}")) for n, (title, _) in enumerate(shown)]
    sections = [
        tag("section", tag(f"h{level}", title, id=f"{anchor}-{n}"), content) for n, (title, content) in enumerate(shown)
    ]
    return tag("div", tag("nav", tag("ul", links), aria_label=f"Parts of {case.title}"), sections)


# before and after


def _cards(case: Case) -> Child:
    notes = [tag("p", f"Not measured: {reason}", class_="soft") for reason in case.unknown]
    return [tag("dl", map(_card, case.measures), class_="cards"), notes]


def _card(measure: Measure) -> Element:
    before, after, unit = measure.before, measure.after, measure.unit
    body: list[Child] = [tag("dd", _shown(after, unit), class_="value")]
    if before is not None:
        body.append(tag("dd", f"from {_shown(before, unit)}{_verdict(measure)}", class_="note"))
        most = max(abs(before), abs(after)) or 1.0
        sizes = (("was", 0, abs(before) / most), ("now", 7, abs(after) / most))
        drawn = [tag("rect", x=0, y=y, height=5, width=100 * share, class_=kind) for kind, y, share in sizes]
        body.append(tag("dd", tag("svg", drawn, viewBox="0 0 100 12", preserveAspectRatio="none", aria_hidden="true")))
    return tag("div", tag("dt", measure.title), body, class_="card")


def _shown(value: float, unit: str) -> str:
    if unit == "dB":
        return decibels(value) + (" dB" if math.isfinite(value) else "")
    digits = f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:,.4g}"
    return f"{digits} {unit}".rstrip()


def _verdict(measure: Measure) -> str:
    """How much better or worse, in words: a ratio for what shrinks, a difference for what is judged."""
    before, after = measure.before or 0.0, measure.after
    if before == after:
        return ", unchanged"
    if not measure.unit:
        return f", {after - before:+.4g}"
    if not before or not after:
        return ""
    ratio, word = (before / after, "less") if after < before else (after / before, "more")
    return f", {ratio:.2f}× {word}" if ratio >= 1.1 else f", {abs(after / before - 1):.2%} {word}"


def decibels(value: float | None) -> str:
    """An SNR as the ledger writes it."""
    if value is None or math.isnan(value):
        return ""
    return ("exact" if value > 0 else "none") if math.isinf(value) else f"{value:.1f}"


# the ledger


def _ledgers(case: Case) -> Child:
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


def _run_title(number: int, case: Case) -> str:
    return f"The passes that ran, as a plan{_of_run(number, case)}"


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


def _plan(text: str) -> Element:
    return box("The plan", tag("pre", text.rstrip()))


# layers

_COLUMNS: tuple[tuple[str, Callable[[Layer], str]], ...] = (
    ("parameters before", lambda layer: _count(layer.before)),
    ("after", lambda layer: _count(layer.after)),
    ("zeros", lambda layer: _percent(layer.zeros)),
    ("weight SNR dB", lambda layer: decibels(layer.weight_snr)),
    ("result SNR dB", lambda layer: decibels(layer.output_snr)),
    ("own SNR dB", lambda layer: decibels(layer.own_snr)),
    ("runs in", lambda layer: layer.place),
)
"""What the table of layers tells; a column without any entry is left out."""


def _layers(layers: Sequence[Layer]) -> Child:
    if not layers:
        return None
    plots = [plot for plot in (_snr_plot(layers), _zeros_plot(layers), _size_plot(layers)) if plot is not None]
    used = [(title, said) for title, said in _COLUMNS if any(said(layer) for layer in layers)]
    headers = ("layer", *(title for title, _ in used))
    rows: list[Sequence[Child]] = [(name(layer.name), *(said(layer) for _, said in used)) for layer in layers]
    words = [place for place, title in enumerate(headers) if title in ("layer", "runs in")]
    listing = table(f"{len(layers)} layers, from input to output", headers, rows, left=words, tall=len(rows) > 16)
    return [tag("div", plots, class_="plots"), tag("h3", "Layer by layer"), listing]


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _snr_plot(layers: Sequence[Layer]) -> Element | None:
    known = [layer for layer in layers if layer.output_snr is not None]
    if not known:
        return None
    series = {"whole error": [_number(layer.output_snr) for layer in known]}
    if any(layer.own_snr is not None for layer in known):
        series["the layer's own error"] = [_number(layer.own_snr) for layer in known]
    worst = sorted(
        (layer for layer in known if math.isfinite(_number(layer.output_snr))), key=lambda one: _number(one.output_snr)
    )
    said = ", ".join(f"{layer.name} {decibels(layer.output_snr)} dB" for layer in worst[:3])
    exact = sum(1 for layer in known if layer.output_snr == math.inf)
    summary = (f"Lowest: {said}. " if said else "") + (
        f"{exact} of {len(known)} results are the same bits." if exact else ""
    )
    return columns("Signal to noise by layer", summary.strip(), "dB", [layer.name for layer in known], series)


def _zeros_plot(layers: Sequence[Layer]) -> Element | None:
    known = [layer for layer in layers if layer.zeros is not None]
    if not any(layer.zeros for layer in known):
        return None
    most = sorted(known, key=lambda layer: -_number(layer.zeros))[:3]
    summary = "Most zeros: " + ", ".join(f"{layer.name} {_percent(layer.zeros)}" for layer in most) + "."
    shares = {"zeros": [100 * _number(layer.zeros) for layer in known]}
    return columns("Zeros among the weights by layer", summary, "%", [layer.name for layer in known], shares)


def _size_plot(layers: Sequence[Layer]) -> Element | None:
    """Parameters that are left, where a layer became smaller and is still there."""
    known = [layer for layer in layers if layer.before and layer.after]
    smaller = [layer for layer in known if (layer.after or 0) < 0.95 * (layer.before or 0)]
    if not smaller:
        return None
    left = {layer.name: 100 * (layer.after or 0) / (layer.before or 1) for layer in known}
    most = sorted(smaller, key=lambda layer: left[layer.name])[:3]
    summary = "Least left: " + ", ".join(f"{layer.name} {left[layer.name]:.1f}%" for layer in most) + "."
    return columns("Parameters left by layer", summary, "%", list(left), {"parameters left": list(left.values())})


def _number(value: float | None) -> float:
    return math.nan if value is None else value


# sensitivity

_BARS = 30


def _sensitivity(case: Case) -> Child:
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


# the graph


def _graph_alone(lines: Sequence[Line]) -> Child:
    return [
        tag("p", "Operators from input to output. Lines in the margin are results that are read further on.", class_="soft"),
        draw_alone(lines),
    ]


def _graph(lines: Sequence[Line]) -> Child:
    moved = [line for line in lines if line.status != "same"]
    rows = [(name(_named(line)), f"{MARKS[line.status]} {line.status}", line.difference) for line in moved]
    found = counts(lines)
    listing = table(
        f"{len(moved)} of {len(lines)} operators",
        ("operator", "", "what changed"),
        rows,
        left=(0, 1, 2),
        tall=len(rows) > 16,
    )
    return [
        tag("p", "Operators from input to output, matched by name: on the left as they were, on the right as they are. "
                 "Lines in the margins are results that are read further on.", class_="soft"),
        draw(lines),
        tag("details", tag("summary", f"What changed, as a table ({found['added']} added, {found['removed']} removed, "
                                      f"{found['changed']} changed)"), listing) if moved else None,
    ]  # fmt: skip


def _named(line: Line) -> str:
    operator = line.after or line.before
    assert operator is not None
    return operator.name


# what was left alone


def _left_alone(case: Case) -> Child:
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
    head = (
        f"{case.after.mac_share:.1%} of the multiply-accumulates and {case.after.integer_nodes:,} of "
        f"{case.after.total_nodes:,} operators run in integers."
    )
    return [said, [tag("h3", "Left in float"), tag("p", head), listing] if floats else None]


def _reasons(ledger: Ledger, run: str) -> Iterable[tuple[Child, ...]]:
    for step, reason, nodes in ledger.reasons():
        where = [[", " if place else "", name(node)] for place, node in enumerate(nodes)]
        shown: Child = where if len(nodes) <= 6 else tag("details", tag("summary", f"{len(nodes)} places"), where)
        yield [name(step), run], tag("span", reason, class_="wrap"), tag("div", shown, class_="wrap")
