"""Where TensorRT wants quantize and dequantize nodes: its recommendations, read off the ONNX that it would be given."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress import PTQQuantizer, coverage, export_onnx
from fxcompress.graph import ops

onnx = pytest.importorskip("onnx")
np = pytest.importorskip("numpy")


def quantized(model: nn.Module, *inputs: Tensor) -> Any:
    torch.manual_seed(0)
    quantizer = PTQQuantizer("tensorrt", num_calibration_batches=1, progress=False)
    batch = inputs[0] if len(inputs) == 1 else dict(zip(("x", "y"), inputs, strict=True))
    return quantizer.quantize(model.eval(), [batch])


class Written:
    """An exported graph: who makes each value, who reads it, what is stored."""

    def __init__(self, model: Any, path: Path) -> None:
        self.graph = onnx.load(export_onnx(model, path / "model.onnx")).graph
        self.stored = {i.name: onnx.numpy_helper.to_array(i) for i in self.graph.initializer}
        self.makers = {name: node for node in self.graph.node for name in node.output}

    def all(self, *kinds: str) -> list[Any]:
        return [node for node in self.graph.node if node.op_type in kinds]

    def inputs(self, node: Any) -> list[str]:
        """The kinds of operators that make what a node reads, stored values left out."""
        return [
            self.makers[name].op_type if name in self.makers else "input" for name in node.input if name not in self.stored
        ]

    def readers(self, node: Any) -> list[str]:
        return [other.op_type for other in self.graph.node if set(node.output) & set(other.input)]

    def scale(self, node: Any) -> float:
        return float(self.stored[node.input[1]])


class Block(nn.Module):
    """A residual block; ``shortcut`` makes its shortcut a layer, ``first`` writes the shortcut on the left of the sum."""

    def __init__(self, shortcut: bool = False, first: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.one, self.two = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.short = nn.Conv2d(16, 16, 1) if shortcut else nn.Identity()
        self.tail, self.first = nn.Conv2d(16, 16, 1), first

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        branch, short = self.two(F.relu(self.one(x))), self.short(x)
        total = short + branch if self.first else branch + short
        return self.tail(F.relu(total))


class Parts(nn.Module):
    """Concatenation, both poolings, a transposed convolution and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Conv2d(3, 16, 3, padding=1) for _ in range(2))
        self.join, self.up = nn.Conv2d(32, 32, 1), nn.ConvTranspose2d(32, 16, 2, 2)
        self.after, self.last, self.head = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1), nn.Linear(16, 16)
        with torch.no_grad():
            self.right.weight.mul_(10)

    def forward(self, x: Tensor) -> Tensor:
        joined = self.join(torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1))
        pooled = self.up(F.max_pool2d(F.relu(joined), 2))
        pooled = self.last(F.avg_pool2d(F.relu(self.after(pooled)), 2))
        return self.head(F.adaptive_avg_pool2d(pooled, 1).flatten(1))


IMAGE = (4, 3, 8, 8)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(quantized(Parts(), torch.randn(IMAGE)), tmp_path_factory.mktemp("parts"))


def test_every_input_of_a_weighted_operator_is_quantized_and_biases_are_not(parts: Written) -> None:
    weighted = parts.all("Conv", "ConvTranspose", "Gemm", "MatMul")
    assert len(weighted) == 7
    for node in weighted:
        assert parts.inputs(node)[:2] == ["DequantizeLinear"] * 2
        assert all(parts.stored[name].dtype == np.float16 for name in node.input[2:])


def test_scales_are_positive_and_float16_but_between_integers_joined_zero_points_zero_and_levels_int8(
    parts: Written,
) -> None:
    for node in parts.all("QuantizeLinear", "DequantizeLinear"):
        scale, zero = parts.stored[node.input[1]], parts.stored[node.input[2]]
        assert (scale > 0).all() and zero.dtype == np.int8 and not zero.any()
        if node.op_type == "DequantizeLinear":
            assert scale.dtype == (np.float32 if parts.readers(node) == ["Concat"] else np.float16)
    assert not {"Clip", "DynamicQuantizeLinear", "QLinearConv"} & {node.op_type for node in parts.graph.node}


def test_only_weights_have_a_scale_per_channel_and_transposed_convolutions_one_in_all(parts: Written) -> None:
    sizes = {"Conv": {16, 32}, "ConvTranspose": {1}, "Gemm": {16}, "MatMul": {16}}
    for node in parts.all(*sizes):
        value, weight = (parts.makers[name] for name in node.input[:2])
        assert parts.stored[value.input[1]].size == 1
        assert parts.stored[weight.input[1]].size in sizes[node.op_type]


def test_nothing_is_cast_between_a_dequantize_and_its_reader(parts: Written) -> None:
    assert all("Cast" not in parts.readers(node) for node in parts.all("DequantizeLinear"))


def test_a_value_is_quantized_once_whoever_reads_it(parts: Written) -> None:
    sources = Counter(node.input[0] for node in parts.all("QuantizeLinear"))
    assert set(sources.values()) == {1}


def test_a_concatenation_has_its_operands_and_its_result_on_one_scale(parts: Written) -> None:
    (cat,) = (node for node in parts.all("Concat") if parts.inputs(node) == ["DequantizeLinear"] * 2)
    scales = {parts.scale(parts.makers[name]) for name in cat.input}
    after = [node for node in parts.all("QuantizeLinear") if node.input[0] == cat.output[0]]
    assert len(after) == 1 and scales == {parts.scale(after[0])}


def test_poolings_have_integers_on_both_sides(parts: Written) -> None:
    pools = parts.all("MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean")
    assert len(pools) == 3
    for node in pools:
        assert parts.inputs(node)[0] == "DequantizeLinear"
        if "Average" in node.op_type or "Mean" in node.op_type:
            assert parts.readers(node) == ["QuantizeLinear"]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("shortcut", [False, True])
def test_a_sum_has_its_shortcut_quantized_and_its_branch_left_to_the_kernel(
    shortcut: bool, first: bool, tmp_path: Path
) -> None:
    """Of two layers that are added, the one with more layers before it is the branch."""
    written = Written(quantized(Block(shortcut, first), torch.randn(IMAGE)), tmp_path)
    (add,) = written.all("Add")
    assert sorted(written.inputs(add)) == ["Conv", "DequantizeLinear"]
    branch = next(written.makers[name] for name in add.input if written.makers[name].op_type == "Conv")
    weight = written.stored[written.makers[branch.input[1]].input[0]]
    assert weight.shape[-1] == 3
    relu = [node for node in written.all("Relu") if add.output[0] in node.input]
    assert len(relu) == 1 and written.readers(relu[0]) == ["QuantizeLinear"]


def test_adding_an_input_or_a_constant_is_left_alone() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x) + x) + 1.0

    model = quantized(Adds(), torch.randn(2, 16, 8, 8))
    reasons = [row.reason for row in coverage(model).floats if row.kind == "add"]
    assert len(reasons) == 2
    assert "the model's input 'x' is added" in reasons[0] and "constant" in reasons[1]


@pytest.mark.parametrize(
    ("layer", "fits"),
    [
        (nn.Conv2d(16, 20, (1, 3)), True),  # from 16 channels on, anything
        (nn.Conv2d(20, 18, 3), True),
        (nn.Conv2d(3, 16, 3), True),  # few channels on one side, a square kernel, eights on the other
        (nn.Conv2d(3, 16, (1, 3)), False),
        (nn.Conv2d(3, 20, 3), False),
        (nn.Conv2d(16, 3, 1), True),
        (nn.Conv2d(3, 8, 3), True),  # the first layer
        (nn.Conv2d(32, 32, 3, groups=32), True),  # groups: outputs by eights and a kernel of three
        (nn.Conv2d(32, 32, 1, groups=32), False),
        (nn.Conv2d(12, 12, 3, groups=12), False),
        (nn.Conv2d(64, 64, 1, groups=4), True),  # 16 channels in a group
    ],
)
def test_convolutions_run_in_integers_where_tensorrt_is_fast(layer: nn.Conv2d, fits: bool) -> None:
    model = quantized(nn.Sequential(layer), torch.randn(2, layer.in_channels, 8, 8))
    node = next(node for node in model.graph.nodes if ops.kind(node) == "conv2d")
    assert bool(node.meta.get("integer")) is fits
    assert fits or "no fast int8 kernel" in node.meta["float"]


def test_a_narrow_convolution_behind_another_layer_stays_in_float() -> None:
    model = quantized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), torch.randn(IMAGE))
    assert [bool(n.meta.get("integer")) for n in model.graph.nodes if ops.kind(n) == "conv2d"] == [True, False]


@pytest.mark.parametrize(("features", "fits"), [((16, 16), True), ((15, 64), False), ((64, 10), False)])
def test_linear_layers_are_left_alone_where_they_are_narrow(features: tuple[int, int], fits: bool) -> None:
    model = quantized(nn.Sequential(nn.Linear(*features)), torch.randn(32, features[0]))
    assert coverage(model).mac_share == float(fits)


@pytest.mark.parametrize(
    ("left", "right", "fits"), [((32, 16), (16, 24), True), ((1, 32), (32, 24), False), ((24, 8), (8, 24), False)]
)
def test_products_of_activations_are_left_alone_where_they_are_narrow(
    left: tuple[int, int], right: tuple[int, int], fits: bool
) -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x @ y

    model = quantized(Product(), torch.randn(left), torch.randn(right))
    assert coverage(model).mac_share == float(fits)
