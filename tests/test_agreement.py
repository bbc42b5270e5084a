"""What a backend computes is held against the graph when it is lowered, and the ledger says how near it is."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress import DynamicQuantizer, PTQQuantizer, backends, coverage
from fxcompress.backends import agreement, flat, kernel_calls, onnxruntime
from fxcompress.backends.dynamic import DynamicLinear
from fxcompress.backends.engine import lower_to
from fxcompress.errors import BackendError
from fxcompress.graph.results import output_snr

RUNTIMES = ["onnxruntime", "openvino"]
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
    assert gap < 1e-3 or backend != "openvino" or "of the levels of its 5 rounded tensors, none are" in said


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


class Deep(nn.Module):
    """Layers one behind the other, and one pooling in the middle of them whose share in the results is small."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.pool = nn.Conv2d(3, 16, 3, padding=1), nn.AvgPool2d(3, 1, 1)
        self.layers = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + 0.5 * self.pool(x)
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_layer_that_an_engine_computes_wrongly_is_named_though_the_results_are_near(
    runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(runtime)
    monkeypatch.setattr(flat, "_OTHERWISE", ((lambda node: node.name == "pool", without_counting),))
    seen: list[float] = []
    judge = agreement.engine_agreement

    def judged(*given: Any) -> Any:
        made = judge(*given)
        seen.append(made.snr)
        return made

    monkeypatch.setattr(agreement, "engine_agreement", judged)
    with pytest.raises(BackendError, match=r"% of the levels are off by up to \d+ steps at 'pool' \(avg_pool2d\)"):
        quantized(runtime, Deep())
    assert seen[0] > 15


def without_counting(graph: Any, node: Any, values: dict[Any, Any]) -> Any:
    return graph.call_function(nn.functional.avg_pool2d, (values[node.args[0]], 3, 1, 1, False, False))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_deep_network_that_an_engine_computes_rightly_is_taken(runtime: str) -> None:
    pytest.importorskip(runtime)
    result, _ = quantized(runtime, Deep())
    assert output_snr(result.meta["portable"](X), result(X)) > 20


def test_an_engine_that_is_wrong_only_where_it_fuses_is_refused() -> None:
    """With its levels as outputs it computes what the graph says; its results alone tell that it does not without."""

    def fusing(model: bytes, threads: int) -> Any:
        session = onnxruntime.onnxruntime(model, threads)
        return lambda tensors: [
            found * (1.1 if len(results) == 1 else 1) for results in [session(tensors)] for found in results
        ]

    broken = replace(backends.find("onnxruntime"), lower=lower_to(fusing))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.BACKENDS, "onnxruntime", broken)
        with pytest.raises(BackendError, match=r"results agree to 2\d\.\d dB, and levels one step off explain 3\d"):
            quantized("onnxruntime")


class Wild(nn.Module):
    """Rounding its first layer in another order moves its second layer's input by a whole period."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sin(1e6 * torch.exp(self.first(x))))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_the_graph_itself_multiplies_is_no_fault_of_an_engine(runtime: str) -> None:
    pytest.importorskip(runtime)
    result, _ = quantized(runtime, Wild())
    assert output_snr(result.meta["portable"](X), result(X)) < 30
