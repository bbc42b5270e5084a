"""Weights that are computed from others: what cannot lose channels as it stands becomes a plain weight first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from fxcompress.graph.hooks import computes_a_weight
from fxcompress.pruning.sites import Mask

__all__ = ["settle"]


def settle(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Turn computed weights into plain ones, in place, masks of this package left on; yields (layer, what was done)."""
    for name, module in list(model.named_modules()):
        for leaf in _parametrized(module):
            parametrize.remove_parametrizations(_own_class(module), leaf, leave_parametrized=True)
            yield name, f"the parametrization of its {leaf} is now part of the {leaf}"
        for hook in [h for h in module._forward_pre_hooks.values() if computes_a_weight(h)]:
            _remove(module, hook)
            yield name, f"{type(hook).__name__} is now part of the weight"


def _parametrized(module: nn.Module) -> list[str]:
    if not parametrize.is_parametrized(module):
        return []
    parts: Any = module.parametrizations
    return [leaf for leaf, chain in list(parts.items()) if not all(isinstance(part, Mask) for part in chain)]


def _own_class(module: nn.Module) -> nn.Module:
    """Copies of a layer share the class that holds the parametrized property; give this one a class of its own."""
    cls = type(module)
    module.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
    return module


def _remove(module: nn.Module, hook: Any) -> None:
    if isinstance(hook, torch_prune.BasePruningMethod):
        torch_prune.remove(module, hook._tensor_name)
    elif type(hook).__name__ == "WeightNorm":
        nn.utils.remove_weight_norm(module, hook.name)
    else:
        nn.utils.remove_spectral_norm(module, hook.name)
