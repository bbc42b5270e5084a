"""insert-observers: decide what runs in integers and watch the ranges that this needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import fx

from fxcompress import backends
from fxcompress.backends.base import Backend
from fxcompress.graph import edit, ops
from fxcompress.graph.select import Layer, Selection
from fxcompress.pass_base import EXACT, Context, Pass, Promise
from fxcompress.quantization.observer import ActivationObserver, check_calibrator
from fxcompress.quantization.overrides import LayerOptions, Overrides, weight_grid_of
from fxcompress.quantization.placement import Placement, layer_name, operands, place

__all__ = ["InsertObservers"]


@dataclass(frozen=True)
class InsertObservers(Pass):
    """Place operators on a backend and put an observer on every value that will be quantized.

    One observer serves all readers of a value. Operators that keep their input's range (pooling, reshaping) get none.

    Options: ``backend``; ``dtype``, ``int8`` or ``uint8``: 8 bits, signed as the backend has them; ``calibrator`` and its
    ``calibrator_options``; ``per_channel``, a scale per output channel of weights, and ``symmetric`` weights, where the
    backend has them; ``include_layers``/``exclude_layers``, by name, glob, ``re:`` or ``type:``;
    ``overrides``, ``{layers: {bits, weight_bits, activation_bits, calibrator, calibrator_options, per_channel,
    symmetric, float}}``; ``reduce_range``: None bounds weights so that partial sums cannot saturate where the CPU needs it,
    True gives activations 7 bits, False does neither.
    """

    name: ClassVar[str] = "insert-observers"
    leaves: ClassVar[str | None] = "observed"
    promise: ClassVar[Promise] = EXACT

    backend: str = "fbgemm"
    dtype: Literal["int8", "uint8"] = "int8"
    calibrator: str = "histogram"
    calibrator_options: dict[str, Any] = field(default_factory=dict)
    per_channel: bool = True
    symmetric: bool = True
    include_layers: tuple[Layer, ...] | None = None
    exclude_layers: tuple[Layer, ...] = ()
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    reduce_range: bool | None = None

    def __post_init__(self) -> None:
        backends.find(self.backend)
        check_calibrator(self.calibrator, self.calibrator_options)
        Overrides(self.overrides)

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        self.check(model, context)
        super().run_model(model, context)

    def check(self, model: fx.GraphModule, context: Context) -> None:
        """Raise ConfigError for names that match nothing; note what the backend does not have."""
        Selection(self.include_layers, self.exclude_layers).check(model)
        Overrides(self.overrides).check(model)
        backend = backends.find(self.backend)
        for asked, offered, what in (
            (self.per_channel, backend.per_channel, "a scale per output channel; one scale per weight is used"),
            (not self.symmetric, backend.affine_weights, "affine weights; symmetric ones are used"),
        ):
            if asked and not offered:
                context.note("", f"{backend.name} has no kernels for {what}")
        if self.dtype == "uint8":
            context.note("", f"{backend.name} holds activations in {backend.activation} and weights in int8")

    def run(self, module: fx.GraphModule, context: Context) -> None:
        backend = backends.find(self.backend)
        overrides = Overrides(self.overrides)
        in_float = tuple(name for name in self.overrides if self.overrides[name].get("float"))
        selection = Selection(self.include_layers, (*self.exclude_layers, *in_float))
        placed = place(module, backend, selection, context.region)
        for node, reason in placed.floats.items():
            node.meta["float"] = reason
            if ops.kind(node) not in _QUIET and node.meta.get("tensor_meta", node) is not None:
                context.skip(node, reason)
        asked = {node: overrides[layer_name(node, context.region)] for node in placed.integers}
        for node, rule in placed.integers.items():
            node.meta["integer"] = True
            if rule.weighted and self.per_channel and backend.per_channel and ops.kind(node).startswith("conv_transpose"):
                context.note(node, "kernels of transposed convolutions take one scale per weight, and it has one")
            if rule.weighted and (grid := weight_grid_of(asked[node])):
                node.meta["weight_grid"] = grid
        for node in placed.observed:
            self._observe(module, node, [asked[reader] for reader in _readers(node, placed)], context)
        module.meta["quantization"] = self._settings(backend)

    def _observe(self, module: fx.GraphModule, node: fx.Node, asked: list[LayerOptions], context: Context) -> None:
        readers = ops.value_readers(node)
        bits = max((o.activation_bits or o.bits or 8 for o in asked), default=8)
        chosen = [(o.calibrator, o.calibrator_options) for o in asked if o.calibrator]
        if any(choice != chosen[0] for choice in chosen):
            context.note(node, f"its readers ask for different calibrators; the first, {chosen[0][0]!r}, watches it")
        calibrator, options = chosen[0] if chosen else (self.calibrator, self.calibrator_options)
        name = edit.add_module(module, f"observers.{node.name}", ActivationObserver(str(calibrator), options, bits))
        made = edit.insert_after(node, name, (node,))
        made.meta |= {"observer": True, "tensor_meta": node.meta.get("tensor_meta")}
        for reader in readers:
            reader.replace_input_with(node, made)

    def _settings(self, backend: Backend) -> dict[str, Any]:
        return {
            "backend": backend.name,
            "per_channel": self.per_channel and backend.per_channel,
            "symmetric": self.symmetric or not backend.affine_weights,
            "reduce_range": bool(self.reduce_range),
            "bound_pairs": self.reduce_range is None and backend.saturates(),
            "full_range": self.reduce_range is False,
        }


_QUIET = ("getattr", "shape", "assert", "getitem", "tap")
"""Kinds that nobody expects to run in integers."""


def _readers(value: fx.Node, placed: Placement) -> Iterator[fx.Node]:
    """The integer operators that read ``value`` on its own range, also through operators that hand the range on."""
    for user in value.users:
        rule = placed.integers.get(user)
        call = ops.read(user) if rule else None
        if rule is None or call is None or value not in operands(call, rule):
            continue
        if rule.output == "input":
            yield from _readers(user, placed)
        else:
            yield user
