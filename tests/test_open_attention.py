"""open-attention: the same numbers, names that stay, every part a node of its own, and what it declines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress import PassManager, PTQQuantizer, coverage
from fxcompress.graph import ops
from fxcompress.graph.results import output_snr


class Attention(nn.Module):
    """One attention layer, called as ``mode`` says."""

    def __init__(self, mode: str = "self", **options: Any) -> None:
        super().__init__()
        self.mode = mode
        self.attention = nn.MultiheadAttention(16, 4, **options)
        for parameter in self.attention.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Any:
        if self.mode == "self":
            return self.attention(x, x, x, need_weights=False)[0] + x
        if self.mode == "cross":
            return self.attention(x, y, y, need_weights=False)[0]
        if self.mode == "other values":
            return self.attention(query=x, key=y, value=z, need_weights=False)[0]
        if self.mode == "weights":
            values, weights = self.attention(x, y, y)
            return values, weights
        if self.mode == "weights per head":
            return self.attention(x, y, y, average_attn_weights=False)
        assert self.mode == "masked"
        return self.attention(x, x, x, need_weights=False, attn_mask=torch.zeros(7, 7))[0]


def inputs(batch: int = 2, batch_first: bool = False, width: int = 16, others: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(batch)
    made = torch.randn(batch, 7, width), torch.randn(batch, 5, others), torch.randn(batch, 5, others)
    return made if batch_first else tuple(t.transpose(0, 1).contiguous() for t in made)  # type: ignore[return-value]


def opened(model: nn.Module, call: tuple[Tensor, ...], **options: Any) -> Any:
    return PassManager([{"open-attention": options}], reproducer=False).run(model.eval(), call)


def kinds(model: Any) -> list[str]:
    return [ops.kind(node) for node in model.graph.nodes]


@pytest.mark.parametrize("matmuls", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", ["self", "cross", "other values", "weights"])
def test_it_computes_what_the_layer_computes_at_any_size(mode: str, bias: bool, batch_first: bool, matmuls: bool) -> None:
    model = Attention(mode, bias=bias, batch_first=batch_first)
    result = opened(model, inputs(2, batch_first), matmuls=matmuls)
    assert "multihead_attention" not in kinds(result)
    assert ("scaled_dot_product_attention" in kinds(result)) == (mode != "weights" and not matmuls)
    for batch in (2, 3):
        call = inputs(batch, batch_first)
        torch.testing.assert_close(result(*call), model(*call), atol=1e-5, rtol=1e-4)


def test_keys_and_values_of_other_widths_keep_their_own_projections() -> None:
    model, call = Attention("cross", kdim=12, vdim=12), inputs(others=12)
    result = opened(model, call)
    torch.testing.assert_close(result(*call), model(*call), atol=1e-5, rtol=1e-4)
    kept = {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight", "out_proj.bias"}
    split = {"q_proj_bias", "k_proj_bias", "v_proj_bias"}
    assert set(dict(result.attention.named_parameters())) == kept | split


def test_parameters_keep_their_names_and_values() -> None:
    model = Attention("self")
    result = opened(model, inputs())
    before, after = dict(model.named_parameters()), dict(result.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Attention("weights per head"), "passed on whole"),
    ],
)
def test_what_it_does_not_open_is_named(model: nn.Module, reason: str) -> None:
    manager = PassManager(["open-attention"], reproducer=False)
    result = manager.run(model.eval(), inputs())
    remarks = [(remark.node, remark.reason) for row in manager.ledger.rows for remark in row.remarks]
    assert any(node == "attention" and reason in why for node, why in remarks)
    assert "multihead_attention" in kinds(result)


def test_attention_written_out_is_softmax_of_scaled_products_in_float64() -> None:
    model, call = Attention("self"), inputs()
    result = opened(model, call, matmuls=True)
    layer, x = model.attention, call[0].double()
    weight, bias = layer.in_proj_weight.double(), layer.in_proj_bias.double()
    q, k, v = (part.unflatten(-1, (4, 4)).permute(1, 2, 0, 3) for part in (x @ weight.T + bias).chunk(3, -1))
    scores = (q @ k.transpose(-2, -1) / 2).exp()
    mixed = (scores / scores.sum(-1, keepdim=True) @ v).permute(2, 0, 1, 3).flatten(2)
    expected = mixed @ layer.out_proj.weight.double().T + layer.out_proj.bias.double() + x
    torch.testing.assert_close(result(*call).double(), expected, atol=1e-5, rtol=1e-5)


def test_projections_of_attention_run_in_integers() -> None:
    model, call = Attention("self"), inputs(8)
    result = PTQQuantizer(num_calibration_batches=1, progress=False, calibration_method="minmax").quantize(
        model.eval(), [{"x": call[0], "y": call[1], "z": call[2]}]
    )
    report = coverage(result)
    assert {row.kind for row in report.floats if row.macs} == {"scaled_dot_product_attention"}
    assert output_snr(model(*call), result(*call)) > 30


def test_attention_itself_runs_in_integers_where_the_backend_multiplies_activations() -> None:
    torch.manual_seed(0)
    attention = Attention("self").eval()
    attention.attention = nn.MultiheadAttention(64, 2)
    x = torch.randn(20, 3, 64)
    result = PTQQuantizer("tensorrt", num_calibration_batches=1, progress=False).quantize(
        attention, [{"x": x, "y": x, "z": x}]
    )
    kinds_in_float = {row.kind for row in coverage(result).floats}
    assert "matmul" in kinds(result) and "matmul" not in kinds_in_float
    assert "softmax" in kinds_in_float
    assert output_snr(attention(x, x, x), result(x, x, x)) > 25
