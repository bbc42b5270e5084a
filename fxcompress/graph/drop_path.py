"""Stochastic depth (Huang 2016) that libraries write as code of their own: known by what it does, and a layer of the graph.

Traced in eval mode, such code leaves nothing behind, and the graph would train without it.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from fxcompress.graph import spellings
from fxcompress.graph.hooks import has_hooks
from fxcompress.graph.tree import kept_modes, parts

__all__ = ["DropPath", "make_drop_paths"]


class DropPath(nn.Module):
    """Zero samples with probability ``p`` and scale the others by 1 / (1 - p) while training; the identity otherwise."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input
        keep = input.new_empty((input.shape[0], *(1,) * (input.dim() - 1))).bernoulli_(1 - self.p)
        return input * keep.div_(1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def make_drop_paths(model: nn.Module) -> None:
    """Put a :class:`DropPath` in the place of every part of ``model`` that does what it does."""
    made: dict[int, DropPath] = {}
    for name, part in parts(model).items():
        if not name or not _NAMES.search(type(part).__name__) or not _is_plain(part):
            continue
        share = _share(part)
        if share is not None:
            owner, _, leaf = name.rpartition(".")
            made.setdefault(id(part), DropPath(share)).training = part.training
            model.get_submodule(owner)._modules[leaf] = made[id(part)]


_NAMES = re.compile(r"drop_?path|stochastic_?depth", re.IGNORECASE)
_SAMPLES = 512


def _is_plain(part: nn.Module) -> bool:
    holds = any(True for _ in (*part.parameters(), *part.buffers(), *part.children()))
    return not holds and not has_hooks(part) and not spellings.is_known_module(part)


def _share(part: nn.Module) -> float | None:
    """The share of samples that ``part`` drops, where that and their scaling is all it does; None where it is not."""
    for shape in ((_SAMPLES, 3, 2, 2), (_SAMPLES, 3, 2), (_SAMPLES, 3)):
        values = torch.linspace(1, 2, math.prod(shape), dtype=torch.float32, device="cpu").reshape(shape)
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad(), kept_modes(part):
                torch.manual_seed(0)
                dropped, whole = part.train()(values.clone()), part.eval()(values.clone())
        except Exception:  # code that wants other shapes, or more arguments
            continue
        return _share_of(values, dropped) if torch.equal(whole, values) and dropped.shape == values.shape else None
    return None


def _share_of(values: Tensor, dropped: Tensor) -> float | None:
    factors = (dropped / values).flatten(1)
    kept = factors[:, 0] != 0
    scale = float(factors[kept].mean()) if bool(kept.any()) else 0.0
    expected = kept[:, None] * scale
    share = 1 - 1 / scale if scale > 1 else 0.0
    off = abs(float((~kept).float().mean()) - share) / math.sqrt(max(share * (1 - share), 1e-12) / _SAMPLES)
    is_so = share > 0 and off < 6 and torch.allclose(factors, expected.expand_as(factors), rtol=1e-5, atol=0)
    return round(share, 6) if is_so else None
