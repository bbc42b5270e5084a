"""fold-batchnorm: batch normalisation in eval mode, folded into the convolution or linear layer before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxcompress.graph import edit, ops
from fxcompress.graph.shapes import shape_of
from fxcompress.pass_base import Context, Pass, Promise, close
from fxcompress.quantization.fake_quant import FakeQuantize, fake_quantizer

__all__ = ["FoldBatchNorm"]


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold batch normalisation into the weights before it.

    With running statistics μ, σ² and parameters γ, β, a layer ``W x + b`` followed by the normalisation is the layer
    ``(γ/√(σ²+ε)) W x + (b − μ) γ/√(σ²+ε) + β``. The new weights are computed in float64 and rounded once.

    Left alone, with the reason: normalisation in training mode or without running statistics, one that does not directly
    follow a convolution or linear layer, and weights that other calls use with another normalisation. A weight that is
    fake-quantized keeps its levels; its scale takes up the factor.

    Options: ``layers``, the names of the layers to fold into; all where it is left out.
    """

    name: ClassVar[str] = "fold-batchnorm"
    takes: ClassVar[tuple[str, ...]] = ("float", "observed")
    promise: ClassVar[Promise] = close(rtol=1e-4)

    layers: tuple[str, ...] | None = None

    def run(self, module: fx.GraphModule, context: Context) -> None:
        reading, tied = context.analysis(edit.readers, module), context.analysis(edit.tied, module)
        foldable: list[tuple[ops.Call, ops.Call]] = []
        for node in module.graph.nodes:
            norm = ops.read(node)
            if norm is None or norm.kind != "batch_norm" or not norm.inputs:
                continue
            layer, reason = ops.read(norm.inputs[0]), _obstacle(module, norm, reading, tied)
            if self.layers is not None and ops.owner_name(norm.inputs[0]) not in self.layers:
                continue
            if reason or layer is None:
                context.skip(node, reason or "nothing stands before it")
            else:
                foldable.append((layer, norm))
        folded: set[int] = set()
        for layer, norm in foldable:
            weight = edit.get_tensor(module, layer["weight"].name)
            if id(weight) not in folded:
                _fold(module, layer, norm)
                folded.add(id(edit.get_tensor(module, layer["weight"].name)))
            edit.bypass(norm.node)


def _obstacle(module: fx.GraphModule, norm: ops.Call, reading: dict[str, list[fx.Node]], tied: set[int]) -> str | None:
    """Why ``norm`` cannot be folded, or None."""
    if norm["training"] and "momentum" in norm.arguments:
        return "it is in training mode, where it uses the statistics of the batch"
    if not isinstance(norm["running_mean"], ops.Attr):
        return "it keeps no running statistics"
    source = norm.inputs[0]
    layer = ops.read(source)
    if layer is None or not layer.kind.startswith(("conv", "linear")):
        return f"it follows {ops.kind(source)!r}, not a convolution or linear layer"
    if len(ops.value_readers(source)) > 1:
        return f"{source.name!r} before it is also used elsewhere"
    if layer["activation"]:
        return "an activation stands between it and the layer before it"
    if not isinstance(layer["weight"], ops.Attr) or not edit.is_stored(module, layer["weight"].name):
        return "the weight before it is computed, not stored"
    if id(edit.get_tensor(module, layer["weight"].name)) in tied:
        return "the weight before it is tied to another layer's"
    if layer.kind == "linear" and len(shape_of(source) or (0, 0)) != 2:
        return "it normalises another axis than the linear layer's outputs"
    quantizer = fake_quantizer(layer)
    if quantizer is not None and type(quantizer) is not FakeQuantize:
        return "the weight before it is fake-quantized on a scale that still moves; freeze-scales comes first"
    others = [reader for reader in reading[layer["weight"].name] if not _same_norm(reader, norm)]
    return f"its weights are also used by {others[0].name!r} without this normalisation" if others else None


def _same_norm(layer: fx.Node, norm: ops.Call) -> bool:
    """Whether ``layer`` is followed by a normalisation with the same tensors, and by nothing else."""
    users = ops.value_readers(layer)
    follower = ops.read(users[0]) if len(users) == 1 else None
    return follower is not None and all(
        follower[name] == norm[name] for name in ("weight", "bias", "running_mean", "running_var", "eps")
    )


def _fold(module: fx.GraphModule, layer: ops.Call, norm: ops.Call) -> None:
    def tensor(value: ops.Attr | None, default: float, like: Tensor) -> Tensor:
        return edit.get_tensor(module, value.name).double() if value else torch.full_like(like, default)

    mean = edit.get_tensor(module, norm["running_mean"].name).double()
    variance = edit.get_tensor(module, norm["running_var"].name).double()
    gamma, beta = tensor(norm["weight"], 1.0, mean), tensor(norm["bias"], 0.0, mean)
    factor = gamma / torch.sqrt(variance + norm["eps"])
    weight = edit.get_tensor(module, layer["weight"].name)
    bias = tensor(layer["bias"], 0.0, mean)
    quantizer = fake_quantizer(layer)
    rounded = quantizer.folded(weight, factor) if quantizer is not None else weight
    edit.set_tensor(module, layer["weight"].name, _scaled(rounded, factor, layer))
    edit.set_bias(module, layer, ((bias - mean) * factor + beta).to(weight.dtype))


def _scaled(weight: Tensor, factor: Tensor, layer: ops.Call) -> Tensor:
    if layer.kind.startswith("conv_transpose"):
        groups = layer["groups"]
        per_group = weight.double().unflatten(0, (groups, -1)) * _spread(factor.view(groups, 1, -1), weight.dim() + 1)
        return _like(per_group.flatten(0, 1), weight)
    return _like(weight.double() * _spread(factor, weight.dim()), weight)


def _spread(factor: Tensor, dims: int) -> Tensor:
    return factor.reshape(*factor.shape, *[1] * (dims - factor.dim()))


def _like(value: Tensor, reference: Tensor) -> Tensor:
    """``value`` in the reference's dtype and memory layout."""
    return torch.empty_like(reference).copy_(value).detach()
