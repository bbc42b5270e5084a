"""What became of every layer: plots, and a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from xml.etree.ElementTree import Element

from fxcompress.html.markup import Child, name, tag
from fxcompress.html.plots import columns
from fxcompress.html.tables import table
from fxcompress.report.cards import decibels
from fxcompress.report.facts import Layer

__all__ = ["layer_section"]

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


def layer_section(layers: Sequence[Layer]) -> Child:
    """Every layer by name, with plots of what the table shows; None where there is none."""
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
