"""Plots and markup: they hold any numbers and any text, and a page is written whole."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fxcompress.errors import ConfigError
from fxcompress.html import bars, columns, curves, page, table, tag, write
from fxcompress.html.plots import Scale
from tests.pages import HOSTILE, harmless


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 1e-300, -5.0, 1e300])
def test_plots_hold_any_numbers(value: float) -> None:
    names = {"a": value, "b": 1.0}
    shown = [
        columns("t", "s", "u", list(names), {"x": list(names.values())}),
        bars("t", "s", "u", names),
        curves(
            "t", "s", ("x", "y"), {"a": {0.1: 1.0, 0.2: 3.0}, "b": {0.1: value if math.isfinite(value) else 0.0, 0.2: 1.0}}
        ),
    ]
    text = page("plots", shown)
    harmless(text)
    assert "nan" not in text.lower().split("</style>")[1].replace("nan u", "") or math.isnan(value)


def test_ticks_are_round_and_inside() -> None:
    assert Scale(0, 47, 0, 100).ticks() == [0, 10, 20, 30, 40]
    assert Scale(0.83, 0.97, 0, 1).ticks() == pytest.approx([0.85, 0.9, 0.95])
    assert Scale(-3, 7, 0, 100)(2) == 50


def test_columns_are_as_high_as_their_values() -> None:
    drawn = columns("t", "s", "dB", ["a", "b"], {"x": [20.0, 40.0]})
    heights = [float(rect.get("height", 0)) for rect in drawn.iter("rect")]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)


def test_text_and_attributes_are_escaped() -> None:
    text = page(
        "t",
        tag("p", HOSTILE, tag("a", "x", title='"><b>'), "tail & more", href="#x"),
        table(HOSTILE, [HOSTILE], [[HOSTILE]]),
    )
    read = harmless(text)
    assert read.texts.count(HOSTILE) == 4
    assert ("a", "title", '"><b>') in read.attributes


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = write(tmp_path / "page.html", "old")
    with pytest.raises(ConfigError, match="cannot be written"):
        write(tmp_path, "text")
    with pytest.raises(ConfigError, match="cannot be written"):
        write(tmp_path / "no" / "folder.html", "text")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ConfigError, match="No space left"):
        write(target, "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("page.html", "old")]
