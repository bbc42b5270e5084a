"""Numbers in a graph that state sizes, bounds or positions of channels: what they become when channels go.

Each kind of movement proposes spellings; none is believed. A proposal is taken where it *commutes*: on a tensor that numbers
its entries, the new call on the kept part gives the kept part of the old call's result.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxcompress.graph import ops
from fxcompress.graph.channels.calls import Spelling
from fxcompress.graph.channels.kept import Kept, select
from fxcompress.graph.channels.labels import Value

__all__ = ["PROPOSALS", "Index", "Move", "commutes", "gathered"]


@dataclass(frozen=True)
class Move:
    """One movement call: before and after the cut.

    ``source``   the operand before the cut, ``results`` what the call gave
    ``resolve``  makes the old call on a tensor, or looks up a node's plain value
    ``changed``  operands that are numbers, and other ones after the cut; ``varying``: those that differ from call to call
    """

    call: ops.Call
    source: Value
    results: list[Value]
    kept: Kept
    resolve: Callable[[Any], Any]
    changed: frozenset[fx.Node] = frozenset()
    varying: frozenset[fx.Node] = frozenset()

    @property
    def spelling(self) -> Spelling:
        return Spelling.of(self.call.node)

    def size(self, dim: int, result: int = 0) -> int:
        """The new size of a result along ``dim``."""
        return self.kept.shape(self.results[result])[dim]

    def line(self, dim: int) -> np.ndarray:
        """Which indices of the operand stay along ``dim``, where that is one answer."""
        mask = self.kept.masks(self.source).get(dim)
        if mask is None:
            return np.ones(self.source.shape[dim], dtype=bool)
        return mask.reshape(-1) if mask.size == mask.shape[dim] else np.ones(self.source.shape[dim], dtype=bool)


@dataclass(frozen=True)
class Index:
    """An index tensor to be stored beside the graph."""

    values: tuple[int, ...]

    def tensor(self) -> torch.Tensor:
        return torch.tensor(self.values, dtype=torch.int64, device="cpu")


def commutes(run_old: Callable[[torch.Tensor], Any], run_new: Callable[[torch.Tensor], Any], move: Move) -> bool:
    """Whether the new call on the kept part is the kept part of the old call, for every entry of every result."""
    size = int(np.prod(move.source.shape))
    numbers = torch.arange(1, size + 1, dtype=torch.float32 if size < 1 << 24 else torch.float64, device="cpu")
    numbers = numbers.reshape(move.source.shape)
    old = pytree.tree_leaves(run_old(numbers))
    try:
        new = pytree.tree_leaves(run_new(select(numbers, move.kept.masks(move.source))))
    except (RuntimeError, IndexError, ValueError, TypeError):
        return False
    if len(old) != len(new):
        return False
    return all(
        torch.equal(select(before, move.kept.masks(value)), after)
        for before, after, value in zip(old, new, move.results, strict=True)
    )


def _sizes(name: str) -> Callable[[Move], Iterator[Spelling]]:
    """Sizes written one by one: those written as numbers are replaced, then all that change; one may be left open."""

    def propose(move: Move) -> Iterator[Spelling]:
        sizes = move.call[name]
        if not isinstance(sizes, (tuple, list)) or not move.results:
            return
        new, old = move.kept.shape(move.results[0]), move.results[0].shape
        if len(sizes) != len(new):
            return
        written = [n if isinstance(s, int) and s == o else s for s, o, n in zip(sizes, old, new, strict=True)]
        yield _with(move, name, written)
        stale = [o != n or s in move.changed for s, o, n in zip(sizes, old, new, strict=True)]
        if not any(s in move.varying for s, is_stale in zip(sizes, stale, strict=True) if is_stale):
            yield _with(move, name, [n if is_stale else s for s, n, is_stale in zip(sizes, new, stale, strict=True)])
        elif -1 not in written and name == "shape":
            still = [o != n and not isinstance(s, int) for s, o, n in zip(sizes, old, new, strict=True)]
            yield _with(move, name, [-1 if is_stale else s for s, is_stale in zip(written, still, strict=True)])

    return propose


def _repeats(move: Move) -> Iterator[Spelling]:
    """How often each dimension is repeated, from the sizes that are left."""
    given, old, new = move.call["repeats"], move.source.shape, move.kept.shape(move.results[0])
    if not isinstance(given, (tuple, list)) or len(given) != len(new):
        return
    left = (*(1 for _ in range(len(new) - len(old))), *move.kept.shape(move.source))
    yield _with(move, "repeats", [n // had if isinstance(r, int) else r for r, n, had in zip(given, new, left, strict=True)])


def _with(move: Move, name: str, values: list[Any]) -> Spelling:
    """The call with one argument that may be spread over positionals replaced."""
    node = move.call.node
    position = 1 if node.op == "call_method" else ops.argument_order(node).index(f"*{name}")
    spread = not (len(node.args) > position and isinstance(node.args[position], (tuple, list)))
    tail = tuple(values) if spread else (tuple(values),)
    return replace(Spelling.of(node), args=(*node.args[:position], *tail))


def _unflatten(move: Move) -> Iterator[Spelling]:
    dim = move.source.dim(_plain_dim(move))
    sizes = move.kept.shape(move.results[0])[dim : dim + len(move.results[0].shape) - len(move.source.shape) + 1]
    yield Spelling("call_function", torch.unflatten, (move.call.node.args[0], dim, tuple(sizes)), {})


def _plain_dim(move: Move, default: int = 0) -> int:
    found = move.call["dim"]
    return found if isinstance(found, int) else default


def _split(move: Move) -> Iterator[Spelling]:
    """Chunks and equal splits become a split into the sizes that are left."""
    dim = move.source.dim(_plain_dim(move))
    sizes = [move.size(dim, i) for i in range(len(move.results))]
    yield Spelling("call_function", torch.split, (move.call.node.args[0], sizes, dim), {})


def _slice(move: Move) -> Iterator[Spelling]:
    """Bounds along one dimension become a slice of what is left, or a list of positions."""
    dim = move.source.dim(_plain_dim(move))
    positions = _positions(move, dim)
    if positions is None:
        return
    yield from _picked(move, dim, positions)


def _select(move: Move) -> Iterator[Spelling]:
    """One index: its place among those that are left."""
    dim, index = move.source.dim(_plain_dim(move)), move.call["index"]
    kept = move.line(dim)
    if isinstance(index, int) and kept[index]:
        place = int(kept[: index % len(kept)].sum())
        yield Spelling("call_function", torch.select, (move.call.node.args[0], dim, place), {})


def _positions(move: Move, dim: int) -> list[int] | None:
    """For a call that only picks indices along ``dim``: the new operand's positions in the order of the new result."""
    line = torch.arange(move.source.shape[dim], dtype=torch.float32, device="cpu")
    shape = [1] * len(move.source.shape)
    shape[dim] = -1
    found = move.resolve(line.reshape(shape).expand(move.source.shape).contiguous())
    if not isinstance(found, torch.Tensor) or found.dim() != len(move.source.shape):
        return None
    picked = found.movedim(dim, 0).reshape(found.shape[dim], -1)[:, 0].to(torch.int64).numpy()
    kept = move.line(dim)
    rank = np.cumsum(kept) - 1
    return rank[picked[kept[picked]]].tolist()


def _picked(move: Move, dim: int, positions: list[int]) -> Iterator[Spelling]:
    source = move.call.node.args[0]
    if positions and len(set(steps := np.diff(positions).tolist())) <= 1 and (not steps or steps[0] > 0):
        step = steps[0] if steps else 1
        bounds = (slice(None),) * dim + (slice(positions[0], positions[-1] + 1, step if step != 1 else None),)
        yield Spelling("call_function", operator.getitem, (source, bounds), {})
    yield Spelling("call_function", torch.index_select, (source, dim, Index(tuple(positions))), {})


def gathered(move: Move) -> Iterator[Spelling]:
    """Whatever permutes or picks along single dimensions can be written as a selection of positions."""
    for dim in sorted(move.kept.masks(move.source)):
        positions = _positions(move, dim)
        if positions is not None:
            yield from _picked(move, dim, positions)


def _item(move: Move) -> Iterator[Spelling]:
    """``x[…]``: every part of the index that picks along a dimension that loses something is written anew."""
    node, index = move.call.node, move.call["index"]
    parts = list(index) if isinstance(index, tuple) else [index]
    consumed = sum(1 for part in parts if part is not None and part is not Ellipsis)
    where = next((i for i, part in enumerate(parts) if part is Ellipsis), len(parts))
    fill = [slice(None)] * (len(move.source.shape) - consumed)
    parts = [*parts[:where], *fill, *parts[where + 1 :]]
    dim, new = 0, list[Any]()
    for part in parts:
        if part is None:
            new.append(part)
            continue
        new.append(_reindex(part, move.line(dim), move))
        dim += 1
    yield Spelling("call_function", operator.getitem, (node.args[0], tuple(new)), {})
    yield from gathered(move)


def _reindex(part: Any, kept: np.ndarray, move: Move) -> Any:
    if kept.all():
        return part
    rank = np.cumsum(kept) - 1
    if isinstance(part, int):
        return int(rank[part])
    if isinstance(part, (list, tuple)) and all(isinstance(p, int) for p in part):
        return [int(rank[p]) for p in part if kept[p]]
    if isinstance(part, slice) and not any(isinstance(b, fx.Node) for b in (part.start, part.stop, part.step)):
        picked = np.arange(len(kept))[part]
        positions = rank[picked[kept[picked]]]
        if len(positions) == 0:
            return slice(0, 0)
        steps = set(np.diff(positions).tolist())
        if len(steps) <= 1:
            step = steps.pop() if steps else 1
            whole = step == 1 and positions[0] == 0 and positions[-1] == rank[-1]
            return slice(None) if whole else slice(int(positions[0]), int(positions[-1]) + 1, None if step == 1 else step)
        return positions.tolist()
    if isinstance(part, fx.Node) and part.op == "get_attr":
        held = move.resolve(part)
        if isinstance(held, torch.Tensor) and held.dim() == 1 and held.dtype == torch.int64:
            picked = held.numpy()
            return Index(tuple(rank[picked[kept[picked]]].tolist()))
    return part


def _roll(move: Move) -> Iterator[Spelling]:
    shifts, dims = move.call["shifts"], move.call["dims"]
    shifts = list(shifts) if isinstance(shifts, (tuple, list)) else [shifts]
    dims = list(dims) if isinstance(dims, (tuple, list)) else [dims]
    new = []
    for shift, dim in zip(shifts, dims, strict=False):
        kept = move.line(move.source.dim(dim))
        tail = kept[len(kept) - shift % len(kept) :] if isinstance(shift, int) else kept
        new.append(shift if kept.all() else int(tail.sum()))
    yield Spelling("call_function", torch.roll, (move.call.node.args[0], new, dims), {})
    yield from gathered(move)


def _pad(move: Move) -> Iterator[Spelling]:
    """Padding along a dimension that loses channels: what is left of it on either side."""
    amounts = list(move.call["pad"])
    result, masks = move.results[0], move.kept.masks(move.results[0])
    rank = len(result.shape)
    for i in range(0, len(amounts), 2):
        dim = rank - 1 - i // 2
        if dim not in masks or not all(isinstance(a, int) and a >= 0 for a in amounts[i : i + 2]):
            continue
        line = masks[dim].reshape(-1)
        before, after = amounts[i : i + 2]
        amounts[i] = int(line[:before].sum())
        amounts[i + 1] = int(line[len(line) - after :].sum()) if after else 0
    node = move.call.node
    mode, value = move.call["mode"] or "constant", move.call["value"]
    yield Spelling("call_function", torch.nn.functional.pad, (node.args[0], amounts, mode, value), {})


PROPOSALS: dict[str, Callable[[Move], Iterator[Spelling]]] = {
    "reshape": _sizes("shape"),
    "expand": _sizes("sizes"),
    "repeat": _repeats,
    "unflatten": _unflatten,
    "split": _split,
    "chunk": _split,
    "select": _select,
    "slice": _slice,
    "narrow": _slice,
    "index_select": _slice,
    "getitem": _item,
    "roll": _roll,
    "pad": _pad,
}
"""Kind → the spellings to try after the one that is there; other kinds try :func:`gathered`."""
