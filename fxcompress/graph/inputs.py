"""Example inputs: what a user may write, and what a call needs."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxcompress.errors import DataError, TraceError
from fxcompress.graph.module import signature
from fxcompress.graph.transformers import plain_transformers

__all__ = [
    "Arguments",
    "arguments",
    "autocast_refused",
    "bind",
    "frozen_state",
    "preserved_attributes",
    "record_calls",
    "tensors_in",
    "undisturbed",
]


class Arguments(NamedTuple):
    """Positional and keyword arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, function: Any) -> Any:
        return function(*self.args, **self.kwargs)

    def fresh(self) -> Arguments:
        """The same values in tensors of their own, for code that may write into what it is given."""
        return Arguments(*pytree.tree_map_only(torch.Tensor, torch.clone, tuple(self)))

    def to(self, device: torch.device | str) -> Arguments:
        """The same values with tensors on ``device``."""
        return Arguments(*pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), tuple(self)))

    def nudged(self) -> Arguments:
        """The same values, those of floating tensors moved by one rounding each, up or down at random."""
        generator = torch.Generator().manual_seed(0)

        def nudge(values: torch.Tensor) -> torch.Tensor:
            if not values.is_floating_point():
                return values.clone()
            signs = 2 * torch.randint(0, 2, values.shape, generator=generator, device="cpu").to(values) - 1
            return values * (1 + torch.finfo(values.dtype).eps * signs)

        return Arguments(*pytree.tree_map_only(torch.Tensor, nudge, tuple(self)))


def arguments(example_inputs: Any) -> Arguments:
    """One call's arguments from a tensor, a tuple or list of positionals, or a dict by keyword."""
    if isinstance(example_inputs, Arguments):
        return example_inputs
    if isinstance(example_inputs, torch.Tensor):
        return Arguments((example_inputs,), {})
    if isinstance(example_inputs, (tuple, list)):
        return Arguments(tuple(example_inputs), {})
    if isinstance(example_inputs, Mapping):
        return Arguments((), dict(example_inputs))
    raise DataError(
        f"example_inputs is a {type(example_inputs).__name__}; give a tensor, a tuple of positional arguments, "
        "or a dict of keyword arguments."
    )


def bind(module: nn.Module, call: Arguments) -> inspect.BoundArguments:
    """``call`` bound to the module's forward; raises DataError where it does not fit."""
    taken = signature(module)
    try:
        return taken.bind(*call.args, **call.kwargs)
    except TypeError as error:
        raise DataError(
            f"example_inputs do not fit {type(module).__name__}.forward{taken}: {error}. "
            "Give a tuple of positional arguments, or a dict by keyword."
        ) from error


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor in a nested structure, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@contextmanager
def frozen_state(module: nn.Module) -> Iterator[None]:
    """Run the module for a look: no gradients, no fused layers; buffers and random state as before afterwards.

    Layers with a method ``look``, which set ranges by what comes in while training, do not.
    """
    looking = [m for m in module.modules() if m.training and hasattr(m, "look")]
    saved = {name: tensor.clone() for name, tensor in _written(module).items()}
    state = torch.get_rng_state()
    for layer in looking:
        layer.training = False
    try:
        with torch.no_grad(), plain_transformers():
            yield
    finally:
        for layer in looking:
            layer.training = True
        torch.set_rng_state(state)
        if saved:
            held = _written(module)
            with torch.no_grad():
                for name, value in saved.items():
                    if not torch.equal(held[name], value):  # a write counts as a change, of whatever autograd has kept too
                        held[name].copy_(value)


def _written(module: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors that a forward pass may write: buffers (in eval mode those of numbers with a point, which code of its own may
    average into), and tables whose entries are bounded in length."""
    training = any(m.training for m in module.modules())
    held = {name: buffer for name, buffer in module.named_buffers() if training or buffer.is_floating_point()}
    bounded = [(n, m) for n, m in module.named_modules() if getattr(m, "max_norm", None) is not None]
    return held | {f"{n}.weight": m.weight for n, m in bounded if isinstance(m.weight, torch.Tensor)}


_ALONE = threading.RLock()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Compute as outside of an autocast that the caller is in, and one thread at a time.

    Tracing puts functions of its own in the place of torch's, for all threads.
    """
    with _ALONE, ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def autocast_refused() -> Iterator[None]:
    """Raise TraceError where the model's code switches autocast on; where it switches it off there is nothing to do."""

    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__

    def refuse(self: torch.autocast) -> Any:
        if self._enabled:
            raise TraceError("its code switches autocast on, which a graph would forget")
        return self

    torch.autocast.__enter__ = refuse  # type: ignore[method-assign]
    torch.autocast.__exit__ = lambda self, *raised: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__, torch.autocast.__exit__ = enter, leave  # type: ignore[method-assign]


@contextmanager
def preserved_attributes(model: nn.Module) -> Iterator[None]:
    """Undo what code leaves on modules while it is traced (a cache filled with proxies, hooks); fx's own constants stay."""
    before = [(module, dict(module.__dict__), [dict(held) for held in _hooks(module)]) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, hooks in before:
            for held, kept in zip(_hooks(module), hooks, strict=True):
                if len(held) != len(kept):
                    held.clear()
                    held.update(kept)
            now = module.__dict__
            changed = [key for key, value in now.items() if attributes.get(key, before) is not value]
            for key in changed:
                if key in attributes:
                    now[key] = attributes[key]
                elif not key.startswith("_tensor_constant"):
                    del now[key]


def _hooks(module: nn.Module) -> tuple[dict[Any, Any], ...]:
    return module._forward_hooks, module._forward_pre_hooks


def record_calls(model: nn.Module, call: Arguments, names: set[str]) -> dict[str, tuple[Arguments, Any]]:
    """Run ``model`` once and keep the first call of each named submodule: its arguments and its result."""
    seen: dict[str, tuple[Arguments, Any]] = {}
    handles = []

    def hook(name: str) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            seen.setdefault(name, (Arguments(args, kwargs), result))

        return record

    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name in modules:
            handles.append(modules[name].register_forward_hook(hook(name), with_kwargs=True))
    try:
        with frozen_state(model):
            call.fresh()(model)
    finally:
        for handle in handles:
            handle.remove()
    return seen
