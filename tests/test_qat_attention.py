"""Quantization-aware training of attention: its layers train rounded, its dropout drops, and conversion keeps both."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress import LSQQuantizer, PTQQuantizer, QATQuantizer, coverage
from fxcompress.graph import ops
from fxcompress.quantization.fake_quant import fake_quantizers
from tests.test_qat import output_step, reference


def encoder(dropout: float = 0.1, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=dropout, batch_first=True, **options)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 8))


class Crossed(nn.Module):
    """Attention to another sequence, under a mask, with its weights as an output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(32, 4, dropout=0.1, kdim=24, vdim=24, batch_first=True)

    def forward(self, x: Tensor, y: Tensor, hidden: Tensor) -> Any:
        return self.attention(x, y, y, key_padding_mask=hidden)


class Coded(nn.Module):
    """Attention as code that asks for the mode, as libraries of vision models write it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.proj, self.p = nn.Linear(32, 96), nn.Linear(32, 32), 0.25

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        core = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.0)
        return self.proj(core.transpose(1, 2).flatten(2))


def tokens(seed: int = 0, count: int = 8) -> Tensor:
    return torch.randn(count, 12, 32, generator=torch.Generator().manual_seed(seed))


def trained(model: Any, *calls: tuple[Tensor, ...]) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for call in calls:
        optimizer.zero_grad()
        result = model(*call)
        (result[0] if isinstance(result, tuple) else result).square().mean().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("quantizer", [QATQuantizer, LSQQuantizer])
@pytest.mark.parametrize("backend", ["fbgemm", "tensorrt"])
def test_as_much_runs_in_integers_as_by_static_quantization(quantizer: Any, backend: str) -> None:
    layer = nn.TransformerEncoderLayer(64, 2, 64, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), torch.randn(3, 20, 64)
    static = PTQQuantizer(backend, num_calibration_batches=1, progress=False).quantize(model, [x])
    prepared = quantizer(backend=backend).prepare(model.train(), x)
    converted = quantizer(backend=backend).convert(trained(prepared, (x,)), x)
    assert coverage(converted).integer_macs == coverage(static).integer_macs
    assert {r.kind for r in coverage(converted).floats if r.macs} == {r.kind for r in coverage(static).floats if r.macs}


def test_every_projection_is_rounded_and_keeps_its_name() -> None:
    model = encoder()
    prepared = QATQuantizer().prepare(model.train(), tokens())
    assert set(dict(prepared.named_parameters())) == set(dict(model.named_parameters()))
    rounded = {name for name, fake in fake_quantizers(prepared).items() if fake.axis is not None}
    for layer in ("0_layers_0_self_attn_in_proj_weight", "0_layers_1_self_attn_out_proj_weight", "1_weight"):
        assert f"fake_quant.{layer}" in rounded


@pytest.mark.parametrize("quantizer", [QATQuantizer, LSQQuantizer])
@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}])
def test_conversion_keeps_what_a_trained_encoder_computes(quantizer: Any, options: dict[str, Any]) -> None:
    prepared = quantizer().prepare(encoder(**options).train(), tokens())
    trained(prepared, *((tokens(seed),) for seed in range(4)))
    step = output_step(reference(prepared, tokens()))
    with torch.no_grad():
        gap = (prepared(tokens(9, 64)) - quantizer().convert(prepared)(tokens(9, 64))).abs()
    assert (gap <= step).double().mean() >= 0.999


def test_conversion_keeps_attention_to_another_sequence_and_its_weights() -> None:
    call = tokens(), torch.randn(8, 7, 24), torch.arange(7).expand(8, 7) > 4
    prepared = QATQuantizer().prepare(Crossed().train(), call)
    trained(prepared, call, call)
    with torch.no_grad():
        expected, found = prepared(*call), QATQuantizer().convert(prepared)(*call)
    for a, b in zip(expected, found, strict=True):
        assert ((a - b).abs() <= 0.02 * a.abs().max()).double().mean() >= 0.999
    assert (found[1][..., 5:] == 0).all()


def test_with_rounding_off_it_trains_as_the_model_does_dropout_included() -> None:
    """The same random numbers drop the same weights: outputs and gradients are those of torch's own layer."""
    model = nn.MultiheadAttention(32, 4, dropout=0.3, batch_first=True)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = model

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    plain, quantizer, x = Plain().train(), QATQuantizer(), tokens()
    prepared = quantizer.disable_fake_quant(quantizer.prepare(plain, x))
    results = []
    for part in (plain, prepared):
        torch.manual_seed(5)
        results.append(part(x))
        results[-1].square().sum().backward()
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    grads = dict(prepared.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(grads[name].grad, parameter.grad, rtol=1e-3, atol=1e-4)
    assert not torch.equal(prepared(x), prepared(x))
    prepared.eval()
    assert torch.equal(prepared(x), prepared(x))


@pytest.mark.parametrize("backend", ["fbgemm", "tensorrt"])
def test_dropout_of_attention_written_as_code_drops_in_training_only(backend: str) -> None:
    model, x = Coded().train(), tokens()
    quantizer = QATQuantizer(backend)
    prepared = quantizer.prepare(model, x)
    assert prepared.training and not torch.equal(prepared(x), prepared(x))
    trained(prepared, (x,))
    converted = quantizer.convert(prepared, x)
    assert "dropout" not in {ops.kind(node) for node in converted.graph.nodes}
    assert torch.equal(converted.train()(x), converted.eval()(x))


def test_layers_put_into_a_part_in_eval_mode_are_in_eval_mode() -> None:
    model = encoder(0.5).train()
    model[0].layers[0].eval()  # type: ignore[index, union-attr, operator]
    prepared = QATQuantizer().prepare(model, tokens())
    modes = {name: part.training for name, part in prepared.named_modules() if name.endswith("self_attn.core")}
    assert modes == {"0.layers.0.self_attn.core": False, "0.layers.1.self_attn.core": True}


def test_a_prepared_model_is_saved_and_trains_on(tmp_path: Path) -> None:
    prepared = QATQuantizer().prepare(encoder(0.3).train(), tokens())
    trained(prepared, (tokens(),))
    fxcompress.save(prepared, tmp_path / "prepared")
    again = fxcompress.load(tmp_path / "prepared")
    assert torch.equal(again(tokens(1)), prepared(tokens(1)))
    results = []
    for part in (again, copy.deepcopy(prepared)):
        torch.manual_seed(1)
        results.append(part.train()(tokens(2)))
    assert torch.equal(*results)
