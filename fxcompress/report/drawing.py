"""A graph before and after, drawn: two columns of operators from input to output, skips in the margins.

A chain runs straight down. A result that is read further on leaves its operator at the side, runs down a lane of its own and
enters its readers from there, so that no line crosses a box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.etree.ElementTree import Element

from fxcompress.html.markup import hint, tag
from fxcompress.html.tables import box
from fxcompress.report.changes import Line, Operator, counts, rows

__all__ = ["MARKS", "draw", "draw_alone"]

MARKS = {"added": "+", "removed": "−", "changed": "~", "same": "="}
"""Status → a sign that tells it without colour."""

_ROW, _TALL, _WIDE, _BETWEEN, _LANE, _LANES = 26, 20, 440, 56, 7, 16
_HEAD = 30


def draw(lines: Sequence[Line]) -> Element:
    """The graph as a figure, with a legend that counts what changed."""
    placed = rows(lines)
    left = _Column([line.before if line else None for line, _ in placed], before=True)
    right = _Column([line.after if line else None for _, line in placed], before=False)
    starts = left.margin, left.margin + _WIDE + _BETWEEN
    width, height = starts[1] + _WIDE + right.margin, _HEAD + _ROW * len(placed)
    made = [tag("text", word, x=x, y=16, class_="head") for word, x in zip(("before", "after"), starts, strict=True)]
    made += [*left.edges(starts[0]), *right.edges(starts[1])]
    for number, (was, now) in enumerate(placed):
        if was is now and was is not None:
            y = _middle(number)
            made.append(tag("line", x1=starts[0] + _WIDE, x2=starts[1], y1=y, y2=y, class_="link"))
        if was is not None and was.before is not None:
            made.append(_node(was.before, was, starts[0], number))
        if now is not None and now.after is not None:
            made.append(_node(now.after, now, starts[1], number))
    found = counts(lines)
    legend = [tag("li", tag("span", MARKS[s], class_=f"swatch {s}"), f"{found[s]:,} {_WORDS[s]}") for s in MARKS]
    summary = ", ".join(f"{found[status]} {status}" for status in MARKS)
    said = f"The graph before and after: {summary}. The table below says what changed."
    drawing = _picture(said, width, height, made)
    return tag("figure", tag("ul", legend, class_="legend"), box("The graph before and after", drawing, tall=True))


def draw_alone(lines: Sequence[Line]) -> Element:
    """The graph of a model that is compared with nothing, as one column."""
    column = _Column([line.after for line in lines], before=False)
    nodes = [_node(line.after, line, 1, number) for number, line in enumerate(lines) if line.after is not None]
    said = f"The graph: {len(nodes)} operators from input to output."
    drawing = _picture(said, 1 + _WIDE + column.margin, _HEAD + _ROW * len(lines), [*column.edges(1), *nodes])
    return tag("figure", box("The graph", drawing, tall=True))


def _picture(said: str, width: int, height: int, made: Sequence[Element]) -> Element:
    return tag("svg", made, role="img", aria_label=said, width=width, height=height, viewBox=f"0 0 {width} {height}")


_WORDS = {"added": "added", "removed": "removed", "changed": "changed kind, shape or dtype", "same": "as they were"}


def _middle(row: int) -> int:
    return _HEAD + _ROW * row + _ROW // 2


def _node(operator: Operator, line: Line, x: int, row: int) -> Element:
    top = _HEAD + _ROW * row + (_ROW - _TALL) // 2
    kind = "" if operator.kind == operator.name else operator.kind
    facts = " ".join(word for word in (kind, operator.shape, operator.dtype) if word)
    name, facts = _fitted(operator.name, facts)
    said = f"{operator.name}: {operator.kind} {operator.result}. {line.status}"
    return tag(
        "g",
        hint(said if line.status != "changed" else f"{said}: {line.difference}"),
        tag("rect", x=x, y=top, width=_WIDE, height=_TALL, rx=4),
        tag("text", MARKS[line.status], x=x + 8, y=top + 15, class_="mark") if line.status != "same" else None,
        tag("text", name, x=x + 22, y=top + 14, class_="name"),
        tag("text", facts, x=x + _WIDE - 8, y=top + 14, text_anchor="end"),
        class_=f"node {line.status}",
    )


_LETTERS = 58
"""How many letters of both texts a box holds."""


def _fitted(name: str, facts: str) -> tuple[str, str]:
    """Both texts, shortened in the middle so that they do not meet."""
    facts = _shortened(facts, _LETTERS - min(len(name), _LETTERS // 2))
    return _shortened(name, _LETTERS - len(facts)), facts


def _shortened(text: str, letters: int) -> str:
    if len(text) <= letters:
        return text
    half = (letters - 1) // 2
    return f"{text[: letters - 1 - half]}…{text[-half:]}"


class _Column:
    """One graph: the row of every operator, and which results need a lane at the side."""

    def __init__(self, operators: Sequence[Operator | None], before: bool) -> None:
        self.before = before
        self.rows = {operator.name: row for row, operator in enumerate(operators) if operator is not None}
        order = sorted(self.rows.values())
        self.previous = dict(zip(order[1:], order, strict=False))
        self.straight: list[tuple[int, int]] = []
        self.skips: dict[int, list[int]] = {}
        for operator in operators:
            if operator is not None:
                self._read(operator)
        self.lanes = self._lanes()
        self.margin = 14 + _LANE * (1 + max(self.lanes.values(), default=-1))

    def _read(self, operator: Operator) -> None:
        reader = self.rows[operator.name]
        for source in (self.rows[name] for name in operator.sources if name in self.rows):
            if self.previous.get(reader) == source:
                self.straight.append((source, reader))
            else:
                self.skips.setdefault(source, []).append(reader)

    def _lanes(self) -> Mapping[int, int]:
        """Source row → lane: the innermost that is free on its way down; beyond the last one they share."""
        free: list[int] = []
        lanes = {}
        for source, readers in sorted(self.skips.items()):
            first, last = min(source, *readers), max(source, *readers)
            lane = next((n for n, until in enumerate(free) if until < first), len(free))
            if lane == len(free) and lane < _LANES:
                free.append(last)
            lane = min(lane, _LANES - 1)
            free[lane] = max(free[lane], last) if free[lane] >= first else last
            lanes[source] = lane
        return lanes

    def edges(self, x: int) -> list[Element]:
        spine = x + 14
        made = []
        for source, reader in self.straight:
            top, bottom = _middle(source) + _TALL // 2, _middle(reader) - _TALL // 2
            made.append(tag("line", x1=spine, x2=spine, y1=top, y2=bottom, class_="edge"))
        names = {row: name for name, row in self.rows.items()}
        side = x if self.before else x + _WIDE
        for source, readers in self.skips.items():
            out = side + (-1 if self.before else 1) * (8 + _LANE * self.lanes[source])
            path = f"M{side} {_middle(source) + 3}H{out}" + "".join(
                f"V{_middle(end) - 3}" for end in {min(readers), max(readers)}
            )
            path += "".join(f"M{out} {_middle(reader) - 3}H{side}" for reader in readers)
            said = f"{names[source]} → {', '.join(names[reader] for reader in readers)}"
            made.append(tag("path", hint(said), d=path, class_="edge"))
        return made
