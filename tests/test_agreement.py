"""What a backend computes is held against the graph when it is lowered, and the ledger says how near it is."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress import DynamicQuantizer, PTQQuantizer, backends, coverage
from fxcompress.backends import kernel_calls
from fxcompress.backends.dynamic import DynamicLinear
from fxcompress.graph.results import output_snr

X = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.head((x + self.second(x)).mean((2, 3)))


def quantized(backend: str = "fbgemm", model: nn.Module | None = None) -> tuple[Any, list[str]]:
    quantizer = PTQQuantizer(backend=backend, num_calibration_batches=1, progress=False)
    result = quantizer.quantize((model or Residual()).eval(), [X])
    return result, [remark.reason for remark in quantizer.ledger.remarks("lower")]


@pytest.mark.parametrize("backend", ["fbgemm", "qnnpack", "onnxruntime", "openvino"])
def test_the_ledger_says_how_near_the_kernels_are_to_the_graph(backend: str) -> None:
    if reason := backends.find(backend).unavailable():
        pytest.skip(reason)
    result, reasons = quantized(backend)
    said = next(reason for reason in reasons if reason.startswith(f"{backend}: "))
    with torch.no_grad():
        gap = (result(X[:2]) - result.meta["portable"](X[:2])).abs().max().item()
    if gap == 0:
        assert "bit for bit" in said
    else:
        number = re.search(r"differ from the graph's by (\S+) at most", said)
        assert number is not None and float(number[1]) == pytest.approx(gap, rel=0.01)
    assert ("of the levels of its 5 kernels" in said) == (backend in ("fbgemm", "qnnpack"))


def test_an_operator_whose_kernel_computes_something_else_runs_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = quantized()[0].meta["portable"](X)
    monkeypatch.setitem(kernel_calls.KERNELS, "add", kernel_calls._mul)
    result, reasons = quantized()
    assert any("kernel's levels are off by up to" in reason and "runs in float" in reason for reason in reasons)
    assert output_snr(expected, result(X)) > 40
    assert "add" in {row.node for row in coverage(result).floats}
    assert coverage(result).mac_share == 1.0


def test_a_kernel_with_a_float_result_is_held_against_the_graph_too(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = DynamicLinear.forward
    monkeypatch.setattr(DynamicLinear, "forward", lambda self, input: 2 * forward(self, input))
    quantizer = DynamicQuantizer()
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU()).eval()
    result = quantizer.quantize(model, example_inputs=X)
    assert any("agrees with the graph to" in remark.reason for remark in quantizer.ledger.remarks("lower"))
    assert output_snr(model(X), result(X)) > 30


def test_a_kernel_may_be_one_step_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def nearly(to: Any, call: Any, scale: Any, zero_point: Any) -> Any:
        made = kernel_calls._add(to, call, scale, zero_point)
        return to.call(shifted, made)

    def shifted(x: Tensor) -> Tensor:
        levels = (x.int_repr().to(torch.int16) + 1).clamp(max=255).to(torch.uint8)
        return torch._make_per_tensor_quantized_tensor(levels, x.q_scale(), x.q_zero_point())

    monkeypatch.setitem(kernel_calls.KERNELS, "add", nearly)
    result, reasons = quantized()
    assert not any("runs in float" in reason for reason in reasons)
    assert output_snr(result.meta["portable"](X), result(X)) > 20


def test_a_model_bound_to_its_number_of_samples_is_held_against_the_graph() -> None:
    class Bound(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).reshape(4, 5)

    _, reasons = quantized(model=Bound())
    assert any("kernels" in reason for reason in reasons)
