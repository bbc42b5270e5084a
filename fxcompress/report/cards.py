"""What a model was and is, each figure on a card."""

from __future__ import annotations

import math
from xml.etree.ElementTree import Element

from fxcompress.html.markup import Child, tag
from fxcompress.report.facts import Case, Measure

__all__ = ["cards", "decibels"]


def cards(case: Case) -> Child:
    """The figures before and after, each on a card, and what could not be measured."""
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
