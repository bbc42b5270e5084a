"""The coverage report: how much of a graph runs in integers, and the reason for every operator that does not."""

from __future__ import annotations

from dataclasses import dataclass

from tabulate import tabulate
from torch import fx, nn

from fxcompress.graph import ops, qdq
from fxcompress.graph.cost import cost, macs
from fxcompress.graph.island import regions

__all__ = ["Coverage", "FloatOperator", "as_placed", "coverage"]

_SILENT = ("query", "other")
_UNCOUNTED = ("in_one_layout",)
_BOUNDARIES = (qdq.quantize, qdq.dequantize, qdq.quantize_per_channel, qdq.dequantize_per_channel)


@dataclass(frozen=True)
class FloatOperator:
    """An operator left in float, and why."""

    node: str
    kind: str
    macs: int
    reason: str


@dataclass(frozen=True)
class Coverage:
    """What runs in integers, the number of quantize and dequantize boundaries, and the float operators, costliest first.

    ``counted``  whether shapes are known, and with them MACs
    """

    integer_macs: int
    total_macs: int
    integer_nodes: int
    total_nodes: int
    boundaries: int
    floats: tuple[FloatOperator, ...]
    counted: bool = True

    @property
    def mac_share(self) -> float:
        """The share of multiply-accumulates in integers, in [0, 1]; 0 where there are none."""
        return self.integer_macs / self.total_macs if self.total_macs else 0.0

    @property
    def node_share(self) -> float:
        """The share of operators in integers, in [0, 1]; 0 where there are none."""
        return self.integer_nodes / self.total_nodes if self.total_nodes else 0.0

    @property
    def told(self) -> str:
        """The share of MACs in words."""
        return f"{self.mac_share:.1%} of {self.total_macs:,} MACs" if self.counted else "an unknown share of the MACs"

    def __str__(self) -> str:
        head = (
            f"{self.told} and {self.integer_nodes} of {self.total_nodes} operators "
            f"run in integers; {self.boundaries} quantize/dequantize boundaries"
        )
        rows = [(row.node, row.kind, f"{row.macs:,}", row.reason) for row in self.floats]
        return f"{head}\n{tabulate(rows, ('left in float', 'kind', 'MACs', 'reason'))}" if rows else head


def coverage(model: nn.Module) -> Coverage:
    """Count over every compiled region of ``model``; works on any stage.

    What a runtime makes of the graph it is given is its own: for an engine the operators are counted as they were placed.
    """
    integer_macs = total_macs = integer_nodes = total_nodes = boundaries = 0
    floats: list[FloatOperator] = []
    for region, module in regions(model).items():
        for node in as_placed(module).graph.nodes:
            if _is_boundary(node):
                boundaries += 1
            elif _counts(node):
                total_macs += macs(node)
                total_nodes += 1
                if node.meta.get("integer"):
                    integer_macs += macs(node)
                    integer_nodes += 1
                else:
                    floats.append(_float_operator(region, node))
    floats.sort(key=lambda row: -row.macs)
    counted = total_macs > 0 or cost(model).counted
    return Coverage(integer_macs, total_macs, integer_nodes, total_nodes, boundaries, tuple(floats), counted)


def as_placed(module: fx.GraphModule) -> fx.GraphModule:
    """The graph whose operators are counted: the portable one where an engine runs the whole."""
    engine = any(node.meta.get("kind") == "engine" for node in module.graph.nodes)
    placed: fx.GraphModule = module.meta["portable"] if engine else module
    return placed


def _is_boundary(node: fx.Node) -> bool:
    if node.target == "dequantize" or getattr(node.target, "__name__", "") == "quantize_input":
        return True
    return node.target in _BOUNDARIES and not _is_weight(node)


def _is_weight(node: fx.Node) -> bool:
    source = node.args[0]
    return isinstance(source, fx.Node) and source.op == "get_attr"


def _counts(node: fx.Node) -> bool:
    """Whether a node is an operator on tensors: not a question about shapes, nor a step into a tuple."""
    if not node.op.startswith("call") or node.target in _BOUNDARIES or getattr(node.target, "__name__", "") in _UNCOUNTED:
        return False
    if node.op == "call_module" and node.meta.get("observer"):
        return False
    if node.meta.get("integer"):
        return True
    if "tensor_meta" in node.meta and node.meta["tensor_meta"] is None:
        return False
    found = ops.lookup(node)
    return found is None or (found.family not in _SILENT and found.kind not in ("getitem", "tap"))


def _float_operator(region: str, node: fx.Node) -> FloatOperator:
    name = ops.owner_name(node) if node.op == "call_module" else node.name
    reason = node.meta.get("float", "it was not placed")
    return FloatOperator(f"{region}.{name}" if region else name, ops.kind(node), macs(node), reason)
