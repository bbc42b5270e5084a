"""Unstructured and N:M pruning: masks over the weights of convolutions and linear layers.

A layer computes with its masked weight while the dense weight stays learnable underneath (:mod:`fxcompress.pruning.sites`).
Masks survive optimizer steps, deepcopy, ``state_dict``, autocast, DistributedDataParallel and ``torch.compile``, until they
are baked in.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.errors import ConfigError, did_you_mean
from fxcompress.graph.select import Layer, Selection, listed, matches, resolved
from fxcompress.graph.tree import check_module, unwrapped
from fxcompress.ledger import Ledger
from fxcompress.manager import PassManager
from fxcompress.options import Seed
from fxcompress.plan import Plan
from fxcompress.pruning.masks import check_criterion, check_sparsity, n_of_m, score, smallest
from fxcompress.pruning.prunable import PRUNABLE, Skip, bake_masks, sites
from fxcompress.pruning.sites import Site

__all__ = ["L1UnstructuredPruner", "MagnitudePruner", "RandomPruner", "indivisible", "mask_weights"]

TYPES = ("unstructured", "semi_structured")


def mask_weights(
    chosen: Mapping[str, Site],
    sparsity: float | Mapping[str, float],
    *,
    criterion: str = "l1",
    n_m: tuple[int, int] | None = None,
    seed: int = 0,
    skip: Skip = lambda name, reason: None,
) -> None:
    """Mask weights in place: the smallest of all of them together, or per group of M where ``n_m`` is given.

    ``sparsity`` by layer (or pattern) masks those layers, each on its own; with ``n_m``, M·(1 − sparsity) of every M stay.
    Weights that a mask drops already stay dropped, so repeated pruning with growing sparsity is monotone; where fewer are to
    go than are masked now, the dense weights are ranked anew. Raises ConfigError where nothing can be masked.
    """
    if isinstance(sparsity, Mapping):
        options: dict[str, Any] = {"criterion": criterion, "seed": seed, "skip": skip}
        for name, share in by_layer(sparsity, chosen).items():
            pattern = None if n_m is None else (round(n_m[1] * (1 - share)), n_m[1])
            mask_weights({name: chosen[name]}, share, n_m=pattern, **options)
        return
    generator = torch.Generator().manual_seed(seed)
    scores = {name: score(site.dense(), criterion, generator, name) for name, site in chosen.items()}
    if n_m is None:
        present = [next((held.mask for held in site.masks()), None) for site in chosen.values()]
        dense: dict[str, str] = {}
        masks = dict(zip(scores, smallest(list(scores.values()), sparsity, present), strict=True))
    else:
        dense = {name: reason for name, site in chosen.items() if (reason := indivisible(site, n_m[1]))}
        for name, reason in dense.items():
            skip(name, reason)
        masks = {name: n_of_m(s, *n_m, chosen[name].input_dim) for name, s in scores.items() if name not in dense}
    if not masks:
        raise ConfigError(f"no chosen layer has a weight that can be masked{_named(dense)}.")
    for name, mask in masks.items():
        chosen[name].set_mask(mask)


def by_layer(shares: Mapping[str, float], layers: Iterable[str]) -> dict[str, float]:
    """Layer → its share, above zero; the last pattern that matches counts. ConfigError for one that matches none."""
    known, found = list(layers), dict[str, float]()
    for pattern, share in shares.items():
        taken = [name for name in known if matches(pattern, name)]
        if not taken:
            raise ConfigError(f"no prunable layer is called {pattern!r}.{did_you_mean(pattern, known)}")
        found |= dict.fromkeys(taken, check_sparsity(share))
    return {name: share for name, share in found.items() if share}


def _named(reasons: Mapping[str, str], shown: int = 4) -> str:
    listed = [f"{name!r}: {reason}" for name, reason in list(reasons.items())[:shown]]
    return f" ({'; '.join(listed)}{', …' if len(reasons) > shown else ''})" if listed else ""


def indivisible(site: Site, m: int) -> str | None:
    """Why N of every ``m`` weights cannot be kept in this one, or None."""
    inputs = site.dense().shape[site.input_dim] // site.groups
    return f"its {inputs} inputs are not a multiple of {m}; it stays dense" if inputs % m else None


def _log(name: str, reason: str) -> None:
    logging.getLogger("fxcompress").info("%s: %s", name or "the layer", reason)


class MagnitudePruner:
    """Removes single weights, or N of every M, by magnitude.

    ``sparsity``        share of weights that become zero, over the whole selection together, in [0, 1)
    ``pruning_type``    ``unstructured``, or ``semi_structured``: exactly ``n`` of every ``m`` weights stay along the input
                        dimension (per output channel and kernel position)
    ``criterion``       ``l1`` (|w|), ``l2`` (w²), ``random``, or one that was registered in ``CRITERIA``
    ``exclude_layers``, ``include_layers``  by name, glob, ``re:`` or ``type:``, with everything below
    """

    def __init__(
        self,
        sparsity: float = 0.5,
        pruning_type: str = "unstructured",
        criterion: str = "l1",
        exclude_layers: Sequence[Layer] = (),
        include_layers: Sequence[Layer] | None = None,
        *,
        n: int = 2,
        m: int = 4,
        seed: Seed = 0,
    ) -> None:
        self.sparsity = check_sparsity(sparsity)
        if pruning_type not in TYPES:
            raise ConfigError(f"pruning_type is {pruning_type!r}; it is {' or '.join(TYPES)}.")
        check_criterion(criterion)
        if not all(isinstance(count, int) for count in (n, m)) or not 0 < n < m <= 64:
            raise ConfigError(f"n and m are {n!r} and {m!r}; whole numbers with 0 < n < m <= 64.")
        self.pruning_type, self.criterion, self.n_m, self.seed = pruning_type, criterion, (n, m), seed
        self.exclude_layers = listed("exclude_layers", exclude_layers)
        self.include_layers = None if include_layers is None else listed("include_layers", include_layers)
        included = None if self.include_layers is None else tuple(self.include_layers)
        self.selection = Selection(included, tuple(self.exclude_layers))
        self.ledger = Ledger()

    def plan(self, sparsity: float | Mapping[str, float] | None = None) -> Plan:
        """What :meth:`prune` runs; ``sparsity`` may be given by layer."""
        options: dict[str, Any] = {
            **({"layers": dict(sparsity)} if isinstance(sparsity, Mapping) else {}),
            "sparsity": self.sparsity if sparsity is None or isinstance(sparsity, Mapping) else check_sparsity(sparsity),
            "criterion": self.criterion,
            "exclude_layers": self.selection.exclude,
            "include_layers": self.selection.include,
            "seed": self.seed,
        }
        if self.pruning_type == "semi_structured":
            options["n_m"] = self.n_m
        return Plan.parse([{"mask-weights": options}])

    def compute_mask(self, module: nn.Module, sparsity: float | None = None) -> Tensor:
        """The mask of one layer on its own: boolean, True stays; exactly ``round(sparsity · n)`` weights go."""
        asked = self.sparsity if sparsity is None else check_sparsity(sparsity)
        reasons: list[str] = []
        found = [
            site for site in sites(module, skip=lambda name, reason: reasons.append(reason)).values() if site.name == ""
        ]
        if not isinstance(module, PRUNABLE) or not found:
            raise ConfigError(
                f"a {type(module).__name__} has no prunable weight{': ' if reasons else ''}{'; '.join(reasons)}."
            )
        site = found[0]
        scores = score(site.dense(), self.criterion, torch.Generator().manual_seed(self.seed))
        if self.pruning_type == "unstructured":
            return smallest([scores], asked)[0]
        obstacle = indivisible(site, self.n_m[1])
        if obstacle:
            raise ConfigError(f"{obstacle}.")
        return n_of_m(scores, *self.n_m, site.input_dim)

    def apply_mask(self, model: nn.Module, sparsity: float | Mapping[str, float] | None = None) -> None:
        """Mask ``model`` in place; masks that are there are updated. What stays dense is logged, with the reason."""
        asked = self.sparsity if sparsity is None else sparsity
        if not isinstance(asked, Mapping):
            check_sparsity(asked)
        check_module(model)
        inner = unwrapped(model)
        chosen = sites(inner, self.selection.on(inner), _log)
        asked = resolved(asked, inner) if isinstance(asked, Mapping) else asked
        n_m = self.n_m if self.pruning_type == "semi_structured" else None
        mask_weights(chosen, asked, criterion=self.criterion, n_m=n_m, seed=self.seed, skip=_log)

    def remove_mask(self, model: nn.Module) -> None:
        """Make the pruning permanent, in place: zeros in the weights, no masks left."""
        bake_masks(model)

    def get_sparsity(self, model: nn.Module) -> float:
        """Zeros over elements, in the prunable weights of the selection; a tied weight counts once."""
        check_module(model)
        weights = [site.value() for site in sites(model, self.selection.on(unwrapped(model))).values()]
        total = sum(weight.numel() for weight in weights)
        zeros = sum(weight.numel() - int(torch.count_nonzero(weight)) for weight in weights)
        return zeros / total if total else 0.0

    def prune(self, model: nn.Module, sparsity: float | Mapping[str, float] | None = None) -> fx.GraphModule:
        """A masked copy of ``model``; the ledger names what stayed dense, and why."""
        manager = PassManager(self.plan(sparsity))
        self.ledger = manager.ledger
        return manager.run(model)


class L1UnstructuredPruner(MagnitudePruner):
    """Unstructured pruning by |w|."""


class RandomPruner(MagnitudePruner):
    """Unstructured pruning at random, reproducible by ``seed``."""

    def __init__(
        self,
        sparsity: float = 0.5,
        pruning_type: str = "unstructured",
        criterion: str = "random",
        exclude_layers: Sequence[Layer] = (),
        include_layers: Sequence[Layer] | None = None,
        *,
        n: int = 2,
        m: int = 4,
        seed: Seed = 0,
    ) -> None:
        super().__init__(sparsity, pruning_type, criterion, exclude_layers, include_layers, n=n, m=m, seed=seed)
