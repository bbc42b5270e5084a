"""Unstructured and N:M pruning: masks over the weights of convolutions and linear layers.

A mask is a parametrization: the layer computes with ``weight · mask`` while the dense weight stays learnable underneath. It
survives optimizer steps, deepcopy, ``state_dict``, autocast and ``torch.compile``, until it is baked in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from fxcompress.errors import ConfigError
from fxcompress.graph.select import Selection
from fxcompress.ledger import Ledger
from fxcompress.manager import PassManager
from fxcompress.plan import Plan
from fxcompress.pruning.masks import CRITERIA, check_sparsity, n_of_m, score, smallest

__all__ = ["L1UnstructuredPruner", "MagnitudePruner", "Mask", "RandomPruner", "bake_masks", "mask_weights", "prunable"]

PRUNABLE = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
"""Layers whose weight is pruned; biases and normalisation are not."""

TYPES = ("unstructured", "semi_structured")


class Mask(nn.Module):
    """``weight · mask``; ``mask`` is a boolean buffer of the weight's shape, True stays."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def prunable(model: nn.Module, selection: Selection = Selection()) -> dict[str, nn.Module]:  # noqa: B008 - immutable
    """The chosen layers with a prunable weight, by name; a layer, or a weight, that appears twice is listed once."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, PRUNABLE) and (name in selection):
            found.setdefault(id(dense_weight(module)), (name, module))
    return dict(found.values())


def dense_weight(module: nn.Module) -> Tensor:
    """The learnable weight, below a mask where there is one."""
    if parametrize.is_parametrized(module, "weight"):
        holder: Any = module.parametrizations
        return holder.weight.original  # type: ignore[no-any-return]
    return module.weight  # type: ignore[return-value]


def _mask_of(module: nn.Module) -> Mask | None:
    if not parametrize.is_parametrized(module, "weight"):
        return None
    holder: Any = module.parametrizations
    return next((part for part in holder.weight if isinstance(part, Mask)), None)


def set_mask(module: nn.Module, mask: Tensor) -> None:
    """Put ``mask`` on the layer's weight, in the place of one it has."""
    present = _mask_of(module)
    if present is not None:
        present.mask.copy_(mask)
    else:
        parametrize.register_parametrization(module, "weight", Mask(mask))
        module.get_submodule("parametrizations").train(module.training)


def mask_weights(
    layers: dict[str, nn.Module],
    sparsity: float,
    *,
    criterion: str = "l1",
    n_m: tuple[int, int] | None = None,
    seed: int = 0,
    skip: Callable[[str, str], None] = lambda name, reason: None,
) -> None:
    """Mask ``layers`` in place: the smallest of all their weights together, or per group of M where ``n_m`` is given.

    Weights that a mask drops already stay dropped: they score zero, so repeated pruning with growing sparsity is monotone.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for name, module in layers.items():
        found = score(dense_weight(module), criterion, generator)
        present = _mask_of(module)
        scores[name] = found if present is None else torch.where(present.mask, found.clamp(min=_TINY), 0.0)
    if n_m is None:
        masks = dict(zip(scores, smallest(list(scores.values()), sparsity), strict=True))
    else:
        masks = {name: n_of_m(s, *n_m) for name, s in scores.items() if _divides(name, s, n_m[1], skip)}
    for name, mask in masks.items():
        set_mask(layers[name], mask)


_TINY = float(torch.finfo(torch.float32).tiny)


def _divides(name: str, scores: Tensor, m: int, skip: Callable[[str, str], None]) -> bool:
    if scores.shape[1] % m == 0:
        return True
    skip(name, f"its {scores.shape[1]} inputs are not a multiple of {m}; it stays dense")
    return False


def bake_masks(model: nn.Module) -> int:
    """Multiply every mask into its weight and take it off, in place; returns how many there were."""
    masked = [module for module in model.modules() if isinstance(module, PRUNABLE) and _mask_of(module) is not None]
    for module in masked:
        cls = type(module)  # torch takes the property off the class, which copies of the layer share
        module.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return len(masked)


class MagnitudePruner:
    """Removes single weights, or N of every M, by magnitude.

    ``sparsity``        share of weights that become zero, over the whole selection together, in [0, 1)
    ``pruning_type``    ``unstructured``, or ``semi_structured``: exactly ``n`` of every ``m`` weights stay along the input
                        dimension (per output channel and kernel position)
    ``criterion``       ``l1`` (|w|), ``l2`` (w²) or ``random``
    ``exclude_layers``, ``include_layers``  qualified names or globs; a name takes everything below it
    """

    default_criterion: ClassVar[str] = "l1"

    def __init__(
        self,
        sparsity: float = 0.5,
        pruning_type: str = "unstructured",
        criterion: str | None = None,
        exclude_layers: Sequence[str] = (),
        include_layers: Sequence[str] | None = None,
        *,
        n: int = 2,
        m: int = 4,
        seed: int = 0,
    ) -> None:
        self.sparsity = check_sparsity(sparsity)
        if pruning_type not in TYPES:
            raise ConfigError(f"pruning_type is {pruning_type!r}; it is {' or '.join(TYPES)}.")
        self.criterion = criterion or self.default_criterion
        if self.criterion not in CRITERIA:
            raise ConfigError(f"there is no criterion {criterion!r}; known: {', '.join(CRITERIA)}.")
        if not 0 < n < m <= 64:
            raise ConfigError(f"n and m are {n} and {m}; 0 < n < m <= 64.")
        self.pruning_type, self.n_m, self.seed = pruning_type, (n, m), seed
        self.selection = Selection(None if include_layers is None else tuple(include_layers), tuple(exclude_layers))
        self.ledger = Ledger()

    def plan(self, sparsity: float | None = None) -> Plan:
        """What :meth:`prune` runs."""
        options: dict[str, Any] = {
            "sparsity": self.sparsity if sparsity is None else check_sparsity(sparsity),
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
        if not isinstance(module, PRUNABLE):
            raise ConfigError(f"a {type(module).__name__} has no prunable weight.")
        scores = score(dense_weight(module), self.criterion, torch.Generator().manual_seed(self.seed))
        if self.pruning_type == "semi_structured":
            if scores.shape[1] % self.n_m[1]:
                raise ConfigError(f"its {scores.shape[1]} inputs are not a multiple of {self.n_m[1]}.")
            return n_of_m(scores, *self.n_m)
        return smallest([scores], self.sparsity if sparsity is None else sparsity)[0]

    def apply_mask(self, model: nn.Module, sparsity: float | None = None) -> None:
        """Mask ``model`` in place; masks that are there are updated."""
        self.selection.check(model)
        mask_weights(
            prunable(model, self.selection),
            self.sparsity if sparsity is None else check_sparsity(sparsity),
            criterion=self.criterion,
            n_m=self.n_m if self.pruning_type == "semi_structured" else None,
            seed=self.seed,
        )

    def remove_mask(self, model: nn.Module) -> None:
        """Make the pruning permanent, in place: zeros in the weights, no masks left."""
        bake_masks(model)

    def get_sparsity(self, model: nn.Module) -> float:
        """Zeros over elements, in the prunable weights of the selection."""
        weights = [module.weight for module in prunable(model, self.selection).values()]
        total = sum(w.numel() for w in weights)  # type: ignore[operator, misc]
        zeros = sum(w.numel() - int(torch.count_nonzero(w)) for w in weights)  # type: ignore[operator, arg-type, misc]
        return zeros / total if total else 0.0

    def prune(self, model: nn.Module, sparsity: float | None = None) -> fx.GraphModule:
        """A masked copy of ``model``; the ledger names what stayed dense, and why."""
        manager = PassManager(self.plan(sparsity))
        self.ledger = manager.ledger
        return manager.run(model)


class L1UnstructuredPruner(MagnitudePruner):
    """Unstructured pruning by |w|."""


class RandomPruner(MagnitudePruner):
    """Unstructured pruning at random, reproducible by ``seed``."""

    default_criterion: ClassVar[str] = "random"
