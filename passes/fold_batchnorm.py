"""fold-batchnorm: batch normalisation in eval mode, folded into the convolution or linear layer beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxcompress.graph import edit, ops
from fxcompress.graph.channels.correspondence import channel_map, moved_from, moved_to
from fxcompress.graph.shapes import module_of, shape_of
from fxcompress.pass_base import Context, Pass, Promise, close
from fxcompress.quantization.fake_quant import FakeQuantize, fake_quantizer

__all__ = ["FoldBatchNorm"]


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold batch normalisation into the weights before it, or else into those after it.

    With running statistics μ, σ² and parameters γ, β, a layer ``W x + b`` followed by the normalisation is the layer
    ``(γ/√(σ²+ε)) W x + (b − μ) γ/√(σ²+ε) + β``; a layer that follows it takes the factor in its weight's columns and the
    rest in its bias. The new weights are computed in float64 and rounded once. What only moves values (reshape, permute,
    flatten) may stand between.

    Left alone, with the reason: normalisation in training mode or without running statistics, one that no convolution or
    linear layer stands beside, one before a layer that pads with zeros, and weights that other calls use with another
    normalisation. A weight that is fake-quantized keeps its levels; its scale takes up the factor.

    Options: ``layers``, the names of the layers to fold into, all where it is left out; ``beyond``: fold past operators that
    move values, and into the layer after, too.
    """

    name: ClassVar[str] = "fold-batchnorm"
    takes: ClassVar[tuple[str, ...]] = ("float", "observed")
    promise: ClassVar[Promise] = close(rtol=1e-4)

    layers: tuple[str, ...] | None = None
    beyond: bool = True

    def run(self, module: fx.GraphModule, context: Context) -> None:
        weights = _Weights(module, context.analysis(edit.readers, module), context.analysis(edit.tied, module))
        gone: set[fx.Node] = set()
        for node in list(module.graph.nodes):
            norm = ops.read(node) if node not in gone else None
            if norm is None or norm.kind != "batch_norm" or not norm.inputs:
                continue
            fold, reason = self._planned(norm, weights)
            if fold is not None:
                fold.apply(module, norm)
                gone |= set(fold.norms)
                for folded in fold.norms:
                    edit.bypass(folded)
            elif reason:
                context.skip(node, reason)

    def _planned(self, norm: ops.Call, weights: _Weights) -> tuple[_Fold | None, str]:
        """What to do about ``norm``, or why not; neither where it is beside none of the layers asked for."""
        if reason := _unsettled(norm):
            return None, reason if self._asked(moved_from(norm.inputs[0])) else ""
        reasons = []
        for find in (_behind, _ahead) if self.beyond else (_behind,):
            found = find(norm, weights, self.beyond)
            if isinstance(found, _Fold) and self._asked(found.layer.node):
                return found, ""
            if isinstance(found, str) and self._asked(moved_from(norm.inputs[0])):
                reasons.append(found)
        return None, "; ".join(dict.fromkeys(reasons))

    def _asked(self, layer: fx.Node) -> bool:
        return self.layers is None or ops.owner_name(layer) in self.layers


def _unsettled(norm: ops.Call) -> str | None:
    """Why ``norm`` cannot be folded into any layer, or None."""
    if norm["training"] and "momentum" in norm.arguments:
        return "it is in training mode, where it uses the statistics of the batch"
    return None if isinstance(norm["running_mean"], ops.Attr) else "it keeps no running statistics"


@dataclass(frozen=True)
class _Fold:
    """Fold ``norms``, which are alike, into ``layer``: one that stands ``ahead`` of them, or behind.

    ``channels``: the channel of the first of layer and norm for each of the other's; None: they are the same.
    """

    layer: ops.Call
    norms: tuple[fx.Node, ...]
    ahead: bool
    channels: Tensor | None

    def apply(self, module: fx.GraphModule, norm: ops.Call) -> None:
        factor, shift = _affine(module, norm)
        stored = edit.get_tensor(module, self.layer["weight"].name)
        bias = _tensor(module, self.layer["bias"], 0.0, stored.new_zeros(_outputs(stored, self.layer)).double())
        if self.ahead:
            if self.channels is not None:
                factor, shift = factor[self.channels], shift[self.channels]
            groups = self.layer["groups"] or 1
            rows = stored.double().reshape(groups, stored.shape[0] // groups, factor.numel() // groups, -1)
            weight = (rows * factor.reshape(groups, 1, -1, 1)).reshape(stored.shape)
            bias = bias + (rows * shift.reshape(groups, 1, -1, 1)).sum((2, 3)).flatten()
        else:
            if self.channels is not None:
                order = self.channels.argsort()
                factor, shift = factor[order], shift[order]
            quantizer = fake_quantizer(self.layer)
            weight = _scaled(quantizer.folded(stored, factor) if quantizer is not None else stored, factor, self.layer)
            bias = bias * factor + shift
        edit.set_tensor(module, self.layer["weight"].name, torch.empty_like(stored).copy_(weight).detach())
        edit.set_bias(module, self.layer, bias.to(stored.dtype))


@dataclass(frozen=True)
class _Weights:
    """The tensors of a graph, which nodes read each, and those that several modules own."""

    module: fx.GraphModule
    reading: dict[str, list[fx.Node]]
    tied: set[int]

    def obstacle(self, layer: ops.Call, where: str) -> str | None:
        """Why the weight of a layer cannot be changed, or None."""
        if not isinstance(layer["weight"], ops.Attr) or not edit.is_stored(self.module, layer["weight"].name):
            return f"the weight {where} it is computed, not stored"
        if id(edit.get_tensor(self.module, layer["weight"].name)) in self.tied:
            return f"the weight {where} it is tied to another layer's"
        return None


def _behind(norm: ops.Call, weights: _Weights, beyond: bool) -> _Fold | str:
    """How to fold ``norm`` into the layer that it follows, or why not."""
    value = norm.inputs[0]
    source = moved_from(value) if beyond else value
    layer = ops.read(source)
    if layer is None or not layer.kind.startswith(("conv", "linear")):
        return f"it follows {ops.kind(source)!r}, not a convolution or linear layer"
    if moved_to(source) is not norm.node:
        return f"{source.name!r} before it is also used elsewhere"
    if layer["activation"]:
        return "an activation stands between it and the layer before it"
    if reason := weights.obstacle(layer, "before"):
        return reason
    channels = _channels(layer, norm)
    if isinstance(channels, str):
        return channels
    quantizer = fake_quantizer(layer)
    if quantizer is not None and type(quantizer) is not FakeQuantize:
        return "the weight before it is fake-quantized on a scale that still moves; freeze-scales comes first"
    if quantizer is not None and source is not value:
        return "the weight before it is fake-quantized without it"
    readers = weights.reading[layer["weight"].name]
    others = [reader for reader in readers if not _same_norm(reader, norm, len(readers) > 1)]
    if others:
        return f"its weights are also used by {others[0].name!r} without this normalisation"
    norms = {norm.node: None} | {ops.value_readers(reader)[0]: None for reader in readers if len(readers) > 1}
    return _Fold(layer, tuple(norms), False, channels)


def _ahead(norm: ops.Call, weights: _Weights, beyond: bool) -> _Fold | str:
    """How to fold ``norm`` into the layer that follows it, or why not."""
    target = moved_to(norm.node)
    layer = ops.read(target) if target is not None and target.op.startswith("call") else None
    if layer is None or layer.kind not in _AHEAD or not layer.inputs or moved_from(layer.inputs[0]) is not norm.node:
        return "no convolution or linear layer alone follows it"
    if reason := weights.obstacle(layer, "after"):
        return reason
    if len(weights.reading[layer["weight"].name]) > 1:
        return "the weight after it is also used elsewhere"
    if fake_quantizer(layer) is not None:
        return "the weight after it is fake-quantized without it"
    if _pads_with_zeros(layer) and bool(_affine(weights.module, norm)[1].any()):
        return f"{ops.owner_name(layer.node)!r} after it pads with zeros, which it would have shifted"
    dim = -1 if layer.kind == "linear" else 1
    if layer.inputs[0] is norm.node and dim == 1:
        return _Fold(layer, (norm.node,), True, None)
    channels = channel_map(norm.node, 1, layer.inputs[0], dim)
    if channels is None:
        return "it normalises another axis than the layer after it sums over, as far as shapes are known"
    return _Fold(layer, (norm.node,), True, channels)


_AHEAD = ("linear", "conv1d", "conv2d", "conv3d")


def _pads_with_zeros(layer: ops.Call) -> bool:
    part: Any = module_of(layer.node) if layer.node.op == "call_module" else None
    if part is not None and getattr(part, "padding_mode", "zeros") != "zeros":
        return False
    padding = layer["padding"]
    return (
        padding == "same" if isinstance(padding, str) else any(padding if isinstance(padding, (tuple, list)) else [padding])
    )


def _channels(layer: ops.Call, norm: ops.Call) -> Tensor | str | None:
    """The layer's output of each channel of the normalisation behind it, None where they are the same; or why not."""
    source, value = layer.node, norm.inputs[0]
    dim = -1 if layer.kind == "linear" else 1
    if source is value and (dim == 1 or len(shape_of(source) or (0, 0)) == 2):
        return None
    found = channel_map(source, dim, value, 1)
    if found is None:
        return f"it normalises another axis than the outputs of {source.name!r}, as far as shapes are known"
    if len(set(found.tolist())) < len(found):
        return f"it has several channels for an output of {source.name!r}"
    return found


def _same_norm(layer: fx.Node, norm: ops.Call, several: bool) -> bool:
    """Whether ``layer`` is followed by a normalisation with the same tensors and by nothing else; ``several``: at once."""
    node = moved_to(layer)
    follower = ops.read(node) if node is not None and node.op.startswith("call") else None
    if follower is None or (several and follower.inputs[0] is not layer):
        return False
    return all(follower[name] == norm[name] for name in ("weight", "bias", "running_mean", "running_var", "eps"))


def _affine(module: fx.GraphModule, norm: ops.Call) -> tuple[Tensor, Tensor]:
    """What a normalisation multiplies each channel by, and what it adds then, in float64."""
    mean = edit.get_tensor(module, norm["running_mean"].name).double()
    variance = edit.get_tensor(module, norm["running_var"].name).double()
    gamma, beta = _tensor(module, norm["weight"], 1.0, mean), _tensor(module, norm["bias"], 0.0, mean)
    factor = gamma / torch.sqrt(variance + norm["eps"])
    return factor, beta - mean * factor


def _tensor(module: fx.GraphModule, value: Any, default: float, like: Tensor) -> Tensor:
    return edit.get_tensor(module, value.name).double() if value else torch.full_like(like, default)


def _outputs(weight: Tensor, layer: ops.Call) -> int:
    return weight.shape[1] * (layer["groups"] or 1) if layer.kind.startswith("conv_transpose") else weight.shape[0]


def _scaled(weight: Tensor, factor: Tensor, layer: ops.Call) -> Tensor:
    """``weight`` with every output multiplied by its factor."""
    if layer.kind.startswith("conv_transpose"):
        groups = layer["groups"]
        per_group = weight.double().unflatten(0, (groups, -1)) * _spread(factor.view(groups, 1, -1), weight.dim() + 1)
        return per_group.flatten(0, 1)
    return weight.double() * _spread(factor, weight.dim())


def _spread(factor: Tensor, dims: int) -> Tensor:
    return factor.reshape(*factor.shape, *[1] * (dims - factor.dim()))
