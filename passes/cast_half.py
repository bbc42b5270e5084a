"""cast-half: weights and activations in half precision, fragile operators in fp32."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import TensorMetadata
from torch.utils import _pytree as pytree

from fxcompress.errors import DataError
from fxcompress.graph import edit, ops
from fxcompress.graph.meta_run import propagate
from fxcompress.graph.recorder import Recorder
from fxcompress.graph.select import Layer, Selection
from fxcompress.graph.shapes import dtype_of, is_meta, module_of
from fxcompress.pass_base import APPROXIMATE, Context, Pass, Promise
from fxcompress.quantization.placement import layer_name

__all__ = ["CastHalf"]

LARGEST, SMALLEST = 65504.0, 2.0**-14
"""The largest number half precision holds, and the smallest it holds in full precision."""

FRAGILE = {
    **dict.fromkeys(("softmax", "log_softmax", "logsigmoid", "softplus"), "exponentials lose their sums in half precision"),
    **dict.fromkeys(
        ("exp", "expm1", "log", "log2", "log1p", "pow", "square", "rsqrt", "reciprocal"),
        "it leaves the range of half precision",
    ),
    **dict.fromkeys(
        ("batch_norm", "instance_norm", "layer_norm", "rms_norm", "group_norm", "local_response_norm", "normalize"),
        "normalisation needs the precision of fp32",
    ),
    **dict.fromkeys(("sum", "mean", "var", "norm", "cumsum", "adaptive_avg_pool2d"), "it sums over a large axis"),
    **dict.fromkeys(
        ("multihead_attention", "lstm", "gru", "rnn", "recurrent_cell"), "its softmax or state is inside the layer"
    ),
}
_FOLLOWS = ("movement", "pooling")
_QUERIES = ("query", "other")


@dataclass(frozen=True)
class CastHalf(Pass):
    """Run in half precision what bears it: layers and arithmetic; inputs and outputs keep the caller's dtype.

    Softmax, normalisation, exponentials and large sums stay in fp32, and so does, by a run on the example inputs, whatever
    would overflow or has no half kernel on this device. Operators that only move or compare values follow their input. A
    value is cast once for all its readers.

    Options: ``include_layers``/``exclude_layers``, by name, glob, ``re:`` or ``type:``.
    """

    name: ClassVar[str] = "cast-half"
    promise: ClassVar[Promise] = APPROXIMATE

    include_layers: tuple[Layer, ...] | None = None
    exclude_layers: tuple[Layer, ...] = ()

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        Selection(self.include_layers, self.exclude_layers).check(model)
        super().run_model(model, context)

    def run(self, module: fx.GraphModule, context: Context) -> None:
        example = context.example()
        if any("tensor_meta" not in node.meta for node in module.graph.nodes if node.op.startswith("call")):
            raise DataError(
                "cast-half needs to know which values are floats, and the graph does not tell: give example_inputs."
            )
        trial = _Trial(module)
        if example is not None:
            trial.record(example)
        selection = Selection(self.include_layers, self.exclude_layers)
        half: set[fx.Node] = set()
        for node in module.graph.nodes:
            if not node.op.startswith("call") or not _is_float(node):
                continue
            reason = _obstacle(node) or trial.failures.get(node)
            layer = layer_name(node, context.region)
            if reason is None and layer and layer not in selection:
                reason = "it is excluded by name"
            if reason is None:
                half.add(node)
            elif ops.kind(node) not in _SILENT:
                context.skip(node, f"{reason}: it stays in fp32")
        _Casting(module, _agreed(module, half)).run()
        if example is not None:
            propagate(module, example)


_SILENT = ("getitem", "getattr", "to")
"""Kinds whose precision goes without saying."""


def _is_float(node: fx.Node) -> bool:
    """Whether a value, or the first tensor in it, is fp32."""
    metas = pytree.tree_leaves(node.meta.get("tensor_meta"), is_leaf=is_meta)
    return any(getattr(meta, "dtype", None) == torch.float32 for meta in metas)


def _obstacle(node: fx.Node) -> str | None:
    """Why an operator stays in fp32 whatever its values, or None."""
    op = ops.lookup(node)
    if op is None:
        return "its own code runs (an island)" if node.op == "call_module" else "it is not in the op table"
    if op.family in _QUERIES:
        return "it makes a new tensor"
    if op.kind == "to":
        return "the model itself chooses its dtype"
    if op.kind in FRAGILE:
        return FRAGILE[op.kind]
    if op.family in ("pointwise", "activation") and (number := _extreme_constant(node)):
        return f"half precision does not hold its constant {number:g}"
    return None


def _extreme_constant(node: fx.Node) -> float | None:
    """A finite number among the arguments that half precision would lose."""
    numbers = [value for value in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(value, float)]
    lost = [n for n in numbers if math.isfinite(n) and n and not SMALLEST <= abs(n) <= LARGEST]
    return lost[0] if lost else None


class _Trial(Recorder):
    """Runs the graph in fp32 and every operator in half precision beside it: which overflow, which have no kernel."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.failures: dict[fx.Node, str] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op.startswith("call") and _is_float(n) and _obstacle(n) is None:
            reason = self._failure(n, value)
            if reason:
                self.failures[n] = reason
        return value

    def _failure(self, node: fx.Node, value: Any) -> str | None:
        operands = self.fetch_args_kwargs_from_env(node)
        seen = [t for t in _floats((value, operands)) if t.numel()]
        largest = max((float(t[t.isfinite()].abs().max()) for t in seen if t.isfinite().any()), default=0.0)
        if largest > LARGEST:
            return f"its values reach {largest:.3g}"
        args, kwargs = pytree.tree_map_only(Tensor, _halved, operands)
        try:
            if node.op == "call_module":
                part = module_of(node)
                state = [*part.named_parameters(), *part.named_buffers()]
                found = torch.func.functional_call(part, {name: _halved(t) for name, t in state}, args, kwargs)
            elif node.op == "call_method":
                found = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                found = node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, TypeError, ValueError) as error:
            return f"it does not run in half precision here ({str(error).splitlines()[0][:80]})"
        finite = all(bool(t.isfinite().all()) for t in _floats(value))
        return (
            "it overflows in half precision"
            if finite and not all(bool(t.isfinite().all()) for t in _floats(found))
            else None
        )


def _floats(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point())


def _halved(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float16) if tensor.dtype == torch.float32 else tensor


def _agreed(module: fx.GraphModule, half: set[fx.Node]) -> set[fx.Node]:
    """``half`` without what must follow others: movers of fp32 values, and layers that share weights with fp32 ones.

    An operator that only moves values is in the precision of what it moves, so that it needs no cast.
    """
    for node in module.graph.nodes:
        op = ops.lookup(node) if node.op.startswith("call") else None
        if op is not None and op.kind == "getitem" and node.all_input_nodes[0] in half:
            half.add(node)
        if node in half and op is not None and op.family in _FOLLOWS:
            sources = [s for s in node.all_input_nodes if s.op != "get_attr" and _is_float(s)]
            if sources and not any(s in half for s in sources):
                half.discard(node)
    readers = edit.readers(module)
    changed = True
    while changed:
        shared = {
            n for nodes in readers.values() if any(n not in half for n in nodes) for n in nodes if n.op == "call_module"
        }
        changed = bool(shared & half)
        half -= shared
    return half


def _half_meta(meta: Any) -> Any:
    if isinstance(meta, TensorMetadata):
        return meta._replace(dtype=torch.float16) if meta.dtype == torch.float32 else meta
    return tuple(_half_meta(part) for part in meta) if isinstance(meta, (tuple, list)) else meta


class _Casting:
    """The rewrite: weights of half operators become half, and a cast stands wherever precisions meet."""

    def __init__(self, module: fx.GraphModule, half: set[fx.Node]) -> None:
        self.module, self.half = module, half
        self.casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        self.halves: dict[int, tuple[Tensor, Tensor]] = {}

    def run(self) -> None:
        nodes, readers = list(self.module.graph.nodes), edit.readers(self.module)
        for node in nodes:
            if node.op == "call_module" and node in self.half:
                self._halve_layer(module_of(node))
        for node in nodes:
            if (
                node.op == "get_attr"
                and dtype_of(node) == torch.float32
                and all(user in self.half for user in readers[str(node.target)])
            ):
                owner, _, leaf = str(node.target).rpartition(".")
                self._halve_tensor(self.module.get_submodule(owner), leaf)
                self.half.add(node)
        for node in nodes:
            if node.op.startswith("call") and (node in self.half or self._reads_half(node)):
                self._cast_operands(node, torch.float16 if node in self.half else torch.float32)
            elif node.op == "output":
                self._cast_operands(node, torch.float32)
        for node in self.half:
            node.meta["tensor_meta"] = _half_meta(node.meta["tensor_meta"])

    def _reads_half(self, node: fx.Node) -> bool:
        op = ops.lookup(node)
        asks = op is not None and op.family in _QUERIES and not _is_float(node)
        return not asks and any(source in self.half for source in node.all_input_nodes)

    def _halve_layer(self, layer: nn.Module) -> None:
        for part in layer.modules():
            for leaf in (*part._parameters, *part._buffers):
                self._halve_tensor(part, leaf)

    def _halve_tensor(self, owner: nn.Module, leaf: str) -> None:
        """Replace a tensor by its half; names that share one keep sharing."""
        owned: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
        tensor = owned[leaf]
        if tensor is None or tensor.dtype != torch.float32:
            return
        if id(tensor) not in self.halves:
            half = tensor.detach().half()
            if isinstance(tensor, nn.Parameter):
                half = nn.Parameter(half, requires_grad=tensor.requires_grad)
            self.halves[id(tensor)] = (tensor, half)
        owned[leaf] = self.halves[id(tensor)][1]

    def _cast_operands(self, node: fx.Node, dtype: torch.dtype) -> None:
        for source in node.all_input_nodes:
            is_half = source in self.half
            if dtype_of(source) == torch.float32 and is_half != (dtype == torch.float16):
                node.replace_input_with(source, self._cast(source, dtype))

    def _cast(self, source: fx.Node, dtype: torch.dtype) -> fx.Node:
        if (source, dtype) not in self.casts:
            with self.module.graph.inserting_after(source):
                made = self.module.graph.call_method("to", (source, dtype))
            for key in ("nn_module_stack", "stack_trace"):
                if key in source.meta:
                    made.meta[key] = source.meta[key]
            meta = source.meta["tensor_meta"]
            made.meta["tensor_meta"] = meta._replace(dtype=dtype)
            self.casts[source, dtype] = made
        return self.casts[source, dtype]
