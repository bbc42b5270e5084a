"""insert-observers: decide what runs in integers and watch the ranges that this needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from fxcompress import backends
from fxcompress.backends.base import Backend
from fxcompress.graph import edit, ops
from fxcompress.graph.select import Selection
from fxcompress.pass_base import EXACT, Context, Pass, Promise
from fxcompress.quantization.observer import ActivationObserver
from fxcompress.quantization.placement import place

__all__ = ["InsertObservers"]


@dataclass(frozen=True)
class InsertObservers(Pass):
    """Place operators on a backend and put an observer on every value that will be quantized.

    One observer serves all readers of a value. Operators that keep their input's range (pooling, reshaping) get none.

    Options: ``backend``; ``calibrator`` and its ``calibrator_options``; ``per_channel``, a scale per output channel of
    weights where the backend has it; ``include_layers``/``exclude_layers``, names or globs; ``reduce_range``: None bounds
    weights so that partial sums cannot saturate where the CPU needs it, True gives activations 7 bits, False does neither.
    """

    name: ClassVar[str] = "insert-observers"
    leaves: ClassVar[str | None] = "observed"
    promise: ClassVar[Promise] = EXACT

    backend: str = "fbgemm"
    calibrator: str = "histogram"
    calibrator_options: dict[str, Any] = field(default_factory=dict)
    per_channel: bool = True
    include_layers: tuple[str, ...] | None = None
    exclude_layers: tuple[str, ...] = ()
    reduce_range: bool | None = None

    def __post_init__(self) -> None:
        backends.find(self.backend)
        ActivationObserver(self.calibrator, self.calibrator_options)

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        Selection(self.include_layers, self.exclude_layers).check(model)
        super().run_model(model, context)

    def run(self, module: fx.GraphModule, context: Context) -> None:
        backend = backends.find(self.backend)
        placed = place(module, backend, Selection(self.include_layers, self.exclude_layers), context.region)
        for node in placed.integers:
            node.meta["integer"] = True
        for node, reason in placed.floats.items():
            node.meta["float"] = reason
            if ops.kind(node) not in ("getattr", "shape", "assert", "getitem"):
                context.skip(node, reason)
        for node in placed.observed:
            self._observe(module, node)
        module.meta["quantization"] = self._settings(backend)

    def _observe(self, module: fx.GraphModule, node: fx.Node) -> None:
        readers = list(node.users)
        observer = ActivationObserver(self.calibrator, self.calibrator_options)
        name = edit.add_module(module, f"observers.{node.name}", observer)
        made = edit.insert_after(node, name, (node,))
        made.meta |= {"observer": True, "tensor_meta": node.meta.get("tensor_meta")}
        for reader in readers:
            reader.replace_input_with(node, made)

    def _settings(self, backend: Backend) -> dict[str, Any]:
        return {
            "backend": backend.name,
            "per_channel": self.per_channel and backend.per_channel,
            "reduce_range": bool(self.reduce_range),
            "bound_pairs": self.reduce_range is None and backend.saturates(),
        }
