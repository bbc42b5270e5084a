"""Every operator that any backend runs in integers, against its arithmetic in float64 over the same integers.

Truth: dequantize the operands' levels in float64, apply the operator's formula (written out, or torch's own operator in
float64), quantize the result in float64. The quantize/dequantize graph and what it is lowered to must hit the same level or
a neighbour for at least 99.9 % of values, on every backend that is here. Means that fall midway between two levels are where
they differ: kernels sum integers and round such halves to even, as float64 does; float32 does not hold them exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress import PassManager, backends
from fxcompress.graph import ops, qdq
from fxcompress.graph.fused import GEOMETRY

Array = np.ndarray
IMAGE, SIGNAL, VOLUME, ROWS = (8, 16, 8, 8), (16, 16, 16), (4, 16, 6, 8, 8), (32, 24)


@dataclass(frozen=True)
class Case:
    """An operator on one or two computed values, its formula over arrays, the shape they have, and how large they are."""

    operator: Callable[..., Any]
    formula: Callable[..., Any]
    shape: tuple[int, ...] = IMAGE
    size: float = 1.0


def windows(a: Array, size: int) -> Array:
    """``[..., H, W]`` cut into windows: ``[..., H / size, W / size, size·size]``."""
    *rest, h, w = a.shape
    cut = a.reshape(*rest, h // size, size, w // size, size)
    return np.moveaxis(cut, -3, -2).reshape(*rest, h // size, w // size, size * size)


def cubes(a: Array) -> Array:
    n, c, d, h, w = a.shape
    return a.reshape(n, c, d // 2, 2, h // 2, 2, w // 2, 2)


def enlarged(a: Array) -> Array:
    """Bilinear, twice as large, half-pixel centres: weights of 3/4 and 1/4, edges repeated."""
    for axis in (2, 3):
        before = np.concatenate([a.take([0], axis), a.take(range(a.shape[axis] - 1), axis)], axis)
        after = np.concatenate([a.take(range(1, a.shape[axis]), axis), a.take([-1], axis)], axis)
        a = np.stack([0.75 * a + 0.25 * before, 0.75 * a + 0.25 * after], axis + 1)
        a = a.reshape(*a.shape[:axis], -1, *a.shape[axis + 2 :])
    return a


def normalised(part: nn.Module, a: Array) -> Array:
    norm: Any = part.norm
    mean, variance, weight, bias = (
        t.detach().double().numpy()[:, None, None] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return (a - mean) / np.sqrt(variance + norm.eps) * weight + bias


class Norm(nn.Module):
    """Batch normalisation that no layer stands before."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        with torch.no_grad():
            for tensor in (self.norm.running_mean, self.norm.weight, self.norm.bias):
                tensor.normal_()  # type: ignore[union-attr]
            self.norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(2, 3))


torch.manual_seed(0)
NORM = Norm().eval()
aten = torch.ops.aten

CASES: dict[str, Case] = {
    "add": Case(lambda a, b: a + b, lambda a, b: a + b),
    "add, relu": Case(lambda a, b: F.relu(a + b), lambda a, b: np.maximum(a + b, 0)),
    "mul": Case(lambda a, b: a * b, lambda a, b: a * b),
    "cat": Case(lambda a, b: torch.cat([a, b], 1), lambda a, b: np.concatenate([a, b], 1)),
    "batch_norm": Case(NORM, lambda a: normalised(NORM, a)),
    "relu": Case(lambda a, b: F.relu(a.flatten(1)), lambda a: np.maximum(a, 0)),
    "relu6": Case(lambda a, b: F.relu6(a.flatten(1)), lambda a: np.clip(a, 0, 6), size=12),
    "hardtanh": Case(lambda a, b: F.hardtanh(a, -0.5, 0.75), lambda a: np.clip(a, -0.5, 0.75)),
    "clamp": Case(lambda a, b: torch.clamp(a, -0.25, 0.5), lambda a: np.clip(a, -0.25, 0.5)),
    "hardswish": Case(lambda a, b: F.hardswish(a), lambda a: a * np.clip(a + 3, 0, 6) / 6, size=4),
    "leaky_relu": Case(lambda a, b: F.leaky_relu(a, 0.2), lambda a: np.where(a > 0, a, 0.2 * a)),
    "elu": Case(lambda a, b: F.elu(a, 0.7), lambda a: np.where(a > 0, a, 0.7 * (np.exp(np.minimum(a, 0)) - 1))),
    "hardsigmoid": Case(lambda a, b: F.hardsigmoid(a), lambda a: np.clip(a + 3, 0, 6) / 6, size=4),
    "sigmoid": Case(lambda a, b: torch.sigmoid(a), lambda a: 1 / (1 + np.exp(-a)), size=4),
    "tanh": Case(lambda a, b: torch.tanh(a), np.tanh, size=2),
    "max_pool2d": Case(lambda a, b: F.max_pool2d(a, 2), lambda a: windows(a, 2).max(-1)),
    "max_pool2d, overlapping": Case(
        lambda a, b: F.max_pool2d(a, 3, 1, 1), lambda a: F.max_pool2d(torch.from_numpy(a), 3, 1, 1).numpy()
    ),
    "avg_pool2d": Case(lambda a, b: F.avg_pool2d(a, 2), lambda a: windows(a, 2).mean(-1)),
    "adaptive_avg_pool2d": Case(lambda a, b: F.adaptive_avg_pool2d(a, 2), lambda a: windows(a, 4).mean(-1)),
    "avg_pool3d": Case(lambda a, b: F.avg_pool3d(a, 2), lambda a: cubes(a).mean((3, 5, 7)), VOLUME),
    "adaptive_avg_pool3d": Case(
        lambda a, b: F.adaptive_avg_pool3d(a, 1), lambda a: a.mean((2, 3, 4), keepdims=True), VOLUME
    ),
    "interpolate": Case(lambda a, b: F.interpolate(a, scale_factor=2.0), lambda a: a.repeat(2, 2).repeat(2, 3)),
    "interpolate, bilinear": Case(
        lambda a, b: F.interpolate(a, scale_factor=2.0, mode="bilinear", align_corners=False), enlarged
    ),
    "mean": Case(lambda a, b: a.mean((2, 3)), lambda a: a.mean((2, 3))),
    "getitem": Case(lambda a, b: a[:, 1:, ::2], lambda a: a[:, 1:, ::2]),
    "chunk": Case(lambda a, b: a.chunk(2, 1)[1], lambda a: a[:, 2:]),
    "split": Case(lambda a, b: torch.split(a, [1, 3], 1)[1], lambda a: a[:, 1:]),
    "unbind": Case(lambda a, b: a.unbind(1)[2], lambda a: a[:, 2]),
    "flatten": Case(lambda a, b: a.flatten(1), lambda a: a.reshape(len(a), -1)),
    "unflatten": Case(lambda a, b: a.unflatten(1, (2, 2)), lambda a: a.reshape(len(a), 2, 2, *a.shape[2:])),
    "reshape": Case(lambda a, b: a.reshape(-1, 32, 8), lambda a: a.reshape(-1, 32, 8)),
    "permute": Case(lambda a, b: a.permute(0, 2, 3, 1), lambda a: a.transpose(0, 2, 3, 1)),
    "transpose": Case(lambda a, b: a.transpose(1, 3), lambda a: a.swapaxes(1, 3)),
    "squeeze": Case(lambda a, b: a[:, :1].squeeze(1), lambda a: a[:, 0]),
    "unsqueeze": Case(lambda a, b: a.unsqueeze(2), lambda a: a[:, :, None]),
    "slice": Case(lambda a, b: aten.slice.Tensor(a, 2, 1, 7, 2), lambda a: a[:, :, 1:7:2]),
    "select": Case(lambda a, b: aten.select.int(a, 1, 2), lambda a: a[:, 2]),
    "narrow": Case(lambda a, b: torch.narrow(a, 2, 1, 4), lambda a: a[:, :, 1:5]),
    "identity": Case(lambda a, b: a.contiguous(), lambda a: a),
    "dropout": Case(lambda a, b: F.dropout(a, 0.5, False), lambda a: a),
    "matmul": Case(
        lambda a, b: a.reshape(32, 64) @ b.reshape(32, 64).transpose(0, 1), lambda a, b: np.einsum("ij,jk->ik", a, b)
    ),
}
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(24, 20), ROWS),
    "linear, relu": (nn.Sequential(nn.Linear(24, 20), nn.ReLU()), ROWS),
    "conv1d": (nn.Conv1d(16, 16, 3, padding=1, stride=2), SIGNAL),
    "conv2d": (nn.Conv2d(16, 16, 3, padding=1), IMAGE),
    "conv2d, relu": (nn.Sequential(nn.Conv2d(16, 16, (1, 3), padding=(0, 1)), nn.ReLU()), IMAGE),
    "conv2d, relu6": (nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU6()), IMAGE),
    "conv2d, grouped": (nn.Conv2d(16, 16, 3, groups=2, dilation=2), IMAGE),
    "conv2d, depthwise": (nn.Conv2d(16, 32, 3, groups=16, stride=2, padding=1), IMAGE),
    "conv3d": (nn.Conv3d(16, 16, 2), VOLUME),
    "conv_transpose1d": (nn.ConvTranspose1d(16, 16, 3, stride=2), SIGNAL),
    "conv_transpose2d": (nn.ConvTranspose2d(16, 16, 3, stride=2, padding=1), IMAGE),
    "conv_transpose2d, padded": (nn.ConvTranspose2d(16, 6, 3, stride=2, padding=1, output_padding=1), IMAGE),
}
NAMES = [*CASES, *LAYERS]
KERNELS = ("fbgemm", "qnnpack", "onnxruntime", "openvino")
BACKENDS = (*KERNELS, "tensorrt")


class Branch(nn.Module):
    """An operator on the results of two layers that pick channels out: no sum of theirs is in doubt between two levels."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        make = {4: nn.Conv2d, 5: nn.Conv3d}[len(case.shape)]
        self.left, self.right = (make(case.shape[1], 4, 1, bias=False) for _ in range(2))
        for first, layer in enumerate((self.left, self.right)):
            layer.weight.data.zero_()
            for channel in range(4):
                layer.weight.data[channel, 4 * first + channel] = case.size

    def forward(self, x: Tensor) -> Any:
        if isinstance(self.case.operator, nn.Module):
            return self.case.operator(self.left(x))
        return self.case.operator(self.left(x), self.right(x))


class Everything(nn.Module):
    """All branches at once, so that an engine is built once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        branches = {name: Branch(case) for name, case in CASES.items()}
        self.parts = nn.ModuleList([*branches.values(), *(layer for layer, _ in LAYERS.values())])
        for part in self.parts[len(CASES) :]:
            for layer in part.modules():
                if getattr(layer, "bias", None) is not None:
                    layer.bias.data.normal_()  # type: ignore[union-attr, operator]

    def forward(self, image: Tensor, signal: Tensor, volume: Tensor, rows: Tensor) -> dict[str, Any]:
        by_shape = {IMAGE: image, SIGNAL: signal, VOLUME: volume, ROWS: rows}
        shapes = [*(case.shape for case in CASES.values()), *(shape for _, shape in LAYERS.values())]
        return {name: part(by_shape[shape]) for name, part, shape in zip(NAMES, self.parts, shapes, strict=True)}


def inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(shape, generator=generator) for shape in (IMAGE, SIGNAL, VOLUME, ROWS))


@dataclass(frozen=True)
class Quantized:
    """A quantize/dequantize graph, every value it computes, and what its lowering gives (None: no kernels)."""

    graph: Any
    values: dict[str, Any]
    lowered: dict[str, Tensor] | None


@functools.cache
def quantized(backend: str) -> Quantized:
    reason = backends.find(backend).unavailable()
    if reason and backend != "tensorrt":
        pytest.skip(reason)
    plan: list[Any] = [
        "fuse-activations",
        {"insert-observers": {"calibrator": "minmax", "backend": backend}},
        "calibrate",
        "fold-quantization",
    ]
    batch = dict(zip(("image", "signal", "volume", "rows"), inputs(), strict=True))
    manager = PassManager(plan, verify=False, reproducer=False, progress=False)
    graph = manager.run(Everything().eval(), batch, [batch])
    values: dict[str, Any] = {}

    class Keep(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            values[n.name] = super().run_node(n)
            return values[n.name]

    with torch.no_grad():
        Keep(graph).run(*inputs())
        lowered = None
        if backend in KERNELS:
            lowered = PassManager(["lower"], verify=False, reproducer=False).run(graph, batch)(**batch)
    return Quantized(graph, values, lowered)


def result_of(graph: Any, name: str) -> torch.fx.Node:
    return next(node for node in graph.graph.nodes if node.op == "output").args[0][name]


def operator_of(result: torch.fx.Node) -> torch.fx.Node:
    """The operator behind the quantize and dequantize of a result."""
    while result.target in (qdq.dequantize, qdq.quantize):
        result = result.args[0]  # type: ignore[assignment]
    return result


def integer_result(backend: str, name: str) -> tuple[Quantized, torch.fx.Node, torch.fx.Node]:
    """What was quantized, the result of a branch, and its operator; skips what the backend leaves in float."""
    found = quantized(backend)
    result = result_of(found.graph, name)
    node = operator_of(result)
    if not node.meta.get("integer"):
        assert node.meta.get("float"), f"{name} is in float, and nothing says why"
        pytest.skip(f"{backend}: {node.meta['float']}")
    return found, result, node


def real(node: torch.fx.Node, values: dict[str, Any]) -> Array:
    """(q − z)·s in float64, from the integers behind a dequantize; along a channel axis where there are several scales."""
    levels, scale, third = node.args[:3]
    assert isinstance(levels, torch.fx.Node)
    integers = values[levels.name].numpy().astype(np.float64)
    if node.target is qdq.dequantize:
        return (integers - third) * float(scale)  # type: ignore[arg-type]
    assert isinstance(scale, torch.fx.Node)
    along = [-1 if axis == third else 1 for axis in range(integers.ndim)]
    fourth = node.args[3] if len(node.args) > 3 else None
    zeros = values[fourth.name].double().numpy().reshape(along) if isinstance(fourth, torch.fx.Node) else 0.0
    return (integers - zeros) * values[scale.name].double().numpy().reshape(along)


def operands(node: torch.fx.Node, values: dict[str, Any]) -> list[Array]:
    """The real values of what an operator reads, through the parts of a tuple or a list."""
    parts = ops.kind(node) == "getitem" and not isinstance(values[node.all_input_nodes[0].name], Tensor)
    reading = (node.all_input_nodes[0] if parts else node).all_input_nodes
    quantized = (qdq.dequantize, qdq.dequantize_per_channel)
    return [
        real(n, values) if n.target in quantized else values[n.name].double().numpy() for n in reading if n.op != "get_attr"
    ]


def on_grid(exact: Array, quantize: torch.fx.Node) -> Array:
    """round(x / s) + z, clamped, as a real number again; halves to even."""
    scale, zero_point, low, high = (float(value) for value in quantize.args[1:5])  # type: ignore[arg-type]
    return (np.clip(np.round(exact / scale) + zero_point, low, high) - zero_point) * scale


def assert_agrees(found: Tensor, exact: Array, result: torch.fx.Node) -> None:
    """The same level or a neighbour for 99.9 % of values; float results to float32's own rounding."""
    value = found.detach().numpy().astype(np.float64)
    assert value.shape == exact.shape
    if result.target is not qdq.dequantize:
        np.testing.assert_allclose(value, exact, atol=1e-5 * max(np.abs(exact).max(), 1.0))
        return
    quantize = result.args[0]
    assert isinstance(quantize, torch.fx.Node)
    gap = np.abs(value - on_grid(exact, quantize)) / float(quantize.args[1])  # type: ignore[arg-type]
    assert (gap <= 1.001).mean() >= 0.999


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_an_operator_computes_its_formula_over_the_integers(name: str, backend: str) -> None:
    found, result, node = integer_result(backend, name)
    exact = CASES[name].formula(*operands(node, found.values))
    assert_agrees(found.values[result.name], exact, result)
    if found.lowered is not None:
        assert_agrees(found.lowered[name], exact, result)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_sums_integer_products(name: str, backend: str) -> None:
    found, result, node = integer_result(backend, name)
    call = ops.read(node)
    assert call is not None
    value, weight = (torch.from_numpy(array) for array in operands(node, found.values))
    bias = found.values[call.arguments["bias"].name] if isinstance(call["bias"], torch.fx.Node) else None
    stored = bias if bias is not None else found.graph.get_parameter(call["bias"].name)
    layer = LAYERS[name][0][0] if isinstance(LAYERS[name][0], nn.Sequential) else LAYERS[name][0]  # type: ignore[index]
    function: Any = getattr(F, call.kind)
    exact = function(value, weight, stored.detach().double(), *(getattr(layer, n) for n in GEOMETRY[call.kind])).numpy()
    exact = np.maximum(exact, 0) if "relu" in name else exact
    exact = np.minimum(exact, 6) if "relu6" in name else exact
    assert_agrees(found.values[result.name], exact, result)
    if found.lowered is not None:
        assert_agrees(found.lowered[name], exact, result)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_operator_of_a_backend_s_table_is_held_against_float64(backend: str) -> None:
    """A rule that is added to a table needs a case here: each kind must have run in integers in some branch."""
    found = quantized(backend)
    tried = [operator_of(result_of(found.graph, name)) for name in NAMES]
    tried += [node.all_input_nodes[0] for node in tried if ops.kind(node) == "getitem"]
    covered = {ops.kind(node) for node in tried if node.meta.get("integer")}
    assert covered == set(backends.find(backend).rules)
