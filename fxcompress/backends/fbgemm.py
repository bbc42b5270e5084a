"""FBGEMM: integer kernels on x86 CPUs through ``torch.ops.quantized``; uint8 activations, int8 weights."""

from __future__ import annotations

from typing import Any

import torch

from fxcompress.backends.base import Backend, Rule
from fxcompress.backends.cpu import has_vnni
from fxcompress.backends.kernels import x86_engine
from fxcompress.backends.quantized_ops import lower_to
from fxcompress.graph.ops import Attr, Call, kind
from fxcompress.graph.shapes import dtype_of, module_of, shape_of

__all__ = ["BACKEND", "RULES"]


def _two_tensors(call: Call) -> str | None:
    for name in ("input", "other"):
        if not isinstance(call[name], torch.fx.Node):
            return "one operand is a constant"
    if call["alpha"] not in (None, 1):
        return "it scales an operand"
    return None


def _weighted(call: Call) -> str | None:
    weight, bias = call["weight"], call["bias"]
    if not isinstance(weight, Attr):
        return "its weight is computed, not stored"
    if bias is not None and not isinstance(bias, Attr):
        return "its bias is computed, not stored"
    mode = getattr(module_of(call.node), "padding_mode", "zeros") if call.node.op == "call_module" else "zeros"
    if mode != "zeros":
        return f"it pads with {mode!r}"
    return None


def _linear(call: Call) -> str | None:
    shape = shape_of(call.inputs[0]) if call.inputs else None
    return "its input is one vector" if shape is not None and len(shape) < 2 else _weighted(call)


def _conv(call: Call) -> str | None:
    if isinstance(call["padding"], str) and call["padding"] != "valid":
        return f"it pads with {call['padding']!r}"
    shape = shape_of(call.inputs[0]) if call.inputs else None
    dims = int(call.kind[-2])
    if shape is not None and len(shape) != dims + 2:
        return "its input has no batch dimension"
    return _weighted(call)


def _conv_transpose(call: Call) -> str | None:
    return _conv(call) or ("grouped transposed convolutions are not covered" if call["groups"] != 1 else None)


def _batch_norm(call: Call) -> str | None:
    if call["training"] and "running_mean" in call.arguments and not _frozen(call):
        return "it is in training mode"
    if not isinstance(call["running_mean"], Attr):
        return "it keeps no running statistics"
    shape = shape_of(call.inputs[0])
    return None if shape is not None and len(shape) in (4, 5) else "its input is not an image or a volume"


def _frozen(call: Call) -> bool:
    return "momentum" not in call.arguments


def _image(call: Call) -> str | None:
    shape = shape_of(call.inputs[0])
    return None if shape is None or len(shape) == 4 else "its input is not a batch of images"


_RESAMPLED = ("nearest", "nearest-exact", "bilinear", "area")


def _resampled(call: Call) -> str | None:
    name = str(call.node.target)
    mode = "bicubic" if "bicubic" in name else call["mode"] or "nearest"
    if mode not in _RESAMPLED:
        return f"it interpolates by {mode!r}"
    return "it is antialiased" if call.node.kwargs.get("antialias") or "_aa" in name else _image(call)


def _max_pool(call: Call) -> str | None:
    return "it returns indices" if call["return_indices"] else _image(call)


def _joined(call: Call) -> str | None:
    tensors = call["tensors"]
    if not isinstance(tensors, (tuple, list)) or not all(isinstance(t, torch.fx.Node) for t in tensors):
        return "what it joins is not listed in the graph"
    return "it joins constants" if any(t.op == "get_attr" for t in tensors) else None


def _float_input(call: Call) -> str | None:
    dtype = dtype_of(call.inputs[0]) if call.inputs else None
    return None if dtype in (None, torch.float32) else f"its input is {dtype}"


_PARTS = ("chunk", "split", "unbind")


def _taken_apart(call: Call) -> str | None:
    """An operator that makes several tensors: each must be taken by its number."""
    plain = all(kind(user) == "getitem" and isinstance(user.args[1], int) for user in call.node.users)
    return _float_input(call) if plain else "its parts are not taken one by one"


def _plain_index(call: Call) -> str | None:
    index = call["index"]
    if kind(call.inputs[0]) in _PARTS and not isinstance(index, int):
        return "it takes several parts at once"
    items = index if isinstance(index, tuple) else (index,)
    plain = all(isinstance(item, (int, slice, type(None), type(...))) for item in items)
    return None if plain else "it indexes with tensors"


def _clamps(call: Call) -> str | None:
    bounds: tuple[Any, ...] = (call["min"], call["max"])
    return None if all(b is None or isinstance(b, (int, float)) for b in bounds) else "its bounds are tensors"


def _mean(call: Call) -> str | None:
    if len(shape_of(call.inputs[0]) or ()) > 4:
        return "its input is a volume"
    return None if call["dim"] is not None else "it reduces everything to a number"


def _divided(call: Call) -> str | None:
    return "it divides by a number of its own" if call["divisor_override"] else None


_KEEPS = Rule(output="input", refuse=_float_input)
_CONV = Rule(weighted=True, refuse=_conv)
_POOL = Rule(output="input", refuse=lambda call: _image(call) or _divided(call))
_PAIR = Rule(operands=("input", "other"), refuse=_two_tensors)

RULES: dict[str, Rule] = {
    "conv1d": _CONV,
    "conv2d": _CONV,
    "conv3d": _CONV,
    "conv_transpose1d": Rule(weighted=True, refuse=_conv_transpose),
    "conv_transpose2d": Rule(weighted=True, refuse=_conv_transpose),
    "linear": Rule(weighted=True, float_result=True, refuse=_linear),
    "batch_norm": Rule(refuse=_batch_norm),
    "add": _PAIR,
    "mul": _PAIR,
    "cat": Rule(operands=("tensors",), refuse=_joined),
    "relu": _KEEPS,
    "relu6": _KEEPS,
    "hardtanh": _KEEPS,
    "clamp": Rule(output="input", refuse=_clamps),
    "hardswish": Rule(),
    "leaky_relu": Rule(),
    "elu": Rule(),
    "hardsigmoid": Rule(fixed=(1 / 256, 0)),
    "sigmoid": Rule(fixed=(1 / 256, 0)),
    "tanh": Rule(fixed=(1 / 128, 128)),
    "max_pool2d": Rule(output="input", refuse=_max_pool),
    "avg_pool2d": _POOL,
    "adaptive_avg_pool2d": Rule(refuse=_image),
    "avg_pool3d": Rule(output="input", refuse=lambda call: _float_input(call) or _divided(call)),
    "adaptive_avg_pool3d": _KEEPS,
    "interpolate": Rule(output="input", refuse=_resampled),
    "mean": Rule(refuse=_mean),
    "getitem": Rule(output="input", refuse=_plain_index),
    **dict.fromkeys(_PARTS, Rule(output="input", refuse=_taken_apart)),
    **dict.fromkeys(
        (
            "flatten",
            "unflatten",
            "reshape",
            "permute",
            "transpose",
            "squeeze",
            "unsqueeze",
            "slice",
            "select",
            "narrow",
            "identity",
            "dropout",
        ),
        _KEEPS,
    ),
}


def _unavailable() -> str | None:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return "this build of torch has no FBGEMM"
    return None


BACKEND = Backend(
    name="fbgemm",
    runs_on="x86 CPUs",
    activation="uint8",
    per_channel=True,
    affine_weights=True,
    rules=RULES,
    lower=lower_to(x86_engine),
    unavailable=_unavailable,
    saturates=lambda: not has_vnni(),
    narrow=lambda call, symmetric: not symmetric and (call["groups"] or 1) > 1,
    adjacent=True,
    dynamic=("linear", "lstm", "gru"),
)
