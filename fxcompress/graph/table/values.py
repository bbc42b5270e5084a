"""The rows of what is done with values: arithmetic, movement, reductions, and questions about them."""

from __future__ import annotations

import math
import operator
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from fxcompress.graph import fused, guards
from fxcompress.graph.drop_path import DropPath
from fxcompress.graph.spellings import Op
from fxcompress.graph.taps import tap

__all__ = ["VALUES"]

aten = torch.ops.aten


def _pointwise(kind: str, names: str, arguments: str = "input other") -> Op:
    return Op(kind, "pointwise", names, arguments)


def _unary(names: str) -> list[Op]:
    return [_pointwise(name, f"{name} {name}_", "input") for name in names.split()]


def _movement(kind: str, names: str, arguments: str, **more: Any) -> Op:
    return Op(kind, "movement", names, arguments, **more)


PADS: tuple[type[nn.Module], ...] = tuple(
    getattr(nn, f"{how}Pad{dims}d")
    for how in ("Zero", "Constant", "Reflection", "Replication", "Circular")
    for dims in (1, 2, 3)
)
"""Layers that pad."""

_FOURIER = [f"{way}fft{dims}" for way in ("", "i", "r", "ir", "h", "ih") for dims in ("", "2", "n")]
_SHIFTS = ["fftshift", "ifftshift"]


def _fourier(names: list[str], order: str) -> list[tuple[Any, str]]:
    """Fourier transforms as torch.fft and aten spell them."""
    return [(place, order) for name in names for place in (getattr(torch.fft, name), getattr(aten, f"fft_{name}"))]


VALUES: tuple[Op, ...] = (
    # pointwise arithmetic
    Op(
        "add",
        "pointwise",
        "add add_ iadd __add__ __radd__ __iadd__",
        "input other activation",
        functions=((fused.FUNCTIONS["add"], None),),
    ),
    _pointwise("sub", "sub sub_ isub subtract __sub__ __isub__"),
    _pointwise("rsub", "rsub __rsub__"),
    _pointwise("mul", "mul mul_ imul multiply __mul__ __rmul__ __imul__"),
    _pointwise("div", "div div_ truediv itruediv divide true_divide __truediv__ __itruediv__"),
    _pointwise("floordiv", "floordiv floor_divide __floordiv__"),
    _pointwise("mod", "mod remainder fmod __mod__"),
    _pointwise("pow", "pow pow_ __pow__", "input exponent"),
    _pointwise("maximum", "maximum fmax"),
    _pointwise("minimum", "minimum fmin"),
    _pointwise("where", "where", "condition input other"),
    _pointwise("masked_fill", "masked_fill masked_fill_", "input mask value"),
    _pointwise("clamp", "clamp clamp_ clip clip_ clamp_min clamp_min_", "input min max"),
    _pointwise("clamp_max", "clamp_max clamp_max_", "input max"),
    _pointwise("lerp", "lerp", "input end weight"),
    _pointwise("complex", "complex polar"),
    _pointwise("addcmul", "addcmul addcmul_", "input tensor1 tensor2"),
    *(
        _pointwise(name, f"{name} {name}_ __{name}__")
        for name in ("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or")
    ),
    _pointwise("and", "and_ bitwise_and __and__"),
    _pointwise("or", "or_ bitwise_or __or__"),
    _pointwise("invert", "invert bitwise_not logical_not __invert__", "input"),
    *_unary("neg exp log log2 sqrt rsqrt abs sin cos erf sign floor ceil round reciprocal square expm1 log1p"),
    *_unary("atan asin acos tan sinh cosh asinh acosh atanh erfc erfinv exp2 logit trunc frac nan_to_num lgamma digamma"),
    *_unary("isnan isinf isfinite positive negative absolute conj"),
    *(_pointwise(name, name) for name in ("atan2", "hypot", "xlogy", "logaddexp")),
    _pointwise("addcdiv", "addcdiv addcdiv_", "input tensor1 tensor2"),
    Op("to", "pointwise", "to type float half bfloat16 double type_as cpu cuda _to_copy", "input dtype"),
    # movement: values are copied, moved or dropped
    _movement("identity", "clone detach detach_ contiguous lift_fresh_copy alias", "input", modules=(nn.Identity,)),
    _movement("tap", "", "input name", functions=((tap, None),)),
    _movement(
        "dropout",
        "dropout dropout_ dropout1d dropout2d dropout3d alpha_dropout feature_dropout",
        "input p training",
        modules=(
            nn.Dropout,
            nn.Dropout1d,
            nn.Dropout2d,
            nn.Dropout3d,
            nn.AlphaDropout,
            DropPath,
            "torchvision.ops.stochastic_depth.StochasticDepth",
        ),
    ),
    _movement(
        "flatten",
        "flatten ravel",
        "input start_dim end_dim",
        modules=(nn.Flatten,),
        defaults={"start_dim": 0, "end_dim": -1},
    ),
    _movement("unflatten", "unflatten", "input dim sizes", modules=(nn.Unflatten,)),
    _movement("reshape", "reshape view _unsafe_view", "input *shape"),
    _movement("view_as", "view_as reshape_as", "input other"),
    _movement("permute", "permute", "input *dims"),
    _movement("transpose", "transpose swapaxes swapdims", "input dim0 dim1"),
    _movement("t", "t numpy_T mT", "input"),
    _movement("movedim", "movedim moveaxis", "input source destination"),
    _movement("squeeze", "squeeze squeeze_", "input dim"),
    _movement("unsqueeze", "unsqueeze unsqueeze_", "input dim"),
    _movement("expand", "expand", "input *sizes"),
    _movement("expand_as", "expand_as broadcast_to", "input other"),
    _movement("repeat", "repeat tile", "input *repeats"),
    _movement("repeat_interleave", "repeat_interleave", "input repeats dim"),
    _movement("getitem", "getitem __getitem__", "input index"),
    _movement("setitem", "setitem __setitem__", "input index value"),
    _movement("slice", "slice", "input dim start end step"),
    _movement("select", "select", "input dim index"),
    _movement("narrow", "narrow", "input dim start length"),
    _movement("index_select", "index_select", "input dim index"),
    _movement("index", "index", "input indices"),
    Op(
        "cosine_similarity",
        "other",
        "cosine_similarity",
        "input other dim eps",
        modules=(nn.CosineSimilarity,),
        defaults={"dim": 1},
    ),
    Op("cdist", "other", "cdist", "input other p"),
    Op("product", "other", "inner vdot kron cross vecdot multi_dot addbmm addmv addr", "input other"),
    Op("triangle", "other", "tril triu", "input diagonal"),
    Op("joined", "other", "meshgrid broadcast_tensors hstack vstack dstack column_stack block_diag", "*tensors"),
    Op("counted", "other", "one_hot bincount bucketize searchsorted nonzero masked_select masked_scatter", "input other"),
    Op("difference", "other", "diff cummax cummin aminmax", "input"),
    Op("gather", "other", "gather take_along_dim", "input dim index"),
    Op("scatter", "other", "scatter scatter_add scatter_reduce index_add index_copy", "input dim index other"),
    _movement("chunk", "chunk tensor_split", "input chunks dim", defaults={"dim": 0}),
    _movement("split", "split split_with_sizes unsafe_split", "input split_size dim", defaults={"dim": 0}),
    _movement("unbind", "unbind", "input dim", defaults={"dim": 0}),
    _movement("cat", "cat concat concatenate", "tensors dim", defaults={"dim": 0}),
    _movement("stack", "stack", "tensors dim", defaults={"dim": 0}),
    _movement("flip", "flip", "input *dims"),
    _movement("mirror", "fliplr flipud rot90", "input k dims"),
    _movement("diagonal", "diagonal", "input offset dim1 dim2"),
    _movement("roll", "roll", "input shifts dims"),
    _movement("unfold", "unfold im2col", "input kernel_size dilation padding stride", modules=(nn.Unfold,)),
    Op("fold", "other", "fold col2im", "input output_size kernel_size", modules=(nn.Fold,)),
    _movement("pixel_shuffle", "pixel_shuffle", "input upscale_factor", modules=(nn.PixelShuffle,)),
    _movement("pixel_unshuffle", "pixel_unshuffle", "input downscale_factor", modules=(nn.PixelUnshuffle,)),
    _movement("channel_shuffle", "channel_shuffle native_channel_shuffle", "input groups", modules=(nn.ChannelShuffle,)),
    _movement(
        "pad",
        "pad constant_pad_nd",
        "input pad mode value",
        modules=PADS,
    ),
    _movement("copy", "copy_ slice_scatter select_scatter index_put index_put_", "input other value"),
    _movement("fill", "fill fill_ zero zero_", "input value"),
    # Fourier transforms and complex numbers
    Op(
        "fft",
        "other",
        "",
        "input s dim norm",
        functions=(*_fourier(_FOURIER, "input s dim norm"), *_fourier(_SHIFTS, "input dim")),
    ),
    Op("view_as_complex", "other", "view_as_complex"),
    Op("view_as_real", "other", "view_as_real"),
    # reductions
    Op("mean", "reduction", "mean", "input dim keepdim"),
    Op("sum", "reduction", "sum", "input dim keepdim"),
    Op("amax", "reduction", "amax max", "input dim keepdim"),
    Op("amin", "reduction", "amin min", "input dim keepdim"),
    Op("var", "reduction", "var std var_mean std_mean", "input dim"),
    Op("norm", "reduction", "norm linalg_norm linalg_vector_norm vector_norm", "input p dim"),
    Op("argmax", "reduction", "argmax argmin", "input dim keepdim"),
    Op("topk", "reduction", "topk kthvalue", "input k dim"),
    Op("sort", "reduction", "sort argsort msort", "input dim descending"),
    Op("logsumexp", "reduction", "logsumexp", "input dim keepdim"),
    Op("prod", "reduction", "prod", "input dim keepdim"),
    Op("median", "reduction", "median nanmedian mode", "input dim keepdim"),
    Op("any", "reduction", "any all", "input dim keepdim"),
    Op("cumsum", "reduction", "cumsum cumprod", "input dim"),
    # questions about a tensor, and arithmetic on the answers
    Op("shape", "query", "size dim ndimension numel sym_size sym_numel stride is_contiguous", "input dim"),
    Op("getattr", "query", "", "input name", functions=((getattr, None),)),
    Op("container", "query", "", "items", functions=((OrderedDict, None), (slice, "*bounds"))),
    Op(
        "assert",
        "query",
        "_assert _assert_async _assert_tensor_metadata _assert_scalar",
        "condition message",
        functions=tuple((check, "*condition") for check in guards.CHECKS),
    ),
    Op("limits", "query", "finfo iinfo", "dtype"),
    Op("factory", "query", "zeros ones full empty arange linspace eye tensor scalar_tensor rand randn", "*size"),
    Op("like", "query", "zeros_like ones_like full_like empty_like rand_like randn_like", "input"),
    Op("new", "query", "new_zeros new_ones new_full new_empty new_tensor", "input *size"),
    Op("scalar", "query", "", "input", functions=((int, None), (float, None), (bool, None), (len, None), (round, None))),
    Op(
        "scalar_function",
        "query",
        "item sym_float sym_int sym_max sym_min",
        "input",
        functions=((operator.index, None), (math.ceil, None), (math.floor, None), (math.sqrt, None)),
    ),
)
