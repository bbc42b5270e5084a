"""Sums of products in index notation: which dimensions of the operands share an index, and which indices are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fxcompress.graph import ops

__all__ = ["Notation", "factors", "notation"]

Notation = tuple[list[list[str]], list[str]]
"""The names of every operand's indices, and of the result's."""


Ranks = Sequence[int | None]
"""How many dimensions each operand has; None where that is not known."""


def factors(call: ops.Call) -> list[Any]:
    """The operands that ``call`` multiplies."""
    return list(call["operands"]) if call.kind == "einsum" else [call["input"], call["other"]]


def notation(call: ops.Call, ranks: Ranks) -> Notation | None:
    """``call`` on operands of these ranks in index notation; None where it is written in another form (lists)."""
    return _FORMS[call.kind](call, ranks) if len(factors(call)) == len(ranks) else None


def _einsum(call: ops.Call, ranks: Ranks) -> Notation | None:
    """An ellipsis becomes names of its own, counted from the right."""
    equation = call["equation"]
    if not isinstance(equation, str) or ("..." in equation and None in ranks):
        return None
    left, arrow, right = equation.replace(" ", "").partition("->")

    def spell(term: str, size: int | None) -> list[str]:
        if "..." not in term or size is None:
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


def _tensordot(call: ops.Call, ranks: Ranks) -> Notation | None:
    one, other = ranks
    if one is None or other is None:
        return None
    dims = 2 if call["dims"] is None else call["dims"]
    if isinstance(dims, int):
        dims = (range(one - dims, one), range(dims))
    if not isinstance(dims, (tuple, list)) or len(dims) != 2:
        return None
    first, second = [f"a{d}" for d in range(one)], [f"b{d}" for d in range(other)]
    for d, same in zip(*dims, strict=True):
        second[same] = first[d]
    shared = {*first} & {*second}
    return [first, second], [name for name in [*first, *second] if name not in shared]


def _outer(call: ops.Call, ranks: Ranks) -> Notation:
    return [["i"], ["j"]], ["i", "j"]


_FORMS: dict[str, Callable[[ops.Call, Ranks], Notation | None]] = {
    "einsum": _einsum,
    "tensordot": _tensordot,
    "outer": _outer,
}
"""Kind → how its call reads in index notation."""
