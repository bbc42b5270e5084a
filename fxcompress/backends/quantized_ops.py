"""Lowering a quantize/dequantize graph to ``torch.ops.quantized`` kernels on quint8 tensors.

Every operator that stands between dequantizes and a quantize, and that the placement marked as integer, becomes one kernel.
What is left in float runs between an explicit dequantize and quantize.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import TensorMetadata

from fxcompress.backends.agreement import GRID, OPERATOR, REFERENCE
from fxcompress.backends.dynamic import DynamicLinear, DynamicRecurrent
from fxcompress.backends.kernel_calls import KERNELS, Writer
from fxcompress.backends.kernels import FLOAT_RESULT, LAYERS, QuantizedLayer, in_one_layout, quantize_input, with_room_for
from fxcompress.graph import edit, ops, qdq
from fxcompress.graph.cost import macs
from fxcompress.graph.recurrent import QuantizedRecurrent
from fxcompress.graph.shapes import module_of, tensor_meta

__all__ = ["lower_to"]

Lower = Callable[[fx.GraphModule, Callable[[fx.Node, str], None]], None]

_QUANTIZE, _DEQUANTIZE = qdq.quantize, qdq.dequantize
_LATER = (qdq.dequantize, qdq.dequantize_per_channel, qdq.fake_quantize_dynamic)


def lower_to(engine: Callable[[], str]) -> Lower:
    """The lowering to the kernels of the engine that ``engine()`` names; a module keeps its signature and names."""

    def lower(module: fx.GraphModule, remark: Callable[[fx.Node, str], None]) -> None:
        lowering = _Lowering(module, engine())
        for node in module.graph.nodes:
            lowering.visit(node)
        lowering.drop_unread()
        lowering.refer()
        lowering.graph.set_codegen(module.graph._codegen)
        for name, layer in lowering.layers.items():
            _install(module, name, layer)
        module.graph = lowering.graph

    return lower


def _install(module: nn.Module, name: str, layer: nn.Module) -> None:
    prefix, _, leaf = name.rpartition(".")
    edit.ensure(module, prefix)._modules[leaf] = layer.train(module.training)


class _Lowering(Writer):
    """One walk over the old graph, writing the new one.

    ``floats``   old node → the new one that holds its value in float
    ``layers``   the new layers by name
    """

    def __init__(self, module: fx.GraphModule, engine: str) -> None:
        super().__init__(module)
        self.engine = engine
        self.floats: dict[fx.Node, fx.Node] = {}
        self.layers: dict[str, nn.Module] = {}

    def visit(self, node: fx.Node) -> None:
        """Write what one old node becomes."""
        if node.target is _QUANTIZE:
            self.integers[node] = self._quantize(node)
        elif node.op == "call_module" and isinstance(layer := module_of(node), QuantizedRecurrent):
            self.floats[node] = self._copy(node)
            self.layers.setdefault(str(node.target), DynamicRecurrent(layer, self.engine))
        elif node.target in _LATER or _is_integer(node):
            if _is_tuple(node):
                self.integers[node] = self._keep_on_integers(node)
            elif _gives_float(node):
                self.floats[node] = self._kernel(node, None, None)
                self.floats[node].meta["tensor_meta"] = node.meta.get("tensor_meta")
        elif ops.kind(node) == "getitem" and self._is_integer_tuple(node.args[0]):
            self.integers[node] = self._keep_on_integers(node)
        else:
            self.floats[node] = self._copy(node)

    def _is_integer_tuple(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and value in self.integers and _is_tuple(value)

    def drop_unread(self) -> None:
        """Take out quantizes whose readers all quantize the float value themselves."""
        for node in reversed(self.graph.nodes):
            if node.target is quantize_input and not node.users:
                self.graph.erase_node(node)

    def refer(self) -> None:
        """Note for every new node which old one has its value, and whose kernel it is."""
        for old, new in [*self.floats.items(), *self.integers.items()]:
            source = qdq.source(old) if old.target is _QUANTIZE else old
            new.meta |= {REFERENCE: old.name} | ({OPERATOR: source.name} if _is_integer(source) else {})
            if old.target is _QUANTIZE:
                new.meta[GRID] = old.args[1:3]

    def _copy(self, node: fx.Node) -> fx.Node:
        asks = ops.kind(node) == "shape" or (ops.kind(node) == "getattr" and node.args[1] in ("shape", "ndim"))
        copied = self.graph.node_copy(node, self._either if asks else self._float)
        _reshape_any_layout(copied)
        return copied

    def _either(self, node: fx.Node) -> fx.Node:
        """The value of an old node as it is at hand: a question about its shape needs no dequantize."""
        source = qdq.source(node) if node.target is _DEQUANTIZE else node
        return self.integers[source] if source in self.integers else self._float(node)

    def _float(self, node: fx.Node) -> fx.Node:
        """The float value of an old node; an integer one is dequantized where first needed."""
        if node not in self.floats:
            if node.target is _DEQUANTIZE:
                source = self.integers[qdq.source(node)]
            elif node in self.integers:
                source = self.integers[node]
            else:
                return self._weight(node)
            made = self.graph.call_method("dequantize", (source,))
            made.meta["tensor_meta"] = node.meta.get("tensor_meta")
            self.floats[node] = made
        return self.floats[node]

    def _weight(self, node: fx.Node) -> fx.Node:
        """A quantized weight that a float operator reads."""
        self.floats[node] = self.graph.node_copy(node, self._float)
        return self.floats[node]

    def _quantize(self, node: fx.Node) -> fx.Node:
        grid = qdq.read(node)
        if _is_integer(grid.source):
            made = self._kernel(grid.source, grid.scale, grid.zero_point)
        else:
            made = self.graph.call_function(quantize_input, (self._float(grid.source), grid.scale, grid.zero_point))
        made.meta["tensor_meta"] = _as_levels(node)
        if (grid.low, grid.high) != (0, 255):
            made = self.graph.call_function(torch.clamp, (made, *grid.bounds))
            made.meta["tensor_meta"] = _as_levels(node)
        return made

    def _kernel(self, node: fx.Node, scale: Any, zero_point: Any) -> fx.Node:
        call = ops.read(node)
        assert call is not None
        if call.kind in LAYERS:
            made = self._layer(call, scale, zero_point)
        elif call.kind in KERNELS:
            made = KERNELS[call.kind](self, call, scale, zero_point)
        else:
            made = self._keep_on_integers(node)
        made.meta |= {"integer": True, "macs": macs(node), "kind": call.kind}
        if "nn_module_stack" in node.meta:
            made.meta["nn_module_stack"] = node.meta["nn_module_stack"]
        return made

    def _keep_on_integers(self, node: fx.Node) -> fx.Node:
        """An operator that torch runs on quint8 tensors as it stands."""

        def value(arg: fx.Node) -> fx.Node:
            return self.operand(arg) if arg in self.integers or arg.target is _DEQUANTIZE else self._float(arg)

        made = self.graph.node_copy(node, value)
        made.meta["tensor_meta"] = _as_levels(node)
        _reshape_any_layout(made)
        found = ops.lookup(node)
        if found is not None and found.family == "pooling":
            source = made.all_input_nodes[0]
            with self.graph.inserting_before(made):
                laid = self.graph.call_function(in_one_layout, (source,))
            laid.meta["tensor_meta"] = None  # no operator that a report would count
            made.replace_input_with(source, laid)
        return made

    def _layer(self, call: ops.Call, scale: Any, zero_point: Any) -> fx.Node:
        weight = self._int8_weight(call["weight"])
        bias = edit.get_tensor(self.module, call["bias"].name) if call["bias"] is not None else None
        activation = "relu" if call["activation"] in ("relu", "relu6") else None
        if call["input"].target is qdq.fake_quantize_dynamic:
            return self._dynamic_layer(call, weight, bias, activation)
        if self.engine == "qnnpack" and bias is not None:
            weight = with_room_for(bias, *weight, float(qdq.read(qdq.source(call["input"])).scale))
        source, taken = (self.operand(call["input"]), None) if scale is not None else self._float_operand(call["input"])
        layer = QuantizedLayer(call.kind, *weight, bias, _geometry(call), activation, scale, zero_point, taken, self.engine)
        name = self._layer_name(call)
        self.layers[name] = layer
        return self.graph.call_module(name, (source,))

    def _dynamic_layer(self, call: ops.Call, weight: Any, bias: Tensor | None, activation: str | None) -> fx.Node:
        source, quant_max = call["input"].args
        name = self._layer_name(call)
        fixed: tuple[Any, ...] = (bias, {}, activation, None, None, None, self.engine)
        options = {"reduce_range": quant_max < 255, "ceiling": 6.0 if call["activation"] == "relu6" else None}
        self.layers[name] = DynamicLinear(call.kind, *weight, *fixed, **options)
        return self.graph.call_module(name, (self._float(source),))

    def _float_operand(self, node: fx.Node) -> tuple[fx.Node, tuple[float, int] | None]:
        """The operand of a kernel with a float result, in float where it was so before it was quantized to 8 full bits.

        The kernel quantizes it by the scale and zero point that come with it; without them it takes a quint8 value.
        """
        grid = qdq.read(qdq.source(node))
        if _is_integer(grid.source) or (grid.low, grid.high) != (0, 255):
            return self.operand(node), None
        return self._float(grid.source), (grid.scale, grid.zero_point)

    def _int8_weight(self, node: fx.Node) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """Levels, scale, zero point (None: 0) and output-channel axis behind a dequantize."""
        weight = edit.get_tensor(self.module, str(qdq.source(node).target))
        if node.target is qdq.dequantize:
            zero = torch.tensor([node.args[2]], dtype=torch.int8, device="cpu")
            return weight, torch.tensor([node.args[1]], dtype=torch.float32, device="cpu"), zero if zero.any() else None, 0
        scale, zero_point = (
            edit.get_tensor(self.module, str(arg.target)) if isinstance(arg, fx.Node) else None
            for arg in (node.args[1], node.args[3] if len(node.args) > 3 else None)
        )
        assert scale is not None
        return weight, scale, zero_point, int(node.args[2])  # type: ignore[arg-type]

    def _layer_name(self, call: ops.Call) -> str:
        """The layer's own name where its module holds nothing else, a fresh one under it otherwise."""
        stored = call["weight"].args[0]
        owner, _, leaf = str(stored.target).rpartition(".")
        if owner and leaf == "weight" and owner not in self.layers and self._holds_alone(owner, call.node):
            return owner
        name, count = call.node.name, 0
        while name in self.layers or hasattr(self.module, name):
            count += 1
            name = f"{call.node.name}_{count}"
        return name

    def _holds_alone(self, owner: str, node: fx.Node) -> bool:
        """Whether a module holds nothing but tensors that ``node`` alone reads."""
        fetched = [n for n in self.module.graph.find_nodes(op="get_attr") if str(n.target).rpartition(".")[0] == owner]
        users = [user for source in fetched for user in ops.value_readers(source)]
        readers = {reader for user in users for reader in (user.users if user.target in _LATER else (user,))}
        return readers == {node} and not self.module.get_submodule(owner)._modules


def _is_integer(node: fx.Node) -> bool:
    return bool(node.meta.get("integer"))


def _gives_float(node: fx.Node) -> bool:
    """Whether an integer operator's result is read as it is: nothing quantizes it."""
    return _is_integer(node) and ops.kind(node) in FLOAT_RESULT and not any(user.target is _QUANTIZE for user in node.users)


def _is_tuple(node: fx.Node) -> bool:
    return tensor_meta(node) is None and isinstance(node.meta.get("tensor_meta"), (tuple, list))


def _as_levels(node: fx.Node) -> Any:
    meta = node.meta.get("tensor_meta")
    if isinstance(meta, TensorMetadata):
        return meta._replace(dtype=torch.uint8, requires_grad=False, is_quantized=True)
    if isinstance(meta, (tuple, list)):
        return tuple(
            m._replace(dtype=torch.uint8, requires_grad=False, is_quantized=True) if isinstance(m, TensorMetadata) else None
            for m in meta
        )
    return None


def _reshape_any_layout(node: fx.Node) -> None:
    """Kernels leave channels-last tensors, which ``view`` may refuse where ``reshape`` does not."""
    if node.op == "call_method" and node.target == "view":
        node.target = "reshape"
    elif node.target is torch.ops.aten.view.default:
        node.target = torch.ops.aten.reshape.default


def _geometry(call: ops.Call) -> dict[str, Any]:
    if call.kind == "linear":
        return {}
    dims = int(call.kind[-2])
    named = {"stride": 1, "padding": 0, "dilation": 1}
    if call.kind.startswith("conv_transpose"):
        named["output_padding"] = 0
    geometry: dict[str, Any] = {}
    for name, default in named.items():
        value = call[name] if call[name] is not None else default
        value = 0 if value == "valid" else value
        geometry[name] = [value] * dims if isinstance(value, int) else list(value) * (dims // len(value))
    geometry["groups"] = call["groups"] or 1
    return geometry
