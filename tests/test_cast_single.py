"""cast-single: models of half, bfloat16 and double numbers are quantized like others, and keep their types at the edges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress import DynamicQuantizer, PassManager, PTQQuantizer, QATQuantizer, backends, coverage
from fxcompress.graph.results import output_snr

TYPES = [torch.bfloat16, torch.float16, torch.float64]
X = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A residual block, a head, and code that speaks of types; two outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        x = self.norm(self.first(x)).relu()
        if scale is not None:
            x = x * scale
        pooled = (x + self.second(x)).mean((2, 3)).to(self.head.weight.dtype)
        logits = self.head(pooled)
        return {"logits": logits, "best": logits.argmax(1), "where": torch.zeros_like(logits) + logits}


def reference() -> dict[str, Tensor]:
    with torch.no_grad():
        return Net().double().eval()(X.double())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("backend", ["fbgemm", "qnnpack", "onnxruntime", "openvino"])
def test_other_number_types_run_in_integers_and_stay_at_the_edges(backend: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if reason := backends.find(backend).unavailable():
        pytest.skip(reason)
    model, x = Net().to(dtype).eval(), X.to(dtype)
    quantizer = PTQQuantizer(backend=backend, num_calibration_batches=1, progress=False)
    quantized = quantizer.quantize(model, [x])
    assert coverage(quantized).mac_share == 1.0
    assert any("it computes in float32" in remark.reason for remark in quantizer.ledger.remarks("cast-single"))
    found = quantized(x)
    assert found["logits"].dtype == found["where"].dtype == dtype and found["best"].dtype == torch.int64
    assert output_snr(reference()["logits"], found["logits"]) > 25
    assert model.head.weight.dtype == dtype
    assert quantized(torch.cat((x, x)))["logits"].shape == (8, 5)
    fxcompress.save(quantized, tmp_path / "model")
    again = fxcompress.load(tmp_path / "model")(x)
    assert again["logits"].dtype == dtype and torch.equal(again["logits"], found["logits"])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_they_are_quantized_without_data_and_while_they_train(dtype: torch.dtype) -> None:
    model, x = Net().to(dtype).eval(), X.to(dtype)
    dynamic = DynamicQuantizer().quantize(model, example_inputs=x)
    assert output_snr(reference()["logits"], dynamic(x)["logits"]) > 25
    assert "head" in {name for name, layer in dynamic.named_modules() if "DynamicLinear" in type(layer).__name__}
    quantizer = QATQuantizer()
    prepared = quantizer.prepare(model.train(), x)
    prepared(x)["logits"].float().square().mean().backward()
    assert prepared.get_parameter("first.weight").grad is not None
    quantized = quantizer.convert(prepared.eval())
    assert coverage(quantized).mac_share == 1.0 and quantized(x)["logits"].dtype == dtype
    half = PTQQuantizer(dtype="fp16", progress=False).quantize(model.eval(), [x])
    assert half(x)["logits"].dtype == dtype


def test_a_float32_model_stays_as_it_is_and_a_container_is_said() -> None:
    same = PassManager(["cast-single"]).run(Net().eval(), X)
    assert torch.equal(same(X)["logits"], Net().eval()(X)["logits"])
    manager = PassManager(["cast-single"])
    found: Any = manager.run(nn.Sequential(nn.Linear(4, 4)).double())
    assert found.get_parameter("0.weight").dtype == torch.float64
    assert any("is not known" in remark.reason for remark in manager.ledger.remarks("cast-single"))


def test_a_bfloat16_model_is_exported(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = Net().bfloat16().eval(), X.bfloat16()
    quantized = PTQQuantizer(backend="onnxruntime", num_calibration_batches=1, progress=False).quantize(model, [x])
    fxcompress.export_onnx(quantized, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    given = session.get_inputs()
    assert [value.type for value in given] == ["tensor(float)"]
    results = session.run(None, {given[0].name: x.float().numpy()})
    assert output_snr(quantized(x)["logits"].float(), torch.from_numpy(results[0])) > 25
