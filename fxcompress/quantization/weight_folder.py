"""Weights of a graph become int8, stored under the names they had and read through a dequantize."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxcompress.backends.base import Backend
from fxcompress.errors import DataError
from fxcompress.graph import edit, fused, ops, qdq
from fxcompress.graph.shapes import describe
from fxcompress.quantization.fake_quant import FakeQuantize
from fxcompress.quantization.placement import weight_axis, weight_options
from fxcompress.quantization.weights import quantize_weight

__all__ = ["WeightFolder"]


class WeightFolder:
    """Folds the weights of one graph; a weight that several operators read is stored once.

    The float weights stay at hand in ``meta["float_weights"]`` until the graph is lowered.

    ``learned``  fake-quantizers of weights by name, whose grids are taken; others are quantized by their extremes
    """

    def __init__(
        self,
        module: fx.GraphModule,
        backend: Backend,
        settings: Mapping[str, Any],
        learned: Mapping[str, FakeQuantize] | None = None,
    ) -> None:
        self.module, self.backend, self.settings = module, backend, settings
        self.learned = learned or {}
        self.stored: dict[str, str] = {}
        self.affine: set[str] = set()

    def fold(self, call: ops.Call) -> None:
        """Store the weight as int8 and let the operator read it through a dequantize, in functional form."""
        node, name = call.node, call["weight"].name
        if name not in self.stored:
            self.stored[name] = self._store(name, call)
        stored = self.stored[name]
        with self.module.graph.inserting_before(node):
            weight, scale = self._fetch(stored), self._fetch(f"{stored}_scale")
            zero_points = (self._fetch(f"{stored}_zero_point"),) if stored in self.affine else ()
            value = self.module.graph.call_function(
                qdq.dequantize_per_channel, (weight, scale, weight_axis(call), *zero_points)
            )
            bias = self._fetch(call["bias"].name) if call["bias"] is not None else None
        meta = weight.meta["tensor_meta"]
        value.meta["tensor_meta"] = meta._replace(dtype=torch.float32, requires_grad=False)
        fused.make_functional(call, value, bias)

    def _fetch(self, name: str) -> fx.Node:
        """A node that fetches a tensor, at the graph's insertion point."""
        made = self.module.graph.get_attr(name)
        made.meta["tensor_meta"] = describe(edit.get_tensor(self.module, name))
        return made

    def _store(self, name: str, call: ops.Call) -> str:
        """Quantize a weight; returns where it is kept: under its name, or beside it where float operators read it too."""
        weight = edit.get_tensor(self.module, name)
        if not bool(weight.isfinite().all()):
            raise DataError(f"the weight {name!r} holds NaN or infinite values. Train or load the model again.")
        stored = f"{name}_int8" if self._read_in_float(name) else name
        self.module.meta.setdefault("float_weights", {})[stored] = weight.detach()
        options = weight_options(call, self.backend, self.settings)
        if name in self.learned:
            levels, scale, zero_point = self.learned[name].levels(weight)
            if not options["per_channel"]:  # one scale in all, shared out over the channels while it trained
                scale, zero_point = scale.amax().reshape(1), None if zero_point is None else zero_point[:1]
        else:
            levels, scale, zero_point = quantize_weight(weight, weight_axis(call), **options)
        edit.set_tensor(self.module, stored, levels, buffer=True)
        edit.set_tensor(self.module, f"{stored}_scale", scale, buffer=True)
        if zero_point is not None:
            edit.set_tensor(self.module, f"{stored}_zero_point", zero_point, buffer=True)
            self.affine.add(stored)
        self._redirect(stored)
        return stored

    def _read_in_float(self, name: str) -> bool:
        """Whether an operator that stays in float reads the tensor under this very name (an embedding, a tied head)."""
        owner = name.rpartition(".")[0]
        readers: list[fx.Node] = []
        for node in self.module.graph.nodes:
            if node.op == "call_module" and node.target == owner:
                readers.append(node)
            elif node.op == "get_attr" and node.target == name:
                readers += node.users
        return any(not reader.meta.get("integer") and not _asks_about(reader) for reader in readers)

    def _redirect(self, stored: str) -> None:
        """Let code that asks for a float weight's type or device ask the scale, now that the weight is int8."""
        for fetched in self.module.graph.find_nodes(op="get_attr", target=stored):
            fetched.meta["tensor_meta"] = describe(edit.get_tensor(self.module, stored))
            for user in [user for user in fetched.users if _asks_about(user) and user.args[-1] in ("dtype", "device")]:
                with self.module.graph.inserting_before(user):
                    user.replace_input_with(fetched, self._fetch(f"{stored}_scale"))


def _asks_about(node: fx.Node) -> bool:
    """Whether a node reads what a tensor is like, and not its values."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    return node.target is getattr and node.args[1] in ("dtype", "device", "shape", "ndim")
