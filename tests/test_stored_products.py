"""Products with stored weights, however they are spelled, are layers: quantized on every backend, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress import DynamicQuantizer, PassManager, PTQQuantizer, QATQuantizer, coverage
from fxcompress.graph import ops
from fxcompress.graph.results import output_snr


class Product(nn.Module):
    """One product of the input with ``w`` (or with ``v``, a buffer)."""

    v: Tensor

    def __init__(self, code: Callable[[Any, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.code, self.w, self.b = code, nn.Parameter(torch.randn(*shape)), nn.Parameter(torch.randn(shape[-1]))
        self.register_buffer("v", torch.randn(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, x)


CASES: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "x @ w": (lambda m, x: x @ m.w, (12, 20), (4, 7, 12)),
    "x @ w.t()": (lambda m, x: x @ m.w.t(), (20, 12), (4, 7, 12)),
    "x @ w.T": (lambda m, x: x @ m.w.T, (20, 12), (4, 12)),
    "x @ w.transpose": (lambda m, x: torch.matmul(x, m.w.transpose(0, 1)), (20, 12), (4, 7, 12)),
    "x @ scaled buffer": (lambda m, x: x.matmul(0.5 * m.v), (12, 20), (4, 7, 12)),
    "w @ x": (lambda m, x: m.w @ x, (20, 12), (4, 12, 7)),
    "w @ x, in four dimensions": (lambda m, x: torch.matmul(m.w, x), (20, 12), (4, 3, 12, 7)),
    "mm": (lambda m, x: torch.mm(x, m.w), (12, 20), (4, 12)),
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w), (12, 20), (4, 12)),
    "addmm of a value": (lambda m, x: torch.addmm(x[:, :1], x, m.w), (12, 20), (4, 12)),
    "x @ a weight for each group": (lambda m, x: x @ m.w, (3, 12, 20), (4, 3, 7, 12)),
    "a weight for each group @ x": (lambda m, x: m.w @ x, (3, 20, 12), (4, 3, 12, 7)),
    "x @ a stack of weights": (lambda m, x: x @ m.w, (3, 12, 20), (4, 12)),
    "einsum": (lambda m, x: torch.einsum("bnc,co->bno", x, m.w), (12, 20), (4, 7, 12)),
    "einsum over two": (lambda m, x: torch.einsum("bhnd,hdo -> bno", x, m.w), (3, 4, 20), (4, 3, 7, 4)),
    "einsum to two": (lambda m, x: torch.einsum("hdc,bnc->bhnd", m.w, x), (3, 4, 12), (4, 7, 12)),
    "einsum in groups": (lambda m, x: torch.einsum("bnhd,hde->bnhe", x, m.w), (3, 4, 5), (4, 7, 3, 4)),
    "einsum with dots": (lambda m, x: torch.einsum("...c,oc->...o", x, m.w), (20, 12), (4, 3, 7, 12)),
    "einsum without an arrow": (lambda m, x: torch.einsum("abz,zc", x, m.w), (12, 20), (4, 7, 12)),
    "tensordot over two": (lambda m, x: torch.tensordot(x, m.w, dims=([1, 2], [1, 0])), (5, 3, 20), (4, 3, 5)),
    "tensordot of a stored weight first": (lambda m, x: torch.tensordot(m.w, x, dims=([1], [1])), (20, 12), (4, 12)),
    "einsum with a vector": (lambda m, x: torch.einsum("bnc,c->bn", x, m.w), (12,), (4, 7, 12)),
}


def built(name: str) -> tuple[nn.Module, Tensor]:
    code, shape, given = CASES[name]
    return Product(code, *shape).eval(), torch.randn(given, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CASES)
def test_the_layer_computes_what_the_product_computes_in_float64(name: str) -> None:
    model, x = built(name)
    settled = PassManager(["settle-weights"], reproducer=False).run(model, x)
    kinds = {ops.kind(node) for node in settled.graph.nodes}
    assert kinds & {"linear", "conv1d"} and not kinds & {"matmul", "addmm", "einsum"}
    for rows in (4, 3):
        exact = model.double()(x[:rows].double())
        torch.testing.assert_close(settled(x[:rows]).double(), exact, atol=1e-5, rtol=1e-5)
        model.float()


@pytest.mark.parametrize("name", CASES)
def test_it_runs_in_integers(name: str) -> None:
    model, x = built(name)
    result = PTQQuantizer(num_calibration_batches=1, progress=False, calibration_method="minmax").quantize(model, [x])
    assert coverage(result).mac_share == 1.0
    assert output_snr(model(x), result(x)) > 25


@pytest.mark.parametrize("backend", ["qnnpack", "onnxruntime", "openvino"])
def test_it_runs_in_integers_on_every_backend(backend: str) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip(backend if backend != "qnnpack" else "torch")
    for name in ("x @ w", "w @ x", "einsum over two", "x @ a weight for each group"):
        model, x = built(name)
        result = PTQQuantizer(backend, num_calibration_batches=1, progress=False).quantize(model, [x])
        assert coverage(result).mac_share == 1.0
        assert output_snr(model(x[:3]), result(x[:3])) > 25


class OwnLayer(nn.Module):
    """Code that reads the tensors of a layer one by one; its bias is added behind another operator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(12, 20)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.inner.weight.t()).sin() + self.inner.bias


def test_a_layer_keeps_the_tensors_that_others_read() -> None:
    model, x = OwnLayer().eval(), torch.randn(64, 12)
    quantized = PTQQuantizer("fbgemm", num_calibration_batches=1, progress=False).quantize(model, [x])
    assert coverage(quantized).mac_share == 1.0
    assert output_snr(model(x), quantized(x)) > 25


def test_weights_that_are_quantized_as_the_input_comes() -> None:
    model, x = built("x @ w")
    result = DynamicQuantizer().quantize(model, example_inputs=x)
    assert coverage(result).mac_share == 1.0
    assert output_snr(model(x), result(x)) > 30


def test_they_train_rounded_and_no_checkpoint_is_taken_for_their_transpose() -> None:
    model, x = Product(lambda m, x: (x @ m.w) @ (m.v @ m.v), 12, 12), torch.randn(4, 12)
    quantizer = QATQuantizer()
    prepared = quantizer.prepare(model.train(), x)
    names = dict(prepared.named_parameters())
    assert "w" not in names and len(names) == 1
    (weight,) = names.values()
    assert torch.equal(weight, model.w.t())
    prepared(x).square().sum().backward()
    assert weight.grad is not None and bool(weight.grad.any())
    converted = quantizer.convert(prepared.eval(), x)
    assert coverage(converted).mac_share == 1.0
    assert output_snr(prepared(x), converted(x)) > 40


@pytest.mark.parametrize(
    ("code", "shape"),
    [
        (lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5), (12, 20)),  # a scaled bias
        (lambda m, x: torch.einsum("bc,co->b", x, m.w), (12, 20)),  # a sum over what the weight makes
        (lambda m, x: torch.einsum("bc,co->bo", x.mean(1, keepdim=True), m.w), (12, 20)),  # one value for every input
        (lambda m, x: x[:, None] @ m.w, (1, 12, 20)),  # a weight repeated for each sample
        (lambda m, x: x @ (m.w * x.mean()), (12, 20)),  # a weight that follows the input
    ],
)
def test_what_no_layer_computes_stays_a_product(code: Any, shape: tuple[int, ...]) -> None:
    model, x = Product(code, *shape).eval(), torch.randn(4, 12)
    settled = PassManager(["settle-weights"], reproducer=False).run(model, x)
    assert {ops.kind(node) for node in settled.graph.nodes} & {"matmul", "addmm", "einsum"}
    torch.testing.assert_close(settled(x), model(x))
