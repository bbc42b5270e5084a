"""Layers are chosen by the names they have in the model, however their weights reach the operator that multiplies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxcompress import DynamicQuantizer, LSQQuantizer, PTQQuantizer, QATQuantizer, trace
from fxcompress.graph import ops


def projected(x: Tensor, qkv: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """A function that is given the weights of layers, as torchvision's windowed attention is."""
    query, key, value = F.linear(x, qkv, bias).chunk(3, -1)
    return F.linear(torch.softmax(query @ key.transpose(-2, -1), -1) @ value, out)


fx.wrap("projected")


class Direct(nn.Module):
    """Calls its layers' weights through functions in its own code."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return projected(x, self.qkv.weight, self.qkv.bias, self.proj.weight)


class Inlined(Direct):
    def forward(self, x: Tensor) -> Tensor:
        query, _, value = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        return F.linear(query * value, self.proj.weight)


class Branching(Direct):
    """Defeats symbolic tracing, so that it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 2:
            x = x + x
        query, key, _ = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        return F.linear(query + key, self.proj.weight)


class Around(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(8, 8), block(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)))


BLOCKS = [Direct, Inlined, Branching]


def floats(model: Any) -> set[str]:
    """Layers whose float32 weight two-dimensional operators still read."""
    return {name.removesuffix(".weight") for name, value in model.named_parameters() if value.dim() == 2}


@pytest.mark.parametrize("block", BLOCKS)
def test_a_layer_inside_is_known_by_its_own_name(block: type[nn.Module]) -> None:
    traced = trace(Around(block).eval(), torch.randn(2, 4, 8))
    names = [ops.owner_name(n) for n in traced.graph.nodes if ops.kind(n) == "linear"]
    assert names == ["stem", "block.qkv", "block.proj", "head"]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("quantizer", [PTQQuantizer, DynamicQuantizer, QATQuantizer, LSQQuantizer])
@pytest.mark.parametrize("excluded", ["block.proj", "*.qkv", "block"])
def test_an_excluded_layer_stays_in_float(block: type[nn.Module], quantizer: Any, excluded: str) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(4, 4, 8) for _ in range(2)]
    expected = {"block.proj": {"block.proj"}, "*.qkv": {"block.qkv"}}
    with_data = {"num_calibration_batches": 2} if quantizer is PTQQuantizer else {}
    made = quantizer(exclude_layers=[excluded], **with_data)
    if quantizer in (QATQuantizer, LSQQuantizer):
        prepared = made.prepare(Around(block), batches[0])
        prepared(batches[0])
        result = made.convert(prepared.eval(), batches[0])
    elif quantizer is PTQQuantizer:
        result = made.quantize(Around(block).eval(), batches)
    else:
        result = made.quantize(Around(block).eval(), example_inputs=batches[0])
    assert floats(result) == expected.get(excluded, {"block.qkv", "block.proj"})


def test_an_override_reaches_the_layer_inside_alone() -> None:
    batches = [torch.randn(4, 4, 8)]
    quantizer = PTQQuantizer(num_calibration_batches=1, overrides={"block.proj": {"weight_bits": 4}})
    portable = quantizer.quantize(Around(Inlined).eval(), batches).meta["portable"]
    levels = {name: int(value.abs().max()) for name, value in portable.named_buffers() if value.dtype == torch.int8}
    assert levels["block.proj.weight"] <= 8 < min(levels[f"{name}.weight"] for name in ("stem", "block.qkv", "head"))


def test_the_output_projection_of_attention_is_excluded_wherever_it_was_captured() -> None:
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 5, 8)
    quantizer = PTQQuantizer(num_calibration_batches=1, exclude_layers=["self_attn.out_proj"])
    result = quantizer.quantize(layer, [x])
    assert floats(result) == {"self_attn.out_proj"}
    assert any("excluded by name" in remark.reason for remark in quantizer.ledger.remarks())
