"""Products of values with stored weights, spelled as the layers they are.

``x @ w``, ``addmm``, ``bmm``, ``baddbmm``, ``einsum`` and ``tensordot`` with a parameter or buffer (or what is computed from
some) are linear layers; those with another weight for each of several groups are grouped convolutions of one position.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxcompress.graph import edit, ops
from fxcompress.graph.index_notation import factors, notation
from fxcompress.graph.settling import computed, constants
from fxcompress.graph.shapes import shape_of

__all__ = ["spell_projections"]


def spell_projections(module: fx.GraphModule) -> Iterator[tuple[fx.Node, str]]:
    """Respell in place what multiplies values with stored weights; yields (node, what it is now)."""
    known = constants(module)
    for node in list(module.graph.nodes):
        call = ops.read(node) if node.op in ("call_function", "call_method") else None
        read = _READERS.get(call.kind) if call is not None else None
        if call is None or read is None or len(known & set(node.all_input_nodes)) == 0:
            continue
        product = read(_Operands(module, call, known))
        made = _spelled(node, product) if product is not None and product.is_layer else None
        if made is not None:
            made.meta["tensor_meta"] = node.meta.get("tensor_meta")
            edit.replace(node, made)
            yield made, "it multiplies with a stored weight, as a layer does"


Letters = tuple[Sequence[str], Sequence[str], Sequence[str]]
"""The names of the indices of two operands and of the result."""


@dataclass(frozen=True)
class _Product:
    """``value`` times ``weight``, each dimension under a letter as in einsum, and what is added to it."""

    value: fx.Node
    weight: fx.Node
    letters: Letters
    sizes: dict[str, int]
    bias: fx.Node | None = None
    added: fx.Node | None = None

    @property
    def is_layer(self) -> bool:
        """Whether every letter is one of those that :func:`_spelled` tells apart."""
        value, weight, result = self.letters
        unique = all(len(set(letters)) == len(letters) for letters in self.letters)
        summed = set(value) & set(weight) - set(result)
        return unique and bool(summed) and set(result) == (set(value) | set(weight)) - summed


def _spelled(node: fx.Node, product: _Product) -> fx.Node | None:
    """The layer before ``node``; None where there is none."""
    value, weight, result = product.letters
    groups = [letter for letter in weight if letter in value and letter in result]
    summed = [letter for letter in weight if letter in value and letter not in result]
    made = [letter for letter in weight if letter not in value]
    rest = [letter for letter in value if letter not in weight]
    build = _Builder(node, product)
    found = build.grouped(groups, summed, made, rest) if groups else build.linear(summed, made, rest)
    if found is None:
        return None
    return build.call(torch.add, found, product.added) if product.added is not None else found


@dataclass(frozen=True)
class _Builder:
    """Writes nodes before a product."""

    node: fx.Node
    product: _Product

    def call(self, function: Any, *args: Any) -> fx.Node:
        return edit.insert_before(self.node, function, args)

    def ordered(self, value: fx.Node, have: list[str], want: list[str]) -> fx.Node:
        return value if have == want else self.call(torch.permute, value, tuple(have.index(letter) for letter in want))

    def linear(self, summed: list[str], made: list[str], rest: list[str]) -> fx.Node:
        value = self.ordered(self.product.value, list(self.product.letters[0]), rest + summed)
        value = self.call(torch.flatten, value, -len(summed)) if len(summed) > 1 else value
        weight = self.rows(made + summed, len(made), len(summed))
        found = self.call(F.linear, value, weight, self.product.bias)
        found = self.parted(found, -1, made)
        return self.ordered(found, rest + made, list(self.product.letters[2]))

    def grouped(self, groups: list[str], summed: list[str], made: list[str], rest: list[str]) -> fx.Node | None:
        """A convolution of one position whose groups are the weights; one of the value's dimensions is the batch."""
        if len(rest) not in (1, 2) or self.product.bias is not None:
            return None
        batch, positions = rest[:-1], rest[-1:]
        value = self.ordered(self.product.value, list(self.product.letters[0]), batch + groups + summed + positions)
        value = value if batch else self.call(torch.unsqueeze, value, 0)
        value = self.call(torch.flatten, value, 1, -2)
        weight = self.rows(groups + made + summed, len(groups) + len(made), len(summed))
        count = 1
        for letter in groups:
            count *= self.product.sizes[letter]
        found = self.call(F.conv1d, value, self.call(torch.unsqueeze, weight, -1), None, 1, 0, 1, count)
        found = self.parted(found, 1, groups + made)
        found = found if batch else self.call(torch.squeeze, found, 0)
        return self.ordered(found, batch + groups + made + positions, list(self.product.letters[2]))

    def rows(self, want: list[str], rows: int, columns: int) -> fx.Node:
        """The weight as a matrix of outputs by inputs."""
        weight, have = self.product.weight, list(self.product.letters[1])
        turned = ops.read(weight) if weight.op != "get_attr" else None
        if have != want and len(have) == 2 and turned is not None and _is_turned(turned):
            weight = weight.all_input_nodes[0]
        else:
            weight = self.ordered(weight, have, want)
        if columns > 1:
            weight = self.call(torch.flatten, weight, rows)
        if rows != 1:
            weight = self.call(torch.flatten, weight, 0, rows - 1) if rows else self.call(torch.unsqueeze, weight, 0)
        return weight

    def parted(self, value: fx.Node, dim: int, letters: list[str]) -> fx.Node:
        if not letters:
            return self.call(torch.squeeze, value, dim)
        sizes = tuple(self.product.sizes[letter] for letter in letters)
        return self.call(torch.unflatten, value, dim, sizes) if len(letters) > 1 else value


def _is_turned(call: ops.Call) -> bool:
    """Whether a call turns a matrix on its side."""
    if call.kind == "transpose":
        return {call["dim0"] % 2, call["dim1"] % 2} == {0, 1}
    return call.kind == "t" or (call.kind == "getattr" and call["input"] is not None and call["name"] in ("T", "mT"))


@dataclass(frozen=True)
class _Operands:
    """The operands of a call as nodes, and which of them are stored."""

    module: fx.GraphModule
    call: ops.Call
    known: set[fx.Node]

    def __getitem__(self, name: str) -> Any:
        return self.node(self.call[name])

    def node(self, found: Any) -> Any:
        """An operand as the node that gives it."""
        if not isinstance(found, ops.Attr):
            return found
        return next(n for n in self.call.node.all_input_nodes if n.op == "get_attr" and n.target == found.name)

    def weight_of(self, node: Any) -> Tensor | None:
        """The values of a stored operand, None for another."""
        found = computed(self.module, node) if isinstance(node, fx.Node) and node in self.known else None
        return found if isinstance(found, Tensor) and found.is_floating_point() else None

    def product(self, left: Any, right: Any, letters: Letters, **added: Any) -> _Product | None:
        """A product one of whose operands is stored; ``letters`` are those of left, right and result."""
        stored = [self.weight_of(left), self.weight_of(right)]
        if (stored[0] is None) == (stored[1] is None) or not all(isinstance(n, fx.Node) for n in (left, right)):
            return None
        if stored[0] is not None:
            left, right, letters = right, left, (letters[1], letters[0], letters[2])
        weight = stored[0] if stored[0] is not None else stored[1]
        assert weight is not None
        if weight.dim() != len(letters[1]) or left in self.known:
            return None
        sizes, shape = dict(zip(letters[1], weight.shape, strict=True)), self.shape(left)
        given = zip(letters[0], shape, strict=True) if shape is not None else ()
        if any(sizes.get(letter, size) != size for letter, size in given):
            return None  # a dimension of one is repeated
        return _Product(left, right, letters, sizes, **added)

    def shape(self, node: Any) -> torch.Size | None:
        weight = self.weight_of(node)
        return weight.shape if weight is not None else shape_of(node) if isinstance(node, fx.Node) else None


def _matmul(given: _Operands) -> _Product | None:
    left, right = given["input"], given["other"]
    shapes = given.shape(left), given.shape(right)
    ranks = [len(shape) if shape is not None else 2 for shape in shapes]
    if ranks[1] < 2 or (None in shapes and (ranks != [2, 2] or shapes[1] is None)):
        return None
    most, shared = max(ranks), max(min(ranks) - 2, 0)
    if shared and shapes[0][-shared - 2 : -2] != shapes[1][-shared - 2 : -2]:  # type: ignore[index]
        return None  # one is repeated for the other's batch
    batch, row = string.ascii_lowercase[: most - 2], "Y" if ranks[0] > 1 else ""
    letters = batch[most - ranks[0] :] + row + "C", batch[most - ranks[1] :] + "CZ", batch + row + "Z"
    return given.product(left, right, letters)


def _addmm(given: _Operands) -> _Product | None:
    product, bias = _matmul(given), given["bias"]
    if product is None or not isinstance(bias, fx.Node) or any(given[name] not in (None, 1) for name in ("alpha", "beta")):
        return None
    stored = given.weight_of(bias)
    if stored is not None and stored.dim() == 1 and given["other"] is product.weight and len(product.letters[1]) == 2:
        return given.product(given["input"], given["other"], product.letters, bias=bias)
    return given.product(given["input"], given["other"], _in_order(given, product), added=bias)


def _in_order(given: _Operands, product: _Product) -> Letters:
    """The letters of left, right and result."""
    value, weight, result = product.letters
    return (value, weight, result) if given["other"] is product.weight else (weight, value, result)


def _summed(given: _Operands) -> _Product | None:
    operands = [given.node(factor) for factor in factors(given.call)]
    shapes = [given.shape(operand) for operand in operands]
    found = notation(given.call, [len(shape) if shape is not None else None for shape in shapes])
    if found is None or len(operands) != 2:
        return None
    (left, right), result = found
    if any(name.startswith(".") for name in {*left} & {*right}):
        return None  # one may be repeated for the other's batch
    return given.product(operands[0], operands[1], (left, right, result))


_READERS: dict[str, Callable[[_Operands], _Product | None]] = {
    "matmul": _matmul,
    "addmm": _addmm,
    **dict.fromkeys(("einsum", "tensordot"), _summed),
}
"""Kind of operator → what it multiplies."""
