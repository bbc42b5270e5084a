"""Sums of products in index notation: which dimensions of the operands share an index, and which indices are left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fxcompress.graph import ops

__all__ = ["Notation", "notation"]

Notation = tuple[list[list[str]], list[str]]
"""The names of every operand's indices, and of the result's."""


def notation(call: ops.Call, operands: list[Any], ranks: list[int]) -> Notation | None:
    """``call`` on ``operands`` of these ranks in index notation; None where it is written in another form (lists)."""
    return _FORMS[call.kind](call, ranks) if len(operands) == len(ranks) else None


def _einsum(call: ops.Call, ranks: list[int]) -> Notation | None:
    """An ellipsis becomes names of its own, counted from the right."""
    if not isinstance(call["equation"], str):
        return None
    left, arrow, right = call["equation"].replace(" ", "").partition("->")

    def spell(term: str, size: int) -> list[str]:
        if "..." not in term:
            return list(term)
        before, after = term.split("...")
        hidden = size - len(before) - len(after)
        return [*before, *(f".{hidden - i}" for i in range(hidden)), *after]

    inputs = [spell(term, size) for term, size in zip(left.split(","), ranks, strict=True)]
    names = [letter for term in inputs for letter in term]
    dots = sorted({name for name in names if name.startswith(".")}, key=lambda name: -int(name[1:]))
    if not arrow:
        return inputs, [*dots, *sorted(n for n in set(names) if names.count(n) == 1 and not n.startswith("."))]
    before, found, after = right.partition("...")
    return inputs, [*before, *(dots if found else []), *after]


def _tensordot(call: ops.Call, ranks: list[int]) -> Notation | None:
    dims = 2 if call["dims"] is None else call["dims"]
    if isinstance(dims, int):
        dims = (range(ranks[0] - dims, ranks[0]), range(dims))
    if not isinstance(dims, (tuple, list)) or len(dims) != 2:
        return None
    first, second = [f"a{d}" for d in range(ranks[0])], [f"b{d}" for d in range(ranks[1])]
    for one, other in zip(*dims, strict=True):
        second[other] = first[one]
    shared = {*first} & {*second}
    return [first, second], [name for name in [*first, *second] if name not in shared]


def _outer(call: ops.Call, ranks: list[int]) -> Notation:
    return [["i"], ["j"]], ["i", "j"]


_FORMS: dict[str, Callable[[ops.Call, list[int]], Notation | None]] = {
    "einsum": _einsum,
    "tensordot": _tensordot,
    "outer": _outer,
}
"""Kind → how its call reads in index notation."""
