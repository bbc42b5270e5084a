"""The rows of layers: what has weights, activations, pooling and resampling."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import rnn

from fxcompress.graph import fused
from fxcompress.graph.attention import ScaledDotProductAttention
from fxcompress.graph.frozen import FROZEN
from fxcompress.graph.spellings import Op

__all__ = ["LAYERS"]

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


def _pool(kind: str, arguments: str, module: type[nn.Module], **defaults: object) -> Op:
    return Op(kind, "pooling", kind, arguments, modules=(module,), defaults=defaults)


_MAX_POOL = "input kernel_size stride padding dilation ceil_mode return_indices"
_AVG_POOL = "input kernel_size stride padding ceil_mode count_include_pad divisor_override"

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
                (getattr(F, f"max_pool{dims}d_with_indices"), _MAX_POOL),
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


LAYERS: tuple[Op, ...] = (
    # contractions
    *(_conv(dims) for dims in (1, 2, 3)),
    *(_conv_transpose(dims) for dims in (1, 2, 3)),
    Op(
        "deform_conv2d",
        "contraction",
        "",
        "input offset mask weight bias stride padding dilation groups",
        modules=("torchvision.ops.deform_conv.DeformConv2d",),
        tensors=("weight", "bias"),
        defaults=_CONV_DEFAULTS,
    ),
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
    # pooling and resampling
    *(row for dims in (1, 2, 3) for row in _pools(dims)),
    Op(
        "interpolate",
        "pooling",
        f"interpolate upsample {' '.join(RESAMPLERS)}",
        "input size scale_factor mode align_corners",
        modules=(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
    ),
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
)
