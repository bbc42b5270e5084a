"""Copying a model: what has nothing to share by mistake without a search, the rest as ``copy.deepcopy`` does it."""

from __future__ import annotations

import copy
import types
from typing import Any

import torch
from torch import nn

from fxcompress.errors import TraceError
from fxcompress.graph import spellings
from fxcompress.graph.sharing import alone, borrowed

__all__ = ["copied_model"]


def copied_model(model: nn.Module, shared: bool = False) -> nn.Module:
    """A copy, whose parameters use the model's memory where ``shared``.

    Tensors that hooks computed from parameters (masked or normalised weights) keep their values alone. Raises TraceError
    where the model cannot be copied.
    """
    single = alone(model)
    memo: dict[int, Any] = dict(borrowed(single)) if shared else {}
    try:
        return _copy(model, memo, {id(tensor) for tensor in single if _clones_plainly(tensor)})
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({error}), and fxcompress never changes the model it is given. "
            "Make it deep-copyable: detach stored tensors, drop open handles."
        ) from error


_STATE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_HOOKS = {key for key, value in nn.Module().__dict__.items() if isinstance(value, dict)} - set(_STATE)
_PLAIN = frozenset(
    {int, float, str, bool, type(None), type, torch.dtype, types.FunctionType, types.BuiltinFunctionType, torch.Size}
)


def _copy(part: nn.Module, memo: dict[int, Any], clones: set[int]) -> nn.Module:
    if id(part) in memo:
        return memo[id(part)]
    if not _copies_plainly(type(part)):
        return _deep_copy(part, memo)
    attributes = _plain_copy(part.__dict__)
    if attributes is None:
        for child in part._modules.values():
            if child is not None:
                _copy(child, memo, clones)
        return _deep_copy(part, memo)
    made = memo[id(part)] = type(part).__new__(type(part))
    made.__dict__.update(attributes)
    for held in (attributes["_parameters"], attributes["_buffers"]):
        for name, tensor in held.items():
            if id(tensor) in clones:
                memo.setdefault(id(tensor), tensor.clone())
            held[name] = copy.deepcopy(tensor, memo)
    children = attributes["_modules"]
    for name, child in children.items():
        if child is not None:
            children[name] = _copy(child, memo, clones)
    return made


def _plain_copy(attributes: dict[str, Any]) -> dict[str, Any] | None:
    """A copy of a module's attributes and of the dictionaries of its state and hooks; None where anything else has something
    inside that could be shared by mistake."""
    copied = {}
    for key, value in attributes.items():
        if key in _STATE or (key in _HOOKS and not value):
            copied[key] = value.copy()
        elif key not in _HOOKS and all(type(item) in _PLAIN for item in (value if type(value) is tuple else (value,))):
            copied[key] = value
        else:
            return None
    return copied


def _deep_copy(part: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``copy.deepcopy``, but of tensors that were computed, which it refuses, the values alone."""
    held = [value for inner in part.modules() for value in vars(inner).values() if isinstance(value, torch.Tensor)]
    memo.update({id(t): t.detach().clone() for t in held if not t.is_leaf and id(t) not in memo})
    return copy.deepcopy(part, memo)


def _clones_plainly(tensor: torch.Tensor) -> bool:
    """Whether a clone is what ``copy.deepcopy`` makes of a tensor with memory of its own."""
    return type(tensor) is torch.Tensor and tensor.is_contiguous() and not tensor.requires_grad and not vars(tensor)


_PROTOCOL = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")


def _copies_plainly(cls: type[nn.Module]) -> bool:
    """Whether ``copy.deepcopy`` does to this class what it does to any module."""
    return spellings.is_known_class(cls) or (
        all(getattr(cls, name, None) is getattr(nn.Module, name, None) for name in _PROTOCOL)
        and not any(vars(base).get("__slots__") for base in cls.__mro__)
    )
