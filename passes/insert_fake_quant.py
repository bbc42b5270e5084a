"""insert-fake-quant: a model that trains as it will be quantized."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import fx

from fxcompress import backends
from fxcompress.backends.base import Backend
from fxcompress.graph import edit, fused, ops, qdq
from fxcompress.graph.select import Layer
from fxcompress.graph.shapes import module_of
from fxcompress.pass_base import APPROXIMATE, Context, Pass, Promise
from fxcompress.passes.fold_batchnorm import FoldBatchNorm
from fxcompress.passes.fold_quantization import FoldQuantization
from fxcompress.passes.fuse_activations import FuseActivations
from fxcompress.passes.insert_observers import InsertObservers
from fxcompress.quantization.fake_quant import FakeQuantize, LearnedFakeQuantize, RangeFakeQuantize, WeightFakeQuantize
from fxcompress.quantization.grid import Grid, grid
from fxcompress.quantization.observer import ActivationObserver, check_calibrator
from fxcompress.quantization.overrides import Overrides
from fxcompress.quantization.placement import activation_grid, layer_name, weight_axis, weight_options

__all__ = ["InsertFakeQuant"]

Bits = Annotated[int, Field(ge=2, le=8)]


@dataclass(frozen=True)
class InsertFakeQuant(Pass):
    """Fake-quantize every weight and value that the converted model will hold in integers, and let everything learn.

    The model keeps its layers, parameters and live batch normalisation; a weight that normalisation follows is rounded as it
    will be folded. Values are rounded exactly where conversion will quantize them: the places are read off a folded copy.

    Options: ``method``, ``range`` (scales follow weights and a moving average of activation ranges) or ``lsq`` (learned step
    sizes); ``bits`` of weights and of the values that layers read, and ``activation_bits`` for the latter where they differ;
    ``first_last_bits`` of the layers no other layer precedes or follows; what no layer reads has 8 bits. ``observer`` and
    ``observer_options``, a calibrator that finds the range of one batch, and ``momentum`` of its average; ``learn_scale``;
    the others are those of ``insert-observers``. ``symmetric`` with ``lsq`` puts the zero point of signed activations in the
    middle, without it where the first batch has it; weights are symmetric there.
    """

    name: ClassVar[str] = "insert-fake-quant"
    leaves: ClassVar[str | None] = "observed"
    promise: ClassVar[Promise] = APPROXIMATE

    method: Literal["range", "lsq"] = "range"
    backend: str = "fbgemm"
    bits: Bits = 8
    activation_bits: Bits | None = None
    first_last_bits: Bits = 8
    observer: str = "histogram"
    observer_options: dict[str, Any] = field(default_factory=dict)
    momentum: Annotated[float, Field(gt=0.0, le=1.0)] = 0.01
    learn_scale: bool = True
    per_channel: bool = True
    symmetric: bool = True
    include_layers: tuple[Layer, ...] | None = None
    exclude_layers: tuple[Layer, ...] = ()
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    reduce_range: bool | None = None

    def __post_init__(self) -> None:
        check_calibrator(self.observer, self.observer_options, "observer_options")
        self._placing()

    def _placing(self) -> InsertObservers:
        """The pass that decides what is quantized."""
        saturates = self.method == "lsq" and self.reduce_range is None and backends.find(self.backend).saturates()
        return InsertObservers(
            backend=self.backend,
            calibrator=self.observer,
            calibrator_options=self.observer_options,
            per_channel=self.per_channel,
            symmetric=self.symmetric or self.method == "lsq",
            include_layers=self.include_layers,
            exclude_layers=self.exclude_layers,
            overrides=self.overrides,
            reduce_range=True if saturates else self.reduce_range,  # a learned step cannot keep weights in bounds
        )

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        self._placing().check(model, context)
        super().run_model(model, context)

    def run(self, module: fx.GraphModule, context: Context) -> None:
        twin = _Twin(module, context, self._placing(), self._widths)
        tails = _tails(module, twin.graph)
        _Insertion(self, module, twin, tails).run()

    def _widths(self, twin: fx.GraphModule, region: str) -> dict[str, dict[str, Any]]:
        """The bits of every layer by name, the user's own overrides last."""
        widths: dict[str, dict[str, Any]] = {}
        for name, is_edge in _layers(twin, backends.find(self.backend), region).items():
            inner = {"bits": self.bits, "activation_bits": self.activation_bits or self.bits}
            widths[name] = {"bits": self.first_last_bits} if is_edge else inner
        for pattern, options in self.overrides.items():
            widths[pattern] = {**widths.pop(pattern, {}), **options}
        return widths


def _layers(twin: fx.GraphModule, backend: Backend, region: str) -> dict[str, bool]:
    """Weighted layers by qualified name, and whether none comes before or none after."""
    weighted = [n for n in twin.graph.nodes if (rule := backend.rules.get(ops.kind(n))) and rule.weighted]
    after, before = set(weighted), set(weighted)
    for node in twin.graph.nodes:
        if any(source in after for source in node.all_input_nodes):
            after.add(node)
    for node in reversed(twin.graph.nodes):
        if any(user in before for user in node.users):
            before.add(node)
    found = {}
    for node in weighted:
        first = not any(source in after for source in node.all_input_nodes)
        last = not any(user in before for user in node.users)
        if ops.owner_name(node):
            found[layer_name(node, region)] = first or last
    return found


class _Twin:
    """A folded, quantized copy of the graph, from which the places of fake-quantizers are read off.

    Every range of the copy is numbered: its scale is its number, so that a quantize operator says which range it uses.
    """

    def __init__(self, module: fx.GraphModule, context: Context, placing: InsertObservers, widths: Any) -> None:
        copied = copy.deepcopy(module).eval()
        quiet = Context(inputs=context.inputs, region=context.region)
        FoldBatchNorm(beyond=False).run(copied, quiet)
        FuseActivations().run(copied, quiet)
        overrides = widths(copied, context.region)
        replace(placing, overrides=overrides).run(copied, context)
        self.settings: dict[str, Any] = copied.meta["quantization"]
        self.meta = {n.name: {k: n.meta[k] for k in _PLACED if k in n.meta} for n in copied.graph.nodes}
        self.ranges = [node for node in copied.graph.nodes if node.meta.get("observer")]
        self.observers = {}
        for number, node in enumerate(self.ranges):
            observer = module_of(node)
            assert isinstance(observer, ActivationObserver)
            bits = _bits(node, backends.find(placing.backend), Overrides(overrides), context.region)
            self.observers[float(number + 1)] = (node.all_input_nodes[0].name, observer, bits or observer.bits)
            copied.set_submodule(str(node.target), FakeQuantize(grid("uint8"), float(number + 1)))
        FoldQuantization().run(copied, context)
        self.graph = copied.graph


_PLACED = ("integer", "float", "weight_grid")


def _bits(value: fx.Node, backend: Backend, overrides: Overrides, region: str) -> int | None:
    """The fewest bits that a layer reading ``value`` asks for, also through operators that hand its range on."""
    asked = []
    for user in value.users:
        rule = backend.rules.get(ops.kind(user)) if user.meta.get("integer") else None
        if rule is not None and rule.weighted:
            options = overrides[layer_name(user, region)]
            asked.append(options.activation_bits or options.bits)
        elif rule is not None and rule.output == "input":
            asked.append(_bits(user, backend, overrides, region))
    return min((bits for bits in asked if bits), default=None)


def _tails(module: fx.GraphModule, twin: fx.Graph) -> dict[str, fx.Node]:
    """Where the value of each node of the folded copy appears in the graph itself: behind what was folded into it."""
    kept = {node.name for node in twin.nodes}
    roots: dict[fx.Node, str] = {}
    tails: dict[str, fx.Node] = {}
    for node in module.graph.nodes:
        roots[node] = node.name if node.name in kept or not node.all_input_nodes else roots[node.all_input_nodes[0]]
        tails[roots[node]] = node
    return tails


class _Insertion:
    """The rewrite of one region."""

    def __init__(self, options: InsertFakeQuant, module: fx.GraphModule, twin: _Twin, tails: dict[str, fx.Node]) -> None:
        self.options, self.module, self.twin, self.tails = options, module, twin, tails
        self.backend = backends.find(options.backend)
        self.nodes = {node.name: node for node in module.graph.nodes}
        self.placed: dict[float, str] = {}
        self.weights: dict[str, fx.Node] = {}

    def run(self) -> None:
        for node in self.twin.graph.nodes:
            if node.target is qdq.quantize:
                self._activation(node)
        for name, meta in self.twin.meta.items():
            if name in self.nodes:
                self.nodes[name].meta.update(meta)
        for node in self.twin.graph.nodes:
            call = ops.read(self.nodes[node.name]) if node.name in self.nodes and node.meta.get("integer") else None
            if call is not None and self.backend.rules[call.kind].weighted:
                self._weight(call)
        self.module.meta["quantization"] = self.twin.settings

    def _activation(self, quantize: fx.Node) -> None:
        source, number, *_ = qdq.read(quantize)  # the twin's scale is the number of an observer
        readers = [self.nodes[user.name] for value in quantize.users for user in value.users if user.name in self.nodes]
        is_origin = number in self.twin.observers and self.twin.observers[number][0] == source.name
        if number in self.twin.observers and not is_origin and _keeps_values(source):
            return
        value = self.tails[source.name]
        if number not in self.placed or number not in self.twin.observers:
            fake = self._range(number, quantize)
            self.placed[number] = edit.add_module(self.module, f"fake_quant.{source.name}", fake)
        more = {} if is_origin or number not in self.twin.observers else {"average": True}
        made = edit.insert_after(value, self.placed[number], (value,), **more)
        made.meta |= {"observer": True, "tensor_meta": value.meta.get("tensor_meta")}
        for reader in readers:
            reader.replace_input_with(value, made)

    def _range(self, number: Any, quantize: fx.Node) -> FakeQuantize:
        if number not in self.twin.observers:  # a scale that the kernel dictates
            _, scale, zero_point, low, high, dtype = qdq.read(quantize)
            return FakeQuantize(Grid(dtype, low, high, symmetric=False), scale, zero_point)
        _, observer, bits = self.twin.observers[number]
        target = activation_grid(self.backend, self.twin.settings, bits)
        if self.options.method == "lsq":
            target = replace(target, symmetric=self.options.symmetric)
            return LearnedFakeQuantize(target, learn=self.options.learn_scale)
        return RangeFakeQuantize(target, observer.calibrator_name, observer.options, self.options.momentum)

    def _weight(self, call: ops.Call) -> None:
        stored, graph = call["weight"].name, self.module.graph
        norm = self._norm(call)
        if stored not in self.weights:
            fake = self._weight_quantizer(call, norm)
            name = edit.add_module(self.module, f"fake_quant.{stored.replace('.', '_')}", fake)
            with graph.inserting_before(call.node):
                fetched = [
                    graph.get_attr(attr.name) if isinstance(attr, ops.Attr) else attr for attr in (call["weight"], *norm)
                ]
            self.weights[stored] = edit.insert_before(call.node, name, tuple(fetched))
            self.weights[stored].meta |= {"observer": True}
        with graph.inserting_before(call.node):
            bias = graph.get_attr(call["bias"].name) if call["bias"] is not None else None
        fused.make_functional(call, self.weights[stored], bias)

    def _norm(self, call: ops.Call) -> tuple[Any, ...]:
        """Gamma, variance and eps of the normalisation that the layer will be folded with."""
        node = self.tails[call.node.name]
        while node is not call.node:
            norm = ops.read(node)
            if norm is not None and norm.kind == "batch_norm":
                return norm["weight"], norm["running_var"], norm["eps"]
            node = node.all_input_nodes[0]
        return ()

    def _weight_quantizer(self, call: ops.Call, norm: tuple[Any, ...]) -> FakeQuantize:
        options, axis = weight_options(call, self.backend, self.twin.settings), weight_axis(call)
        if self.options.method == "range":
            return WeightFakeQuantize(axis, **options)
        top = 2 ** (options["bits"] - 1) - 1
        signed = Grid(grid("int8").dtype, -127 if top == 127 else -top - 1, top, symmetric=True)
        tensors = tuple(edit.get_tensor(self.module, v.name) if isinstance(v, ops.Attr) else v for v in norm)
        weight = edit.get_tensor(self.module, call["weight"].name)
        per_channel, learn = options["per_channel"], self.options.learn_scale
        return LearnedFakeQuantize(signed, learn=learn, weight=weight, axis=axis, per_channel=per_channel, norm=tensors)


def _keeps_values(node: fx.Node) -> bool:
    """Whether an operator only hands on values of its input, so that they stay on its grid."""
    found = ops.lookup(node)
    return found is not None and (found.family == "movement" or found.kind in _HANDING_ON or "max_pool" in found.kind)


_HANDING_ON = ("relu", "identity", "dropout", "getitem")
