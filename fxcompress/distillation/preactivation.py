"""Values before a ReLU: finding them in a graph, and the margin of their channels (OFD, Heo 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from fxcompress.distillation.losses import ofd_margin
from fxcompress.errors import ConfigError
from fxcompress.graph import edit, ops, taps
from fxcompress.graph.shapes import shape_of

__all__ = ["batch_norm_margin", "find_preactivations", "measured_margin", "preactivation"]


def find_preactivations(graph: fx.GraphModule) -> list[str]:
    """The last value before a ReLU at every resolution, in graph order: an addition, or BatchNorm where there is none."""
    found: dict[tuple[int, ...], list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if ops.kind(node) not in ("relu", "relu6") or not node.all_input_nodes:
            continue
        source = node.all_input_nodes[0]
        shape = shape_of(source)
        if ops.kind(source) in ("batch_norm", "add") and shape is not None and len(shape) > 2:
            found.setdefault(tuple(shape[2:]), []).append(source)
    if not found:
        raise ConfigError("no BatchNorm or addition before a ReLU was found: name teacher_layers and student_layers.")
    chosen = [([n for n in nodes if ops.kind(n) == "add"] or nodes)[-1] for nodes in found.values()]
    return [node.name for node in sorted(chosen)]


def preactivation(addresses: Sequence[str]) -> tuple[str, ...]:
    """Addresses of what enters the activation; those that say another place keep it."""
    return tuple(address if ":" in address else f"{address}:preactivation" for address in addresses)


def batch_norm_margin(graph: fx.GraphModule, name: str) -> Tensor | None:
    """The margin of each channel of a tapped value, from the BatchNorm that made it; None where there is none.

    Of an addition, the BatchNorm of its first such operand: the end of the residual branch.
    """
    value = taps.taps(graph)[name]
    for node in [value, *(value.all_input_nodes if ops.kind(value) == "add" else ())]:
        norm = ops.read(node) if node.op.startswith("call") else None
        if norm is not None and norm.kind == "batch_norm" and norm["weight"] is not None and norm["bias"] is not None:
            weight, bias = (edit.get_tensor(graph, norm[part].name).detach() for part in ("weight", "bias"))
            return ofd_margin(bias, weight).to(weight.dtype)
    return None


def measured_margin(value: Tensor) -> Tensor:
    """The mean of each channel's negative values in a batch; 0 where it has none."""
    by_channel = value.detach().float().movedim(1, 0).flatten(1)
    negative = by_channel < 0
    return (by_channel * negative).sum(1) / torch.clamp(negative.sum(1), min=1)
