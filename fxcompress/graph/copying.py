"""Copying a model: what has nothing to share by mistake without a search, the rest as ``copy.deepcopy`` does it."""

from __future__ import annotations

import copy
import types
from typing import Any

import torch
from torch import nn

from fxcompress.errors import TraceError
from fxcompress.graph import ops
from fxcompress.graph.sharing import borrowed

__all__ = ["copied_model"]


def copied_model(model: nn.Module, shared: bool = False) -> nn.Module:
    """A copy, whose parameters use the model's memory where ``shared``.

    Tensors that hooks computed from parameters (masked or normalised weights) keep their values alone. Raises TraceError
    where the model cannot be copied.
    """
    held = (value for part in model.modules() for value in vars(part).values())
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in held if isinstance(t, torch.Tensor) and not t.is_leaf}
    if shared:
        memo |= borrowed(model)
    try:
        return _copy(model, memo)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({error}), and fxcompress never changes the model it is given. "
            "Make it deep-copyable: detach stored tensors, drop open handles."
        ) from error


_STATE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_HOOKS = {key for key, value in nn.Module().__dict__.items() if isinstance(value, dict)} - set(_STATE)
_PLAIN = (int, float, str, bool, type(None), type, torch.dtype, types.FunctionType, types.BuiltinFunctionType)


def _copy(part: nn.Module, memo: dict[int, Any]) -> nn.Module:
    if id(part) in memo:
        return memo[id(part)]  # type: ignore[no-any-return]
    if not _copies_plainly(type(part)):
        return copy.deepcopy(part, memo)
    if not all(_is_plain(key, value) for key, value in part.__dict__.items()):
        for child in part._modules.values():
            if child is not None:
                _copy(child, memo)
        return copy.deepcopy(part, memo)
    made = memo[id(part)] = type(part).__new__(type(part))
    made.__dict__.update({k: v.copy() if isinstance(v, (dict, set)) else v for k, v in part.__dict__.items()})
    children: Any = made._modules
    children.update({name: child if child is None else _copy(child, memo) for name, child in children.items()})
    tensors: Any = (made._parameters, made._buffers)
    for owned in tensors:
        owned.update({name: copy.deepcopy(tensor, memo) for name, tensor in owned.items()})
    return made


_PROTOCOL = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")


def _copies_plainly(cls: type[nn.Module]) -> bool:
    """Whether ``copy.deepcopy`` does to this class what it does to any module."""
    return ops.is_known_class(cls) or (
        all(getattr(cls, name, None) is getattr(nn.Module, name, None) for name in _PROTOCOL)
        and not any(vars(base).get("__slots__") for base in cls.__mro__)
    )


def _is_plain(key: str, value: Any) -> bool:
    """Whether an attribute is a tensor dictionary of the module, or has nothing inside that could be shared by mistake."""
    if key in _STATE:
        return True
    if key in _HOOKS:
        return not value
    if type(value) in (tuple, torch.Size):
        return all(isinstance(item, _PLAIN) for item in value)
    return isinstance(value, _PLAIN)
