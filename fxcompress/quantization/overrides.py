"""Options layer by layer: which bits, calibrator and weight grid a layer gets, or that it stays in float.

An override concerns what a layer multiplies: its weight, and the values it reads. It is written for a qualified name or a
glob, which takes everything below it; where several match, later ones win, option by option.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from fxcompress.errors import ConfigError, did_you_mean
from fxcompress.graph.select import Selection, matches
from fxcompress.quantization.grid import check_bits
from fxcompress.quantization.observer import check_calibrator

__all__ = ["LayerOptions", "Overrides", "weight_grid_of"]


@dataclass(frozen=True)
class LayerOptions:
    """What is asked of one layer; None leaves it to the whole.

    ``bits``                of weights and activations, 2 to 8; ``weight_bits`` and ``activation_bits`` set one of the two
    ``calibrator``          for the values the layer reads, with ``calibrator_options``
    ``per_channel``, ``symmetric``  of its weight
    ``float``               leave it in float
    """

    bits: int | None = None
    weight_bits: int | None = None
    activation_bits: int | None = None
    calibrator: str | None = None
    calibrator_options: dict[str, Any] = field(default_factory=dict)
    per_channel: bool | None = None
    symmetric: bool | None = None
    float: bool = False

    def __post_init__(self) -> None:
        for bits in (self.bits, self.weight_bits, self.activation_bits):
            if bits is not None:
                check_bits(bits)
        if self.calibrator is not None:
            check_calibrator(self.calibrator, self.calibrator_options)
        elif self.calibrator_options:
            raise ConfigError("calibrator_options without a calibrator: name the calibrator they are for.")
        given = [f.name for f in fields(self) if f.name != "float" and getattr(self, f.name) not in (None, {})]
        if self.float and given:
            raise ConfigError(f"float contradicts {', '.join(given)}: a layer in float has no grid.")


def weight_grid_of(asked: LayerOptions) -> dict[str, Any]:
    """What a layer's weight grid has of its own."""
    wanted = {"bits": asked.weight_bits or asked.bits, "per_channel": asked.per_channel, "symmetric": asked.symmetric}
    return {key: value for key, value in wanted.items() if value is not None}


_KNOWN = {f.name: f for f in fields(LayerOptions)}
_TYPES = {
    "calibrator": str,
    "calibrator_options": Mapping,
    "per_channel": bool,
    "symmetric": bool,
    "float": bool,
}


@dataclass(frozen=True)
class Overrides:
    """``{pattern that chooses layers: {option: value}}``, checked when built."""

    patterns: Mapping[str, Mapping[str, Any]]

    def __post_init__(self) -> None:
        for pattern, options in self.patterns.items():
            _check(pattern, options)

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError for a pattern that matches no module of ``model``, with the closest names."""
        Selection(tuple(self.patterns)).check(model)

    def __getitem__(self, layer: str) -> LayerOptions:
        merged: dict[str, Any] = {}
        for pattern, options in self.patterns.items():
            if layer and matches(pattern, layer):
                merged |= options
        return LayerOptions(**merged)


def _check(pattern: str, options: Any) -> None:
    where = f"overrides: that for {pattern!r}"
    if not isinstance(options, Mapping):
        raise ConfigError(f"{where} is {options!r}; it is a mapping of options, such as {{bits: 4}}.")
    for key, value in options.items():
        if key not in _KNOWN:
            raise ConfigError(f"{where} has no option {key!r}.{did_you_mean(str(key), _KNOWN)} Known: {', '.join(_KNOWN)}.")
        if key in _TYPES and not isinstance(value, _TYPES[key]):
            raise ConfigError(f"{where}: {key} is {value!r}; it is a {_TYPES[key].__name__.lower()}.")
    try:
        LayerOptions(**options)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
