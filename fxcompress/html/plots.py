"""Plots as inline SVG, drawn from plain numbers: columns per layer, bars to compare, curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from fxcompress.html.markup import Child, hint, tag
from fxcompress.html.tables import box

__all__ = ["Scale", "bars", "columns", "curves"]

_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 220, 52, 12, 12, 26
NAMED = 8
"""Curves with a colour of their own; the others are grey."""


@dataclass(frozen=True)
class Scale:
    """A straight map from values to places, with round ticks inside it."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """At most ``most`` + 1 multiples of 1, 2 or 5 times a power of ten."""
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / most))
        step = next(step * factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (step * factor) <= most)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def scale(values: Sequence[float], start: float, end: float, *, zero: bool = True) -> Scale:
    """A scale that holds all finite values; from zero unless ``zero`` is False."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-12 * max(1.0, abs(high)):
        low, high = (low, low + 1.0) if zero else (low - 0.5, high + 0.5)
    elif not zero:
        low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
    return Scale(low, high, start, end)


def _picture(title: str, summary: str, width: float, height: float, *children: Child) -> Element:
    """A drawing at its natural size in a box that scrolls, titled, with its text alternative under it."""
    drawing = tag(
        "svg", children, role="img", aria_label=f"{title}. {summary}", width=width, height=height,
        viewBox=f"0 0 {width:g} {height:g}",
    )  # fmt: skip
    return tag("figure", tag("h4", title), box(title, drawing), tag("figcaption", summary))


def _axis(across: float, vertical: Scale, unit: str) -> list[Element]:
    made = []
    for value in vertical.ticks():
        y = vertical(value)
        made.append(tag("line", x1=_LEFT, x2=across, y1=y, y2=y, class_="base" if value == 0 else "rule"))
        made.append(tag("text", f"{value:g}", x=_LEFT - 6, y=y + 4, text_anchor="end"))
    middle = (vertical.start + vertical.end) / 2
    made.append(
        tag("text", unit, x=12, y=middle, text_anchor="middle", transform=f"rotate(-90 12 {middle:.0f})", class_="unit")
    )
    return made


def columns(title: str, summary: str, unit: str, labels: Sequence[str], series: Mapping[str, Sequence[float]]) -> Element:
    """A column per label in order, and a mark over it for a second series; values that are not finite are left out.

    ``summary`` says in words what is to be seen.
    """
    width = max(580, _LEFT + _RIGHT + 7 * len(labels))
    slot = min(60.0, (width - _LEFT - _RIGHT) / max(1, len(labels)))
    vertical = scale([value for values in series.values() for value in values], _HEIGHT - _BOTTOM, _TOP)
    made = _axis(width - _RIGHT, vertical, unit)
    for number, (what, values) in enumerate(series.items()):
        for place, (label, value) in enumerate(zip(labels, values, strict=True)):
            if math.isfinite(value):
                y, base = vertical(value), vertical(0)
                top, height = (y - 1.5, 3) if number else (min(y, base), max(abs(base - y), 0.5))
                size = {"x": _LEFT + (place + 0.1) * slot, "y": top, "width": 0.8 * slot, "height": height}
                made.append(tag("rect", hint(f"{label}: {what} {value:.4g} {unit}"), **size, class_=f"s{number}"))
    made.append(tag("text", "layers, from input to output", x=_LEFT, y=_HEIGHT - 6))
    return tag("div", _picture(title, summary, width, _HEIGHT, made), _legend(list(series)) if len(series) > 1 else None)


def _legend(names: Sequence[str], grey: str | None = None) -> Element:
    items = [tag("li", tag("span", class_=f"dot s{number}"), label) for number, label in enumerate(names)]
    if grey:
        items.append(tag("li", tag("span", class_="dot grey"), grey))
    return tag("ul", items, class_="legend")


def bars(title: str, summary: str, unit: str, values: Mapping[str, float]) -> Element:
    """A horizontal bar per label, with its value at its end."""
    label_width = 8 + 7 * min(40, max((len(label) for label in values), default=0))
    width, row = label_width + 340, 24
    across = scale(list(values.values()), label_width, width - 80)
    made = []
    for place, (label, value) in enumerate(values.items()):
        y, end = place * row, across(value)
        base = across(0)
        shown = label if len(label) <= 40 else label[:39] + "…"
        made.append(tag("text", shown, hint(label), x=label_width - 8, y=y + 16, text_anchor="end", class_="name"))
        made.append(tag("rect", x=min(base, end), y=y + 4, width=max(abs(end - base), 1), height=row - 8, class_="s0"))
        made.append(tag("text", f"{value:.4g} {unit}".rstrip(), x=max(base, end) + 6, y=y + 16))
    return _picture(title, summary, width, row * len(values) + 4, made)


def curves(
    title: str,
    summary: str,
    axes: tuple[str, str],
    lines: Mapping[str, Mapping[float, float]],
    level: tuple[str, float] | None = None,
) -> Element:
    """A line per label over common places; the first ones are named in the legend, the others grey.

    ``level`` is a dashed line across with its name. ``axes`` name what runs across and up.
    """
    width, height = 580, 340
    points = [value for line in lines.values() for value in line.values()] + ([level[1]] if level else [])
    vertical = scale(points, height - 44, _TOP, zero=False)
    places = sorted({place for line in lines.values() for place in line})
    across = scale(places, _LEFT, width - _RIGHT, zero=False)
    made = _axis(width - _RIGHT, vertical, axes[1])
    made += [tag("text", f"{value:g}", x=across(value), y=height - 26, text_anchor="middle") for value in across.ticks(8)]
    made.append(tag("text", axes[0], x=(_LEFT + width) / 2, y=height - 6, text_anchor="middle", class_="unit"))
    if level is not None:
        y = vertical(level[1])
        made.append(
            tag("line", hint(f"{level[0]}: {level[1]:.6g}"), x1=_LEFT, x2=width - _RIGHT, y1=y, y2=y, class_="level")
        )
    for number, (label, line) in reversed(list(enumerate(lines.items()))):
        kind = f"s{number}" if number < NAMED else "grey"
        path = " ".join(f"{across(place):.1f},{vertical(value):.1f}" for place, value in sorted(line.items()))
        made.append(tag("polyline", hint(label), points=path, class_=f"curve {kind}"))
        made += [
            tag("circle", hint(f"{label}: {value:.6g} at {place:g}"), cx=across(place), cy=vertical(value), r=3, class_=kind)
            for place, value in line.items()
        ]
    rest = len(lines) - NAMED
    legend = _legend(list(lines)[:NAMED], f"{rest} others" if rest > 0 else None)
    return tag("div", _picture(title, summary, width, height, made), legend)
