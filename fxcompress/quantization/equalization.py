"""Cross-layer equalization: channels of one layer and the next share their ranges out between them.

Where a layer W¹, b¹ feeds another W² through an operator with f(s·x) = s·f(x), dividing output channel i of the first by sᵢ
and multiplying input channel i of the second by it changes nothing. With sᵢ = √(r¹ᵢ/r²ᵢ), r the largest weight of a channel,
both ranges become √(r¹ᵢ·r²ᵢ) (Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxcompress.graph import edit, ops
from fxcompress.graph.shapes import shape_of

__all__ = ["Bounds", "Pair", "chains", "equalize", "pairs"]

_ELEMENTWISE = ("relu", "leaky_relu", "identity", "dropout")
_POOLS = tuple(
    f"{kind}{dims}d" for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool") for dims in (1, 2, 3)
)


@dataclass(frozen=True)
class Pair:
    """Two layers between which channels can be rescaled.

    ``clipped``  what clips at 6 between them, which a rescaling would move: a node, or the first layer itself
    ``spread``   how many inputs of the second layer one channel of the first becomes (behind a flatten)
    ``watched``  the observers between them
    """

    first: ops.Call
    second: ops.Call
    clipped: tuple[fx.Node, ...]
    spread: int
    watched: tuple[fx.Node, ...] = ()


Bounds = tuple[Tensor, Tensor]
"""The least and the largest factor of every channel."""


def pairs(module: fx.GraphModule, skip: Callable[[fx.Node, str], None]) -> list[Pair]:
    """Every pair, in graph order; ``skip`` hears of layers whose result goes several ways or through something else."""
    reading, tied = edit.readers(module), edit.tied(module)
    found = []
    for node in module.graph.nodes:
        call = _layer(module, node, reading, tied)
        if call is not None:
            pair = _follow(module, call, reading, tied)
            if isinstance(pair, Pair):
                found.append(pair)
            else:
                skip(node, pair)
    return found


def _layer(module: fx.GraphModule, node: fx.Node, reading: dict[str, list[fx.Node]], tied: set[int]) -> ops.Call | None:
    """``node`` as a layer whose stored weight is its own."""
    call = ops.read(node) if node.op.startswith("call") else None
    if call is None or not call.kind.startswith(("conv", "linear")) or not isinstance(call["weight"], ops.Attr):
        return None
    if call["bias"] is not None and not isinstance(call["bias"], ops.Attr):
        return None
    if call.kind.startswith("conv_transpose") and call["groups"] != 1:
        return None
    names = [call[name].name for name in ("weight", "bias") if call[name] is not None]
    alone = all(len(reading.get(name, ())) <= 1 and id(edit.get_tensor(module, name)) not in tied for name in names)
    return call if alone else None


def _follow(module: fx.GraphModule, call: ops.Call, reading: dict[str, list[fx.Node]], tied: set[int]) -> Pair | str:
    clipped = [call.node] if call["activation"] == "relu6" else []
    watched: list[fx.Node] = []
    node, spread = call.node, 1
    while True:
        readers = ops.value_readers(node)
        if len(readers) != 1:
            return f"the result of {node.name!r} goes several ways" if readers else "nothing reads its result"
        before, node = node, readers[0]
        second = _layer(module, node, reading, tied)
        if second is not None and node.args[:1] == (before,):
            reason = _misfit(call, second, before, spread)
            return reason or Pair(call, second, tuple(clipped), spread, tuple(watched))
        if node.meta.get("observer"):
            watched.append(node)
            continue
        step = _passes(node, call)
        if step is None:
            return f"{ops.kind(node)!r} follows, past which channels cannot be rescaled"
        spread *= step
        if _clips(node):
            clipped.append(node)


def _misfit(first: ops.Call, second: ops.Call, between: fx.Node, spread: int) -> str | None:
    """Why the channels of ``first`` are not the input channels of ``second``, or None."""
    if first.kind == "linear":
        return None if second.kind == "linear" else "a convolution reads what a linear layer gives along another axis"
    shape = shape_of(between)
    if second.kind == "linear":
        flat = shape is not None and len(shape) == 2
        return None if flat else "a linear layer reads it along another axis than that of its channels"
    fits = spread == 1 and (shape is None or len(shape) == int(second.kind[-2]) + 2)
    return None if fits else "a flatten stands before a convolution"


def _passes(node: fx.Node, first: ops.Call) -> int | None:
    """How many values one channel becomes behind a channel-wise, positively homogeneous operator; None for any other."""
    kind = ops.kind(node)
    if kind in _ELEMENTWISE or _clips(node):
        return 1
    if first.kind == "linear":  # channels are the last dimension there, and what follows works along others
        return None
    before, after = shape_of(node.all_input_nodes[0]), shape_of(node)
    if before is None or len(before) != int(first.kind[-2]) + 2:
        return 1 if before is None and kind in _POOLS else None
    if kind in ("flatten", "reshape"):
        flat = after is not None and len(after) == 2 and before[0] == after[0]
        return after[1] // before[1] if flat else None  # type: ignore[index]
    if kind == "mean":
        call = ops.read(node)
        dims = call["dim"] if call is not None else None
        listed = dims if isinstance(dims, (tuple, list)) else (dims,)
        return 1 if all(isinstance(d, int) and d % len(before) > 1 for d in listed) else None
    return 1 if kind in _POOLS else None


def _clips(node: fx.Node) -> bool:
    call = ops.read(node)
    if call is None:
        return False
    bounds = {"hardtanh": ("min_val", "max_val"), "clamp": ("min", "max")}.get(call.kind)
    return call.kind == "relu6" or (bounds is not None and (call[bounds[0]], call[bounds[1]]) == (0, 6))


def chains(found: Sequence[Pair]) -> list[list[Pair]]:
    """Pairs that share layers, in order from the first layer to the last."""
    made: list[list[Pair]] = []
    by_end: dict[fx.Node, list[Pair]] = {}
    for pair in found:
        chain = by_end.pop(pair.first.node, None)
        if chain is None:
            chain = []
            made.append(chain)
        chain.append(pair)
        by_end[pair.second.node] = chain
    return made


def equalize(
    module: fx.GraphModule,
    chosen: Sequence[Pair],
    bounds: Sequence[Bounds | None] | None = None,
    *,
    sweeps: int = 20,
    tolerance: float = 1e-3,
) -> None:
    """Rescale the pairs in turn until no factor moves by more than ``tolerance`` octaves, at most ``sweeps`` times.

    Factors are found in float64, within ``bounds`` where a pair has them; weights and biases are rounded once. A channel of
    zeros stays as it is.
    """
    names = {call["weight"].name for pair in chosen for call in (pair.first, pair.second)}
    weights = {name: edit.get_tensor(module, name) for name in names}
    exact = {name: w.detach().to(torch.float64).clone(memory_format=torch.contiguous_format) for name, w in weights.items()}
    upper = [_outputs(pair.first, exact[pair.first["weight"].name]) for pair in chosen]
    lower = [_inputs(pair, exact[pair.second["weight"].name]) for pair in chosen]
    totals = [view.new_ones(view.shape[1]) for view in upper]
    limits = list(bounds) if bounds is not None else [None] * len(chosen)
    for _ in range(sweeps):
        moved = 0.0
        for rows, columns, total, limit in zip(upper, lower, totals, limits, strict=True):
            ranges = rows.abs().amax((0, 2)), columns.abs().amax((1, 3)).flatten()
            usable = (ranges[0] > 0) & (ranges[1] > 0)
            factor = torch.where(usable, (ranges[0] / ranges[1]).sqrt(), 1.0)
            if limit is not None:
                factor = torch.where(usable, (total * factor).clamp(*limit) / total, 1.0)
            rows.div_(factor[None, :, None])
            columns.mul_(factor.reshape(columns.shape[0], 1, -1, 1))
            total.mul_(factor)
            moved = max(moved, float(factor.log2().abs().max()))
        if moved <= tolerance:
            break
    for name, value in exact.items():
        edit.set_tensor(module, name, torch.empty_like(weights[name]).copy_(value))
    for pair, total in zip(chosen, totals, strict=True):
        if pair.first["bias"] is not None:
            bias = edit.get_tensor(module, pair.first["bias"].name)
            edit.set_bias(module, pair.first, (bias.detach().to(torch.float64) / total.to(bias.device)).to(bias.dtype))


def _outputs(call: ops.Call, weight: Tensor) -> Tensor:
    """The weight as ``[before, output channels, after]``."""
    if call.kind.startswith("conv_transpose"):
        return weight.view(weight.shape[0], weight.shape[1], -1)
    return weight.view(1, weight.shape[0], -1)


def _inputs(pair: Pair, weight: Tensor) -> Tensor:
    """The weight as ``[groups, outputs of a group, channels of a group, everything else]``."""
    call = pair.second
    if call.kind == "linear":
        return weight.view(1, weight.shape[0], -1, pair.spread)
    if call.kind.startswith("conv_transpose"):
        return weight.view(1, 1, weight.shape[0], -1)
    groups = call["groups"] or 1
    return weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1)
