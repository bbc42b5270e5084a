"""Forward hooks: user code about a layer's call, of which a graph keeps what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn
from torch.nn.utils.prune import BasePruningMethod

__all__ = ["ONCE", "around", "computes_a_weight", "drop_hooks", "forwarding", "has_hooks", "with_own_hooks"]

ONCE = "its forward hooks ran once, while it was traced: what they compute of the values is in the graph, nothing else is"

_WEIGHTS = ("WeightNorm", "SpectralNorm")


def computes_a_weight(hook: Any) -> bool:
    """Whether a hook is of those by which torch computes a weight from others before every call."""
    return isinstance(hook, BasePruningMethod) or type(hook).__name__ in _WEIGHTS


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks of a user's."""
    if not module._forward_hooks and not module._forward_pre_hooks:
        return False
    return bool(module._forward_hooks) or not all(map(computes_a_weight, module._forward_pre_hooks.values()))


def around(module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``call(*args, **kwargs)`` between the hooks of ``module``, as ``nn.Module.__call__`` runs them."""
    for key, before in module._forward_pre_hooks.items():
        if computes_a_weight(before):
            continue
        if key in module._forward_pre_hooks_with_kwargs:
            args, kwargs = before(module, args, kwargs) or (args, kwargs)
            continue
        found = before(module, args)
        if found is not None:
            args = found if isinstance(found, tuple) else (found,)
    result = call(*args, **kwargs)
    for key, after in module._forward_hooks.items():
        named = (kwargs,) if key in module._forward_hooks_with_kwargs else ()
        found = after(module, args, *named, result)
        result = result if found is None else found
    return result


def drop_hooks(module: nn.Module) -> None:
    """Take a user's hooks off ``module``."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if not computes_a_weight(hook):
            del module._forward_pre_hooks[key]
    module._forward_hooks.clear()


@contextmanager
def with_own_hooks(model: nn.Module) -> Iterator[None]:
    """Make ``forward`` of ``model`` run its hooks, for a tracer that starts there."""
    cls = type(model)
    if not has_hooks(model):
        yield
        return

    @wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return around(self, lambda *args, **kwargs: cls.forward(self, *args, **kwargs), args, kwargs)

    with forwarding(model, forward):
        yield


@contextmanager
def forwarding(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let ``forward`` stand in for that of ``model``'s class, in this model alone."""
    cls = type(model)
    model.__class__ = type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
    try:
        yield
    finally:
        model.__class__ = cls
