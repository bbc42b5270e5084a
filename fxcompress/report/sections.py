"""The parts of a report, each from the facts it shows."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from fxcompress.html.markup import Child, name, tag
from fxcompress.html.tables import table
from fxcompress.report.cards import cards
from fxcompress.report.changes import Line, counts
from fxcompress.report.drawing import MARKS, draw, draw_alone
from fxcompress.report.facts import Case
from fxcompress.report.layers import layer_section
from fxcompress.report.runs import ledgers, left_alone, plans, sensitivity

__all__ = ["case_sections"]


def case_sections(case: Case, anchor: str, level: int = 2) -> Element:
    """Everything about one compressed model under headings of ``level``, with links whose names begin with ``anchor``."""
    parts: list[tuple[str, Child]] = [
        ("Before and after", cards(case)),
        ("Ledger", ledgers(case)),
        ("Layers", layer_section(case.layers)),
        ("Sensitivity", sensitivity(case)),
        ("Graph", _graph(case.lines) if case.compared else _graph_alone(case.lines)),
        ("Left alone, and why", left_alone(case)),
        ("Plan", plans(case)),
    ]
    shown = [(title, content) for title, content in parts if content is not None]
    links = [tag("li", tag("a", title, href=f"#{anchor}-{n}")) for n, (title, _) in enumerate(shown)]
    sections = [
        tag("section", tag(f"h{level}", title, id=f"{anchor}-{n}"), content) for n, (title, content) in enumerate(shown)
    ]
    return tag("div", tag("nav", tag("ul", links), aria_label=f"Parts of {case.title}"), sections)


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
