"""Shapes and dtypes of every value, found without computing any: meta tensors carry the sizes and no storage.

What such a run cannot tell (an island's result) is found by a real one.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.graph import ops
from fxcompress.graph.inputs import Arguments
from fxcompress.graph.recorder import Interpreter, Recorder, placeholder_values
from fxcompress.graph.shapes import describe, module_of

__all__ = ["MetaRun", "on_meta", "propagate"]


def propagate(module: fx.GraphModule, call: Arguments) -> None:
    """Write ``tensor_meta`` for every node, as ``call`` would make them.

    No activation is allocated unless a node is beyond meta tensors; then one real run fills the gaps.
    Raises DataError where ``call`` does not fit the model.
    """
    run = MetaRun(module)
    run.follow(call)
    for node, value in run.values.items():
        node.meta["tensor_meta"] = describe(value)
    if run.unknown:
        recorder = Recorder(module)
        recorder.record(call)
        for node, meta in recorder.found.items():
            node.meta["tensor_meta"] = meta


class MetaRun(Interpreter):
    """One pass over the graph on meta tensors; unknown values propagate as unknown.

    Layers whose result has a shape by definition are not run at all.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph | None = None) -> None:
        super().__init__(module, graph)
        self.unknown: set[fx.Node] = set()
        self.values: dict[fx.Node, Any] = {}

    def follow(self, call: Arguments) -> None:
        """Run the whole graph for ``call``; ``values`` are what is known of each node, ``unknown`` the others."""
        assert isinstance(self.module, fx.GraphModule)
        metas = pytree.tree_map_only(torch.Tensor, on_meta, placeholder_values(self.module, call))
        with torch.no_grad(), contextlib.suppress(StopIteration):
            self.run(*metas, enable_io_processing=False)

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return on_meta(value) if isinstance(value, torch.Tensor) else value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        state = itertools.chain(module.named_parameters(), module.named_buffers())
        metas = {name: on_meta(value) for name, value in state}
        return torch.func.functional_call(module, metas, args, kwargs, strict=False) if metas else module(*args, **kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(target, "__module__", "") not in ("_operator", "builtins"):  # these compare devices
            args, kwargs = pytree.tree_map_only(torch.device, lambda _: _META, (args, kwargs))
        return _all_on_meta(super().call_function(target, args, kwargs))

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = pytree.tree_map_only(torch.device, lambda _: _META, (args, kwargs))
        return _all_on_meta(super().call_method(target, args, kwargs))

    def run_node(self, n: fx.Node) -> Any:
        if any(source in self.unknown for source in n.all_input_nodes) or ops.kind(n) == "island":
            self.unknown.add(n)
            return None
        try:
            value = self._by_definition(n)
            if value is None:
                value = super().run_node(n)
        except Exception:  # a meta kernel may be missing or refuse; a real run will tell
            self.unknown.add(n)
            return None
        self.values[n] = value
        return value

    def _by_definition(self, node: fx.Node) -> Any:
        """The result of a layer whose shape its attributes tell, or of an operator whose shape its operands tell."""
        op = ops.lookup(node) if node.op.startswith("call") else None
        if op is None or node.op != "call_module" or op.kind in _OPERANDS:
            return self._by_operands(node) if op is not None and op.kind in _OPERANDS else None
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            return None
        value = self.env[node.args[0]]
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return None
        if op.family == "activation" or op.kind in _KEEPS:
            return value
        rule = _SHAPES.get(op.kind)
        return torch.empty(rule(module_of(node), value.shape), dtype=value.dtype, device="meta") if rule else None

    def _by_operands(self, node: fx.Node) -> Any:
        call = ops.read(node)
        assert call is not None
        return _OPERANDS[call.kind](call, lambda name: self.env.get(call[name]))


_KEEPS = ("batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm", "dropout", "identity")


def _convolved(part: Any, shape: torch.Size) -> list[int]:
    """The shape a convolution gives (PyTorch's documentation of ``nn.Conv2d``)."""
    dims = len(part.kernel_size)
    if len(shape) not in (dims + 1, dims + 2) or shape[-dims - 1] != part.in_channels:
        raise ValueError(f"a convolution of {part.in_channels} channels cannot take {tuple(shape)}")
    space = []
    for i, size in enumerate(shape[-dims:]):
        reach = part.dilation[i] * (part.kernel_size[i] - 1)
        around = {"valid": 0, "same": reach}[part.padding] if isinstance(part.padding, str) else 2 * part.padding[i]
        space.append((size + around - reach - 1) // part.stride[i] + 1)
    if min(space) < 1:
        raise ValueError(f"a kernel is larger than {tuple(shape)}")
    return [*shape[: -dims - 1], part.out_channels, *space]


def _projected(part: Any, shape: torch.Size) -> list[int]:
    if shape[-1] != part.in_features:
        raise ValueError(f"a linear layer of {part.in_features} features cannot take {tuple(shape)}")
    return [*shape[:-1], part.out_features]


_SHAPES: dict[str, Callable[[Any, torch.Size], list[int]]] = {
    **{f"conv{d}d": _convolved for d in (1, 2, 3)},
    "linear": _projected,
}
"""Kind of layer → the shape of its result from the layer and the shape of its input."""


def _sum_of_equals(call: ops.Call, find: Callable[[str], Any]) -> Any:
    first, second = find("input"), find("other")
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        return None
    alike = first.shape == second.shape and first.dtype == second.dtype and first.stride() == second.stride()
    return first if alike else None


def _attended(call: ops.Call, find: Callable[[str], Any]) -> Any:
    """Attention keeps the query's rows and the value's width (PyTorch's documentation)."""
    query, key, value = find("query"), find("key"), find("value")
    known = all(isinstance(t, torch.Tensor) and t.dim() == 4 for t in (query, key, value))
    if not known or not query.shape[:2] == key.shape[:2] == value.shape[:2]:
        return None
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2] or call["attn_mask"] is not None:
        return None
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _attended_by_layer(call: ops.Call, find: Callable[[str], Any]) -> Any:
    """What ``nn.MultiheadAttention`` gives for a batch without masks: outputs, and weights where they are wanted."""
    layer: Any = module_of(call.node)
    query, key, value = find("query"), find("key"), find("value")
    known = all(isinstance(t, torch.Tensor) and t.dim() == 3 for t in (query, key, value))
    plain = not set(call.node.kwargs) - {"need_weights", "query", "key", "value"} and len(call.node.args) <= 3
    if not known or not plain or layer.bias_k is not None or layer.add_zero_attn:
        return None
    if (query.shape[-1], key.shape[-1], value.shape[-1]) != (layer.embed_dim, layer.kdim, layer.vdim):
        return None
    if key.shape[:2] != value.shape[:2] or query.shape[1 - (rows := int(layer.batch_first))] != key.shape[1 - rows]:
        return None
    if not call.node.kwargs.get("need_weights", True):
        return query.new_empty(query.shape), None
    return query.new_empty(query.shape), query.new_empty((query.shape[1 - rows], query.shape[rows], key.shape[rows]))


_OPERANDS: dict[str, Callable[[ops.Call, Callable[[str], Any]], Any]] = {
    **dict.fromkeys(("add", "sub", "mul"), _sum_of_equals),
    "scaled_dot_product_attention": _attended,
    "multihead_attention": _attended_by_layer,
}
"""Kind of operator → its result from its operands, found by name; None where it has to be run."""


_META = torch.device("meta")


def on_meta(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor like this one, without storage."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _all_on_meta(value: Any) -> Any:
    if isinstance(value, torch.Size):
        return value
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor if tensor.is_meta else on_meta(tensor), value)
