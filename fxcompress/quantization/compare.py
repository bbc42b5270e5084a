"""Where a quantized model loses accuracy: weights and activations against the float model's, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from fxcompress.data import batches
from fxcompress.errors import ConfigError, DataError
from fxcompress.graph import ops, qdq
from fxcompress.graph.inputs import Arguments
from fxcompress.graph.island import regions
from fxcompress.graph.recorder import Recorder
from fxcompress.graph.shapes import module_of
from fxcompress.graph.trace import is_traced, region_inputs, trace
from fxcompress.graph.tree import check_module
from fxcompress.manager import PassManager
from fxcompress.pass_base import Pass
from fxcompress.plan import Plan
from fxcompress.quantization.quantizer import in_eval_mode

if TYPE_CHECKING:
    pass

from fxcompress.quantization.comparison import ActivationRow, Comparison, Sums, WeightRow

__all__ = ["compare_activations", "compare_weights"]

_USUAL = ("fold-batchnorm", "fuse-activations")


def compare_weights(fp_model: nn.Module, quant_model: nn.Module, example_inputs: Any = None) -> Comparison[WeightRow]:
    """A row per layer whose weight is int8 in ``quant_model``: name, SNR in dB, largest error, cosine; worst first.

    The float model is brought into the form it was quantized in first (batch normalisation folded, ...), in a copy. Where
    nothing is int8 (half precision, a module changed by hand), every weight of two dimensions or more counts.
    """
    for what, model in (("fp_model", fp_model), ("quant_model", quant_model)):
        check_module(model, what)
    reference = _in_same_form(fp_model, quant_model, example_inputs)
    exact = dict([*reference.named_parameters(), *reference.named_buffers()])
    rows = []
    portable = _portable(quant_model)
    for name, value in list(_int8_weights(portable)) or list(_wide_weights(portable)):
        if name in exact and exact[name].shape == value.shape:
            sums = Sums()
            sums.add(exact[name], value)
            rows.append(WeightRow(_layer_of(name), sums.snr_db, sums.largest, sums.cosine))
    if not rows:
        raise ConfigError("no layer of the two models has a weight of the same name and shape.")
    return Comparison(sorted(rows, key=lambda row: row.snr_db))


def _layer_of(tensor: str) -> str:
    owner, _, leaf = tensor.rpartition(".")
    return owner if leaf == "weight" and owner else tensor


def _wide_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model in floating point: its parameters of two dimensions or more."""
    yield from ((name, p) for name, p in model.named_parameters() if p.dim() > 1 and p.is_floating_point())


def _int8_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What the int8 weights of a model stand for, under their names."""
    buffers = dict(model.named_buffers())
    axes = {
        f"{region}.{node.args[0].target}" if region else str(node.args[0].target): int(node.args[2])
        for region, graph in regions(model).items()
        for node in graph.meta.get("portable", graph).graph.nodes
        if node.target is qdq.dequantize_per_channel
    }
    for name, levels in buffers.items():
        if f"{name}_scale" in buffers:
            zero_point = buffers.get(f"{name}_zero_point")
            axis = axes.get(name, 0)
            yield name, qdq.dequantize_per_channel(levels, buffers[f"{name}_scale"], axis, zero_point)


def _portable(model: nn.Module) -> nn.Module:
    """The quantize/dequantize graph of a lowered model, or the model itself."""
    if not isinstance(model, fx.GraphModule) or not is_traced(model):
        return model
    portable: nn.Module = model.meta.get("portable", model)
    return portable


def _in_same_form(fp_model: nn.Module, quant_model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    """A copy of the float model, rewritten by the same float-to-float steps as the quantized one."""
    if not is_traced(quant_model):
        return trace(in_eval_mode(fp_model), example_inputs)
    history = getattr(quant_model, "meta", {}).get("history", [])
    steps = [step for entry in history for step in Plan.parse(entry["plan"]) if _keeps_float(step)]
    plan = Plan(tuple(steps)) if history else Plan.parse(list(_USUAL))
    manager = PassManager(plan, verify=False, reproducer=False, progress=False)
    return manager.run(in_eval_mode(fp_model), example_inputs)


def _keeps_float(step: Pass) -> bool:
    return "float" in step.takes and step.leaves is None and not step.needs and step.name not in ("require", "cast-half")


def compare_activations(
    fp_model: nn.Module, quant_model: nn.Module, data: Iterable[Any], *, num_batches: int | None = None
) -> Comparison[ActivationRow]:
    """A row per quantized value, worst first: the whole error, the layer's own, range use and clip rate (ActivationRow).

    ``data`` is an iterable of batches (or one tensor), of which up to ``num_batches`` are used. The quantized model is run
    in its portable form. Where nothing in it is quantized (half precision, a module changed by hand), every layer counts.
    Raises DataError where there is no data, ConfigError where the two have no value in common.
    """
    for what, model in (("fp_model", fp_model), ("quant_model", quant_model)):
        check_module(model, what)
    portable = _portable(quant_model)
    reference: fx.GraphModule | None = None
    found: dict[tuple[str, str], _Watched] = {}
    for call in batches(data, fp_model, num_batches):
        if reference is None:
            reference = _in_same_form(fp_model, quant_model, call)
            portable = portable if is_traced(portable) else trace(in_eval_mode(portable), call)
            counts = _is_quantized if _any_quantized(portable) else ops.is_layer
        for region, graph in regions(reference).items():
            other = regions(portable).get(region)
            if other is not None:
                _watch(
                    region, graph, other.meta.get("portable", other), region_inputs(reference, call)[region], counts, found
                )
    if reference is None:
        raise DataError("the dataloader is empty: there is nothing to compare on.")
    if not found:
        raise ConfigError("the two models have no quantized value, and no layer, of the same name in common.")
    rows = [watched.row() for watched in found.values()]
    return Comparison(sorted(rows, key=lambda row: row.snr_db))


def _watch(
    region: str,
    graph: fx.GraphModule,
    other: fx.GraphModule,
    call: Arguments,
    counts: Callable[[fx.Node], bool],
    found: dict[tuple[str, str], _Watched],
) -> None:
    """Run one batch through both graphs, the quantized one twice: on its own values, and on the float model's."""
    names = {node.name for node in graph.graph.nodes}
    wanted = {node.name: node for node in other.graph.nodes if node.name in names and counts(node)}
    exact = _Values(graph, set(wanted), {}, lambda node, value: value)
    exact.record(call)
    kept = {name: value for name, value in exact.values.items() if isinstance(value, Tensor)}
    whole = _Values(other, set(kept), {}, _as_read)
    whole.record(call)
    local = _Values(other, set(kept), kept, _as_read)
    local.record(call)
    for name, value in kept.items():
        node = wanted[name]
        if whole.values[name].shape != value.shape:
            continue
        if (region, name) not in found:
            found[region, name] = _Watched(_title(region, node), ops.kind(node))
        found[region, name].add(node, value, whole.values[name], local.values[name])


def _title(region: str, node: fx.Node) -> str:
    """A layer's own name for a layer, the node's for anything else."""
    label = (ops.owner_name(node) if ops.is_layer(node) else "") or node.name
    return f"{region}.{label}" if region else label


def _any_quantized(model: nn.Module) -> bool:
    graphs = [graph.meta.get("portable", graph) for graph in regions(model).values()]
    return any(_is_quantized(node) for graph in graphs for node in graph.graph.nodes)


def _is_quantized(node: fx.Node) -> bool:
    """Whether an operator runs in integers or its value is put on a grid."""
    return bool(node.meta.get("integer")) or _grid_reader(node) is not None


def _grid_reader(node: fx.Node) -> fx.Node | None:
    """The node that puts a value on a grid: a quantize, or a fake-quantizer."""
    for user in node.users:
        if user.target is qdq.quantize or (user.op == "call_module" and user.meta.get("observer")):
            return user
    return None


def _as_read(node: fx.Node, value: Any) -> Any:
    """A value as its readers get it: through the grid it is put on."""
    reader = _grid_reader(node)
    if reader is None or not isinstance(value, Tensor):
        return value
    if reader.op == "call_module":
        return module_of(reader)(value)
    _, scale, zero_point, *levels = reader.args
    return qdq.dequantize(qdq.quantize(value, scale, zero_point, *levels), scale, zero_point)


class _Values(Recorder):
    """Runs a graph and keeps what ``seen`` makes of the wanted values; ``given`` values replace computed ones."""

    def __init__(self, module: fx.GraphModule, wanted: set[str], given: dict[str, Tensor], seen: Any) -> None:
        super().__init__(module)
        self.wanted, self.given, self.seen = wanted, given, seen
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        with torch.no_grad():
            value = super().run_node(n)
            if n.name in self.wanted:
                self.values[n.name] = self.seen(n, value)
        given = self.given.get(n.name)
        return value if given is None else given.to(value.dtype)


@dataclass
class _Watched:
    """One value over all batches."""

    name: str
    kind: str
    whole: Sums = field(default_factory=Sums)
    local: Sums = field(default_factory=Sums)
    low: float = math.inf
    high: float = -math.inf
    bounds: tuple[float, float] | None = None
    clipped: int = 0
    count: int = 0

    def add(self, node: fx.Node, exact: Tensor, whole: Tensor, local: Tensor) -> None:
        self.whole.add(exact, whole)
        self.local.add(exact, local)
        self.low, self.high = min(self.low, float(exact.min())), max(self.high, float(exact.max()))
        self.count += exact.numel()
        reader = _grid_reader(node)
        if reader is not None and reader.target is qdq.quantize:
            grid = qdq.read(reader)
            self.bounds = low, high = grid.bounds
            self.clipped += int(((exact < low - grid.scale / 2) | (exact > high + grid.scale / 2)).sum())

    def row(self) -> ActivationRow:
        use = math.nan
        if self.bounds is not None:
            low, high = self.bounds
            use = max(0.0, min(self.high, high) - max(self.low, low)) / (high - low)
        rate = self.clipped / self.count if self.bounds is not None else math.nan
        return ActivationRow(
            self.name,
            self.kind,
            self.whole.snr_db,
            self.whole.largest,
            self.whole.cosine,
            self.local.snr_db,
            use,
            rate,
        )
