"""Every operator that runs in integers, against its arithmetic written out in float64 over the same integers.

Truth: dequantize the operands' levels in float64, apply the operator's formula in float64, quantize the result in float64.
Lowered kernels must hit the same level or a neighbour for at least 99.9 % of values, on every backend that is here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress import PassManager, backends
from fxcompress.graph import qdq

Array = np.ndarray


def sigmoid(a: Array) -> Array:
    return 1 / (1 + np.exp(-a))


def windows(a: Array, size: int) -> Array:
    n, c, h, w = a.shape
    return a.reshape(n, c, h // size, size, w // size, size)


FORMULAS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Array, Array], Array]]] = {
    "add": (lambda a, b: a + b, lambda a, b: a + b),
    "add relu": (lambda a, b: F.relu(a + b), lambda a, b: np.maximum(a + b, 0)),
    "mul": (lambda a, b: a * b, lambda a, b: a * b),
    "cat": (lambda a, b: torch.cat([a, b], 1), lambda a, b: np.concatenate([a, b], 1)),
    "hardswish": (lambda a, b: F.hardswish(a), lambda a, b: a * np.clip(a + 3, 0, 6) / 6),
    "hardsigmoid": (lambda a, b: F.hardsigmoid(a), lambda a, b: np.clip(a + 3, 0, 6) / 6),
    "sigmoid": (lambda a, b: torch.sigmoid(a), lambda a, b: sigmoid(a)),
    "tanh": (lambda a, b: torch.tanh(a), lambda a, b: np.tanh(a)),
    "leaky relu": (lambda a, b: F.leaky_relu(a, 0.2), lambda a, b: np.where(a > 0, a, 0.2 * a)),
    "elu": (lambda a, b: F.elu(a, 0.7), lambda a, b: np.where(a > 0, a, 0.7 * (np.exp(np.minimum(a, 0)) - 1))),
    "max pool": (lambda a, b: F.max_pool2d(a, 2), lambda a, b: windows(a, 2).max((3, 5))),
    "avg pool": (lambda a, b: F.avg_pool2d(a, 2), lambda a, b: windows(a, 2).mean((3, 5))),
    "adaptive pool": (lambda a, b: F.adaptive_avg_pool2d(a, 1), lambda a, b: a.mean((2, 3), keepdims=True)),
    "mean": (lambda a, b: a.mean((2, 3)), lambda a, b: a.mean((2, 3))),
    "relu6": (lambda a, b: F.relu6(a * b), lambda a, b: np.clip(a * b, 0, 6)),
    "clamp": (lambda a, b: torch.clamp(a * b, -0.5, 0.75), lambda a, b: np.clip(a * b, -0.5, 0.75)),
    "nearest": (lambda a, b: F.interpolate(a, scale_factor=2.0), lambda a, b: a.repeat(2, 2).repeat(2, 3)),
    "permute": (lambda a, b: a.permute(0, 2, 3, 1), lambda a, b: a.transpose(0, 2, 3, 1)),
    "flatten": (lambda a, b: a.flatten(1), lambda a, b: a.reshape(len(a), -1)),
    "slice": (lambda a, b: a[:, 1:, ::2], lambda a, b: a[:, 1:, ::2]),
}
LAYERS: dict[str, tuple[nn.Module, Callable[[Array, Array, Array], Array]]] = {
    "pointwise": (nn.Conv2d(3, 8, 1), lambda a, w, b: np.einsum("ncij,oc->noij", a, w[..., 0, 0]) + b[:, None, None]),
    "linear": (nn.Sequential(nn.Flatten(), nn.Linear(192, 6)), lambda a, w, b: a.reshape(len(a), -1) @ w.T + b),
}
KERNELS = ["fbgemm", "qnnpack"]


class Pair(nn.Module):
    """An operator on the results of two convolutions."""

    def __init__(self, operator: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.left, self.right, self.operator = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), operator

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(self.left(x), self.right(x))


def images() -> Tensor:
    torch.manual_seed(3)
    return torch.randn(16, 3, 8, 8)


def both(model: nn.Module, backend: str) -> tuple[Any, Any]:
    if reason := backends.find(backend).unavailable():
        pytest.skip(reason)
    plan: list[Any] = [
        "fuse-activations",
        {"insert-observers": {"calibrator": "minmax", "backend": backend}},
        "calibrate",
        "fold-quantization",
    ]
    reference = PassManager(plan, reproducer=False, progress=False).run(model.eval(), images(), [images()])
    return reference, PassManager(["lower"], reproducer=False).run(reference, images())


def values_of(reference: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    class Keep(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            found[n.name] = super().run_node(n)
            return found[n.name]

    Keep(reference).run(images())
    return found


def real(node: torch.fx.Node, values: dict[str, Tensor]) -> Array:
    """(q − z)·s in float64, from the integers behind a dequantize."""
    levels, scale, zero_point = node.args[:3]
    assert isinstance(levels, torch.fx.Node)
    return (values[levels.name].numpy().astype(np.float64) - zero_point) * float(scale)  # type: ignore[arg-type, operator]


def on_grid(exact: Array, quantize: torch.fx.Node) -> Array:
    """round(x / s) + z, clamped, as a real number again; halves to even."""
    scale, zero_point, low, high = (float(value) for value in quantize.args[1:5])  # type: ignore[arg-type]
    return (np.clip(np.round(exact / scale) + zero_point, low, high) - zero_point) * scale


def quantizes(model: Any) -> list[torch.fx.Node]:
    return [node for node in model.graph.nodes if node.target is qdq.quantize]


def assert_within_one_step(found: Tensor, expected: Array, step: float) -> None:
    gap = np.abs(found.detach().numpy().astype(np.float64) - expected) / step
    assert (gap <= 1.001).mean() >= 0.999


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", FORMULAS)
def test_an_operator_computes_its_formula_over_the_integers(name: str, backend: str) -> None:
    operator, formula = FORMULAS[name]
    torch.manual_seed(0)
    reference, lowered = both(Pair(operator), backend)
    values = values_of(reference)
    last = quantizes(reference)[-1]
    sources = {n.args[0].args[0].name: n for n in reference.graph.nodes if n.target is qdq.dequantize}
    left, right = sources["left"], sources.get("right", sources["left"])  # an operator of one operand leaves no other
    expected = on_grid(formula(real(left, values), real(right, values)), last)
    step = float(last.args[1])  # type: ignore[arg-type]
    assert_within_one_step(reference(images()), expected, step)
    assert_within_one_step(lowered(images()), expected, step)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_sums_integer_products(name: str, backend: str) -> None:
    torch.manual_seed(0)
    layer, formula = LAYERS[name]
    reference, lowered = both(nn.Sequential(layer), backend)
    values = values_of(reference)
    source = next(node for node in reference.graph.nodes if node.target is qdq.dequantize)
    buffers = dict(reference.named_buffers())
    weight = next(value for key, value in buffers.items() if key.endswith("weight")).double()
    scale = next(value for key, value in buffers.items() if key.endswith("weight_scale")).double()
    bias = next(value for key, value in reference.named_parameters() if key.endswith("bias")).detach().double().numpy()
    real_weight = (weight * scale.reshape(-1, *[1] * (weight.dim() - 1))).numpy()
    exact = formula(real(source, values), real_weight, bias)
    last = quantizes(reference)[-1]
    if len(quantizes(reference)) == 1 or (name == "linear" and backend == "fbgemm"):
        np.testing.assert_allclose(lowered(images()).detach().numpy(), exact, atol=1e-4)
        return
    for found in (reference, lowered):
        assert_within_one_step(found(images()), on_grid(exact, last), float(last.args[1]))  # type: ignore[arg-type]
