"""The op table: one row per operator, every spelling of it, and what the analyses need to know about it.

Adding an operator is adding a row. Argument names are those of ``torch.nn.functional``.
"""

from __future__ import annotations

import math
import operator
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import rnn

from fxcompress.graph import fused, guards
from fxcompress.graph.attention import ScaledDotProductAttention
from fxcompress.graph.drop_path import DropPath
from fxcompress.graph.frozen import FROZEN
from fxcompress.graph.spellings import Op
from fxcompress.graph.taps import tap

__all__ = ["TABLE"]

aten = torch.ops.aten

_CONV = "input weight bias stride padding dilation groups activation"
_CONV_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_TRANSPOSED = "input weight bias stride padding output_padding groups dilation activation"
_TRANSPOSED_DEFAULTS = {**_CONV_DEFAULTS, "output_padding": 0}
_NORM_STATS = ("weight", "bias", "running_mean", "running_var")
_BATCH_NORM = "input running_mean running_var weight bias training momentum eps"
_ATEN_BATCH_NORM = "input weight bias running_mean running_var training momentum eps cudnn_enabled"


def _conv(dims: int) -> Op:
    cls = getattr(nn, f"Conv{dims}d")
    return Op(
        f"conv{dims}d",
        "contraction",
        f"conv{dims}d",
        _CONV,
        modules=(cls, fused.MODULES[cls]),
        tensors=("weight", "bias"),
        functions=((fused.FUNCTIONS[f"conv{dims}d"], None),),
        defaults=_CONV_DEFAULTS,
    )


def _conv_transpose(dims: int) -> Op:
    cls = getattr(nn, f"ConvTranspose{dims}d")
    aten_name = getattr(aten, f"conv_transpose{dims}d")
    return Op(
        f"conv_transpose{dims}d",
        "contraction",
        f"conv_transpose{dims}d",
        _TRANSPOSED,
        modules=(cls, fused.MODULES[cls]),
        tensors=("weight", "bias"),
        functions=((aten_name, None), (fused.FUNCTIONS[f"conv_transpose{dims}d"], None)),
        defaults=_TRANSPOSED_DEFAULTS,
    )


def _activation(kind: str, module: type[nn.Module] | None = None, options: str = "", **defaults: object) -> Op:
    return Op(
        kind,
        "activation",
        f"{kind} {kind}_",
        f"input {options} inplace",
        modules=(module,) if module else (),
        defaults=defaults,
    )


def _pointwise(kind: str, names: str, arguments: str = "input other") -> Op:
    return Op(kind, "pointwise", names, arguments)


def _unary(names: str) -> list[Op]:
    return [_pointwise(name, f"{name} {name}_", "input") for name in names.split()]


def _movement(kind: str, names: str, arguments: str, **more: Any) -> Op:
    return Op(kind, "movement", names, arguments, **more)


def _pool(kind: str, arguments: str, module: type[nn.Module], **defaults: object) -> Op:
    return Op(kind, "pooling", kind, arguments, modules=(module,), defaults=defaults)


_MAX_POOL = "input kernel_size stride padding dilation ceil_mode return_indices"
_AVG_POOL = "input kernel_size stride padding ceil_mode count_include_pad divisor_override"

PADS: tuple[type[nn.Module], ...] = tuple(
    getattr(nn, f"{how}Pad{dims}d")
    for how in ("Zero", "Constant", "Reflection", "Replication", "Circular")
    for dims in (1, 2, 3)
)
"""Layers that pad."""

RESAMPLERS = (
    *(f"{how}{dims}d" for how in ("upsample_nearest", "_upsample_nearest_exact") for dims in (1, 2, 3)),
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_lanczos2d_aa"),
)
"""Names under which aten interpolates."""


def _pools(dims: int) -> list[Op]:
    return [
        Op(
            f"max_pool{dims}d",
            "pooling",
            f"max_pool{dims}d",
            _MAX_POOL,
            modules=(getattr(nn, f"MaxPool{dims}d"),),
            functions=(
                (getattr(F, f"_max_pool{dims}d"), _MAX_POOL),
                *((getattr(aten, f"max_pool{dims}d_with_indices"), _MAX_POOL),) * (dims > 1),
            ),
            defaults={"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False},
        ),
        _pool(
            f"avg_pool{dims}d",
            _AVG_POOL,
            getattr(nn, f"AvgPool{dims}d"),
            stride=None,
            padding=0,
            ceil_mode=False,
            count_include_pad=True,
        ),
        _pool(f"adaptive_avg_pool{dims}d", "input output_size", getattr(nn, f"AdaptiveAvgPool{dims}d")),
        _pool(f"adaptive_max_pool{dims}d", "input output_size", getattr(nn, f"AdaptiveMaxPool{dims}d")),
    ]


_FOURIER = [f"{way}fft{dims}" for way in ("", "i", "r", "ir", "h", "ih") for dims in ("", "2", "n")]
_SHIFTS = ["fftshift", "ifftshift"]


def _fourier(names: list[str], order: str) -> list[tuple[Any, str]]:
    """Fourier transforms as torch.fft and aten spell them."""
    return [(place, order) for name in names for place in (getattr(torch.fft, name), getattr(aten, f"fft_{name}"))]


TABLE: tuple[Op, ...] = (
    # contractions
    *(_conv(dims) for dims in (1, 2, 3)),
    *(_conv_transpose(dims) for dims in (1, 2, 3)),
    Op(
        "linear",
        "contraction",
        "linear",
        "input weight bias activation",
        modules=(nn.Linear, fused.MODULES[nn.Linear], nn.modules.linear.NonDynamicallyQuantizableLinear),
        tensors=("weight", "bias"),
        functions=((fused.FUNCTIONS["linear"], None),),
    ),
    Op("matmul", "contraction", "matmul bmm mm mv dot __matmul__", "input other"),
    Op("addmm", "contraction", "addmm baddbmm", "bias input other beta alpha"),
    Op("einsum", "contraction", "einsum", "equation *operands"),
    Op("tensordot", "contraction", "tensordot", "input other dims"),
    Op("outer", "contraction", "outer ger", "input other"),
    Op("bilinear", "contraction", "bilinear", "input other weight bias", (nn.Bilinear,), ("weight", "bias")),
    Op("mask", "pointwise", "", "input mask", ("fxcompress.pruning.sites.Mask",), ("mask",)),
    # attention and recurrence
    Op(
        "scaled_dot_product_attention",
        "attention",
        "scaled_dot_product_attention",
        "query key value attn_mask dropout_p is_causal scale enable_gqa",
        modules=(ScaledDotProductAttention,),
    ),
    Op("multihead_attention", "attention", "", "query key value", (nn.MultiheadAttention,)),
    Op("lstm", "recurrent", "", "input state", (nn.LSTM,)),
    Op("gru", "recurrent", "", "input state", (nn.GRU,)),
    Op("rnn", "recurrent", "", "input state", (nn.RNN,)),
    Op(
        "recurrent_cell",
        "recurrent",
        "lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell",
        "input state weight_ih weight_hh bias_ih bias_hh",
        modules=(nn.LSTMCell, nn.GRUCell, nn.RNNCell),
        tensors=("weight_ih", "weight_hh", "bias_ih", "bias_hh"),
    ),
    Op(
        "pack_sequence",
        "other",
        "",
        "input lengths batch_first enforce_sorted",
        functions=((rnn.pack_padded_sequence, None),),
        defaults={"batch_first": False, "enforce_sorted": True},
    ),
    Op("pad_sequence", "other", "", "input batch_first padding_value", functions=((rnn.pad_packed_sequence, None),)),
    # normalisation
    Op(
        "batch_norm",
        "normalisation",
        "batch_norm",
        _BATCH_NORM,
        modules=(
            nn.BatchNorm1d,
            nn.BatchNorm2d,
            nn.BatchNorm3d,
            nn.SyncBatchNorm,
            *FROZEN.values(),
            "torchvision.ops.misc.FrozenBatchNorm2d",
        ),
        tensors=_NORM_STATS,
        functions=((aten.batch_norm, _ATEN_BATCH_NORM), (torch.batch_norm, _ATEN_BATCH_NORM)),
        defaults={"training": False, "eps": 1e-5},
    ),
    Op(
        "instance_norm",
        "normalisation",
        "instance_norm",
        "input running_mean running_var weight bias use_input_stats momentum eps",
        modules=(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        tensors=_NORM_STATS,
        functions=((aten.instance_norm, "input weight bias running_mean running_var use_input_stats momentum eps"),),
    ),
    Op(
        "layer_norm",
        "normalisation",
        "layer_norm",
        "input normalized_shape weight bias eps",
        modules=(nn.LayerNorm,),
        tensors=("weight", "bias"),
        defaults={"eps": 1e-5},
    ),
    Op(
        "rms_norm",
        "normalisation",
        "rms_norm",
        "input normalized_shape weight eps",
        modules=(nn.RMSNorm,),
        tensors=("weight",),
    ),
    Op(
        "group_norm",
        "normalisation",
        "group_norm",
        "input num_groups weight bias eps",
        modules=(nn.GroupNorm,),
        tensors=("weight", "bias"),
        defaults={"eps": 1e-5},
    ),
    Op("local_response_norm", "normalisation", "local_response_norm", "input size", (nn.LocalResponseNorm,)),
    Op("normalize", "normalisation", "normalize", "input p dim"),
    # activations
    _activation("relu", nn.ReLU),
    _activation("relu6", nn.ReLU6),
    _activation("hardtanh", nn.Hardtanh, "min_val max_val", min_val=-1.0, max_val=1.0),
    _activation("hardswish", nn.Hardswish),
    _activation("hardsigmoid", nn.Hardsigmoid),
    _activation("sigmoid", nn.Sigmoid),
    _activation("silu", nn.SiLU),
    _activation("gelu", nn.GELU, "approximate"),
    _activation("tanh", nn.Tanh),
    _activation("elu", nn.ELU, "alpha", alpha=1.0),
    _activation("celu", nn.CELU, "alpha", alpha=1.0),
    _activation("selu", nn.SELU),
    _activation("leaky_relu", nn.LeakyReLU, "negative_slope", negative_slope=0.01),
    _activation("softplus", nn.Softplus, "beta threshold"),
    _activation("mish", nn.Mish),
    _activation("softsign", nn.Softsign),
    _activation("tanhshrink", nn.Tanhshrink),
    _activation("threshold", nn.Threshold, "threshold value"),
    _activation("logsigmoid", nn.LogSigmoid),
    _activation("hardshrink", nn.Hardshrink, "lambd"),
    _activation("softshrink", nn.Softshrink, "lambd"),
    _activation("rrelu", nn.RReLU, "lower upper training"),
    Op("prelu", "activation", "prelu", "input weight", (nn.PReLU,), ("weight",)),
    Op("glu", "movement", "glu", "input dim", (nn.GLU,), defaults={"dim": -1}),
    Op("softmax", "activation", "softmax _softmax", "input dim", (nn.Softmax,)),
    Op("softmin", "activation", "softmin", "input dim", (nn.Softmin,)),
    Op("softmax2d", "activation", "", "input", (nn.Softmax2d,)),
    Op("log_softmax", "activation", "log_softmax _log_softmax", "input dim", (nn.LogSoftmax,)),
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
    # pooling and resampling
    *(row for dims in (1, 2, 3) for row in _pools(dims)),
    Op(
        "interpolate",
        "pooling",
        f"interpolate upsample {' '.join(RESAMPLERS)}",
        "input size scale_factor mode align_corners",
        modules=(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
    ),
    Op(
        "fft",
        "other",
        "",
        "input s dim norm",
        functions=(*_fourier(_FOURIER, "input s dim norm"), *_fourier(_SHIFTS, "input dim")),
    ),
    Op("view_as_complex", "other", "view_as_complex"),
    Op("view_as_real", "other", "view_as_real"),
    Op("grid_sample", "other", "grid_sample grid_sampler", "input grid"),
    Op(
        "max_unpool",
        "other",
        "max_unpool1d max_unpool2d max_unpool3d",
        "input indices",
        modules=(nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d),
    ),
    *(
        _pool(f"lp_pool{dims}d", "input norm_type kernel_size stride ceil_mode", getattr(nn, f"LPPool{dims}d"), stride=None)
        for dims in (1, 2, 3)
    ),
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
    # lookups
    Op(
        "embedding",
        "embedding",
        "embedding",
        "input weight",
        (nn.Embedding,),
        ("weight",),
        functions=((aten.embedding, "weight input padding_idx"),),
    ),
    Op("embedding_bag", "embedding", "embedding_bag", "input weight offsets", (nn.EmbeddingBag,), ("weight",)),
    # questions about a tensor, and arithmetic on the answers
    Op("shape", "query", "size dim ndimension numel sym_size sym_numel stride is_contiguous", "input dim"),
    Op("getattr", "query", "", "input name", functions=((getattr, None),)),
    Op("container", "query", "", "items", functions=((OrderedDict, None), (slice, "*bounds"))),
    Op(
        "assert",
        "query",
        "_assert _assert_async _assert_tensor_metadata _assert_scalar",
        "condition message",
        functions=((guards.fixed, "*condition"), (guards.decided, "*condition")),
    ),
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
