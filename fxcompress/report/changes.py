"""What a compression changed in a graph: operators before and after, side by side, matched by name."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import fx, nn

from fxcompress.graph import ops
from fxcompress.graph.coverage import as_placed
from fxcompress.graph.island import regions
from fxcompress.graph.shapes import module_of

__all__ = ["Line", "Operator", "alone", "compare", "counts", "operators", "rows"]


@dataclass(frozen=True)
class Operator:
    """A node that computes or holds a tensor: what it is, what comes out, and which operators it reads."""

    name: str
    kind: str
    shape: str
    dtype: str
    sources: tuple[str, ...]

    @property
    def result(self) -> str:
        """``64×56×56 float32``, as far as it is known."""
        return f"{self.shape} {self.dtype}".strip()


@dataclass(frozen=True)
class Line:
    """An operator as it was and as it is; None where it is not."""

    before: Operator | None
    after: Operator | None

    @property
    def status(self) -> str:
        """added, removed, changed (another kind, shape or dtype) or same."""
        if self.before is None or self.after is None:
            return "added" if self.before is None else "removed"
        was, now = self.before, self.after
        return "same" if (was.kind, was.shape, was.dtype) == (now.kind, now.shape, now.dtype) else "changed"

    @property
    def difference(self) -> str:
        """What changed, in words."""
        if self.before is None or self.after is None:
            only = self.before or self.after
            assert only is not None
            return f"{only.kind} {only.result}".strip()
        pairs = [(getattr(self.before, key), getattr(self.after, key)) for key in ("kind", "shape", "dtype")]
        return "; ".join(f"{was or 'unknown'} → {now or 'unknown'}" for was, now in pairs if was != now)


def operators(model: nn.Module) -> list[Operator]:
    """The operators of every compiled region in order; weights and questions about shapes are left out."""
    made = []
    for region, module in regions(model).items():
        graph = as_placed(module).graph
        shown = {node for node in graph.nodes if not _hidden(node)}
        for node in graph.nodes:
            if node in shown:
                sources = tuple(dict.fromkeys(_within(region, source) for source in _read(node, shown)))
                made.append(Operator(_within(region, node), _kind(node), *_result(node), sources))
    return made


def _within(region: str, node: fx.Node) -> str:
    return f"{region}.{node.name}" if region else node.name


def _hidden(node: fx.Node) -> bool:
    if node.op in ("get_attr", "output"):
        return node.op == "get_attr"
    found = ops.lookup(node) if node.op.startswith("call") else None
    return (found is not None and found.family == "query") or node.meta.get("tensor_meta", node) is None


def _read(node: fx.Node, shown: set[fx.Node]) -> Iterator[fx.Node]:
    """The shown operators whose results a node reads."""
    return (source for source in node.all_input_nodes if source in shown)


def _kind(node: fx.Node) -> str:
    kind = str(node.meta.get("kind") or ops.kind(node))
    if kind == "unknown":
        return str(getattr(node.target, "__name__", node.target)).removesuffix(".default")
    return type(module_of(node)).__name__ if kind == "island" and node.op == "call_module" else kind


def _result(node: fx.Node) -> tuple[str, str]:
    """Shape and dtype as words; of several tensors the shapes of the first few."""
    meta = node.meta.get("tensor_meta")
    found = list(_tensors(meta))
    if node.op == "output" or not found:
        return "", ""
    shapes = ["×".join(map(str, item.shape)) or "scalar" for item in found[:3]] + ["…"] * (len(found) > 3)
    dtypes = dict.fromkeys(str(item.dtype).removeprefix("torch.") for item in found)
    return ", ".join(shapes), ", ".join(dtypes)


def _tensors(meta: Any) -> Iterator[Any]:
    if isinstance(getattr(meta, "shape", None), torch.Size):
        yield meta
    elif isinstance(meta, Mapping):
        for item in meta.values():
            yield from _tensors(item)
    elif isinstance(meta, (tuple, list)):
        for item in meta:
            yield from _tensors(item)


def compare(before: Sequence[Operator], after: Sequence[Operator]) -> list[Line]:
    """A line per operator, in the order of both graphs; one that moved stands where it is now."""
    lines: list[Line] = []
    was, now = ({op.name: op for op in side} for side in (before, after))
    for word, a, b, c, d in SequenceMatcher(None, list(was), list(now), autojunk=False).get_opcodes():
        if word != "equal":
            lines += [Line(op, None) for op in before[a:b] if op.name not in now]
        lines += [Line(was.get(op.name), op) for op in after[c:d]]
    return lines


def alone(graph: Sequence[Operator]) -> list[Line]:
    """A line per operator of a graph that is compared with nothing."""
    return [Line(operator, operator) for operator in graph]


def counts(lines: Sequence[Line]) -> Counter[str]:
    """How many operators were added, removed, changed, or stayed the same."""
    return Counter(line.status for line in lines)


def rows(lines: Sequence[Line]) -> list[tuple[Line | None, Line | None]]:
    """Lines for a drawing of two columns: removed and added ones of one place share rows."""
    made: list[tuple[Line | None, Line | None]] = []
    for replaced, group in itertools.groupby(lines, lambda line: line.status in ("added", "removed")):
        block = list(group)
        if replaced:
            gone, new = ([line for line in block if line.status == status] for status in ("removed", "added"))
            made += itertools.zip_longest(gone, new)
        else:
            made += [(line, line) for line in block]
    return made
