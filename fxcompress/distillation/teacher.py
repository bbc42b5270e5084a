"""The teacher: a frozen copy, and its answers, kept in memory or on disk."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxcompress.errors import ConfigError, DataError
from fxcompress.files import make_folder, read_json, write_text
from fxcompress.graph.digest import digest, state_of
from fxcompress.graph.treespec import read_spec

__all__ = ["TeacherCache", "frozen"]


def frozen(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose tensors are the model's own, detached: no memory is taken, and nothing learns."""
    parameters = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    buffers = {id(b): b.detach() for b in model.buffers()}
    return copy.deepcopy(model, {**parameters, **buffers}).eval()


class TeacherCache:
    """What a teacher answers to every sample: computed once, then looked up by the sample's index.

    ``place``    ``"memory"``, or a folder, which a later run with the same teacher takes up again
    ``teacher``  whose answers they are

    A sample whose input is not what it was (random augmentation) is refused: its answer would be another one's.
    """

    def __init__(self, place: str | os.PathLike[str], teacher: nn.Module) -> None:
        self.folder = None if place == "memory" else Path(place)
        self.spec: pytree.TreeSpec | None = None
        self.rows: list[Tensor] = []
        self.known = torch.zeros(0, dtype=torch.bool, device="cpu")
        self._seen = torch.zeros(0, dtype=torch.float32, device="cpu")
        self._teacher = digest(state_of(teacher)) if self.folder else ""
        self._weights: dict[int, Tensor] = {}
        if self.folder and (self.folder / "cache.json").is_file():
            self._open()

    def answer(self, index: Tensor, inputs: Any) -> Any:
        """The kept answers to these samples, on the inputs' device; None where one is not known yet."""
        index = index.cpu()
        if self.spec is None or not len(index) or int(index.max()) >= len(self.known) or not bool(self.known[index].all()):
            return None
        first = _first(inputs)
        self._check(index, first)
        return pytree.tree_unflatten([rows[index].to(first.device) for rows in self.rows], self.spec)

    def keep(self, index: Tensor, inputs: Any, answer: Any) -> None:
        """Keep a batch's answers."""
        index = index.cpu()
        if int(index.min()) < 0:
            raise DataError(f"sample index {int(index.min())} is negative.")
        leaves, spec = pytree.tree_flatten(answer)
        if any(not isinstance(leaf, Tensor) or leaf.shape[:1] != index.shape for leaf in leaves):
            raise DataError("the teacher's answer holds more than a row for every sample; it cannot be cached.")
        if self.spec is None:
            self._describe(leaves, spec)
        self._grow(int(index.max()) + 1)
        for rows, leaf in zip(self.rows, leaves, strict=True):
            rows[index] = leaf.detach().to("cpu", rows.dtype)
        self._seen[index] = self._signature(_first(inputs))[0]
        self.known[index] = True

    def _check(self, index: Tensor, inputs: Tensor) -> None:
        now, size = self._signature(inputs)
        moved = (now - self._seen[index]).abs() > 1e-3 * size + 1e-12
        if bool(moved.any()):
            raise DataError(
                f"sample {int(index[moved][0])} is not what the teacher saw: its answers are cached, and random "
                "augmentation (or another dataset) would go with the wrong ones. Switch cache_teacher off, or feed the same."
            )

    def _signature(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """A number that a sample's input fixes, and its scale."""
        flat = inputs.detach().flatten(1).float().cpu()
        length = flat.shape[1]
        if length not in self._weights:
            self._weights[length] = (
                torch.randn(length, generator=torch.Generator().manual_seed(length), dtype=torch.float32, device="cpu")
                / length**0.5
            )
        with torch.autocast("cpu", enabled=False):
            return flat @ self._weights[length], flat.square().mean(1).sqrt()

    def _describe(self, leaves: list[Tensor], spec: pytree.TreeSpec) -> None:
        self.spec = spec
        self.rows = [torch.empty(0, *leaf.shape[1:], dtype=leaf.dtype, device="cpu") for leaf in leaves]
        if self.folder:
            make_folder(self.folder)
            header = {
                "teacher": self._teacher,
                "spec": pytree.treespec_dumps(spec),
                "rows": [[list(leaf.shape[1:]), str(leaf.dtype).removeprefix("torch.")] for leaf in leaves],
            }
            write_text(self.folder / "cache.json", json.dumps(header))

    def _open(self) -> None:
        assert self.folder is not None
        try:
            header = read_json(self.folder / "cache.json")
            self.spec = read_spec(header["spec"])
            self.rows = [
                torch.empty(0, *shape, dtype=getattr(torch, dtype), device="cpu") for shape, dtype in header["rows"]
            ]
            samples = (self.folder / "known").stat().st_size
            self._check_sizes(self.folder, samples)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"the teacher's cache {str(self.folder)!r} is damaged: {error}. Remove it.") from error
        if header["teacher"] != self._teacher:
            raise ConfigError(f"the cache {str(self.folder)!r} holds another teacher's answers; use another folder.")
        self._resize(samples)

    def _check_sizes(self, folder: Path, samples: int) -> None:
        """ValueError where a file is too short for what is known: what it lost would be read as zeros."""
        for name, rows in [*((f"{number}", rows) for number, rows in enumerate(self.rows)), ("seen", self._seen)]:
            if (folder / name).stat().st_size < samples * math.prod(rows.shape[1:]) * rows.element_size():
                raise ValueError(f"{name!r} is cut short")

    def _grow(self, samples: int) -> None:
        if samples > len(self.known):
            self._resize(max(samples, 2 * len(self.known)))

    def _resize(self, samples: int) -> None:
        self.rows = [self._table(f"{number}", rows, samples) for number, rows in enumerate(self.rows)]
        self._seen = self._table("seen", self._seen, samples)
        self.known = self._table("known", self.known, samples)

    def _table(self, name: str, rows: Tensor, samples: int) -> Tensor:
        """``rows`` with room for ``samples``: a new tensor, or the file mapped again at its new size."""
        shape = (samples, *rows.shape[1:])
        if self.folder is None:
            table = torch.zeros(shape, dtype=rows.dtype, device="cpu")
            table[: len(rows)] = rows
            return table
        file, count = self.folder / name, math.prod(shape)
        with open(file, "ab") as handle:  # from_file would zero the first byte of a file that it enlarges
            handle.truncate(max(handle.tell(), count * rows.element_size()))
        return torch.from_file(str(file), shared=True, size=count, dtype=rows.dtype).view(shape)


def _first(inputs: Any) -> Tensor:
    return next(leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
