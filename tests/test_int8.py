"""int8 against arithmetic written out in float64, operator by operator, and on whole networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._dtype_abbrs import dtype_abbrs

from benchmarks.digits import accuracy, digits, trained
from fxcompress import PassManager, PTQQuantizer, StaticQuantizer, backends, coverage
from fxcompress.backends.kernels import mean_of_levels, pooled_levels
from fxcompress.errors import BackendError, ConfigError, VerificationError
from fxcompress.graph import qdq
from fxcompress.graph.results import output_snr
from fxcompress.quantization import CALIBRATORS

PLAN: list[Any] = [
    "remove-dead",
    "fold-batchnorm",
    "fuse-activations",
    {"insert-observers": {"calibrator": "minmax"}},
    "calibrate",
    "fold-quantization",
    "lower",
]


def quantized(model: nn.Module, *call: Tensor, plan: list[Any] = PLAN, data: Any = None) -> Any:
    return PassManager(plan, reproducer=False, progress=False).run(model.eval(), call, data or [call[0]])


def grid_steps(found: Tensor, expected: np.ndarray, scale: float) -> np.ndarray:
    return np.abs(found.double().numpy() - expected) / scale


class Wrap(nn.Module):
    """An operator between two convolutions, so that it is placed in integers."""

    def __init__(self, operator: Callable[..., Tensor], channels: int = 4) -> None:
        super().__init__()
        self.first, self.second, self.operator = nn.Conv2d(3, channels, 1), nn.Conv2d(3, channels, 1), operator

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(self.first(x), self.second(x))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


OPERATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda a, b: a + b,
    "add_relu": lambda a, b: F.relu(a + b),
    "mul": lambda a, b: a * b,
    "gate": lambda a, b: a * b.mean((2, 3), keepdim=True),
    "cat": lambda a, b: torch.cat([a, b], 1),
    "hardswish": lambda a, b: F.hardswish(a),
    "hardsigmoid": lambda a, b: F.hardsigmoid(a),
    "sigmoid": lambda a, b: torch.sigmoid(a),
    "tanh": lambda a, b: torch.tanh(a),
    "leaky_relu": lambda a, b: F.leaky_relu(a, 0.2),
    "elu": lambda a, b: F.elu(a),
    "relu6": lambda a, b: F.relu6(a * b),
    "max_pool": lambda a, b: F.max_pool2d(a, 3, 2, 1),
    "avg_pool": lambda a, b: F.avg_pool2d(a, 2),
    "adaptive": lambda a, b: F.adaptive_avg_pool2d(a, 1).flatten(1),
    "interpolate": lambda a, b: F.interpolate(a, scale_factor=2.0),
    "shuffle": lambda a, b: F.channel_shuffle(a, 2),
    "halves": lambda a, b: torch.cat([a.chunk(2, 1)[1], a.chunk(2, 1)[0]], 1),
    "halves at once": lambda a, b: torch.cat(a.chunk(2, 1)[::-1], 1),
    "slices": lambda a, b: a[:, 1:, ::2],
    "reshape": lambda a, b: a.view(a.shape[0], 2, -1).permute(0, 2, 1),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_kernels_agree_with_the_reference_graph(name: str) -> None:
    """At most one output step apart, for at least 99.9 % of the values."""
    torch.manual_seed(0)
    model, x = Wrap(OPERATORS[name]), torch.randn(8, 3, 16, 16)
    reference = quantized(model, x, plan=PLAN[:6])
    lowered = quantized(reference, x, plan=["lower"])
    step = max(float(n.args[1]) for n in reference.graph.nodes if n.target is qdq.quantize)
    gap = (reference(x) - lowered(x)).abs() / step
    assert (gap <= 1.001).double().mean() >= 0.999
    assert output_snr(model(x), lowered(x)) > 25


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(6, 8, 3, 2, 1, groups=2), (4, 6, 15)),
    "conv2d": (nn.Conv2d(6, 8, 3, (2, 1), (1, 2), dilation=2), (4, 6, 15, 13)),
    "depthwise": (nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), (4, 8, 9, 9)),
    "conv3d": (nn.Conv3d(3, 4, 3), (2, 3, 6, 6, 6)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), (2, 4, 7, 7)),
    "linear": (nn.Linear(12, 5), (7, 12)),
    "linear on tokens": (nn.Linear(12, 5, bias=False), (2, 7, 12)),
}


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_integer_arithmetic_written_out(name: str, relu: bool) -> None:
    """round((Σ (q − z) w · s_x s_w + b) / s_y) + z_y in float64, within one step for 99.9 % of the values.

    Where a kernel gives a float result, the sum itself, to float32's precision.
    """
    torch.manual_seed(1)
    layer, shape = LAYERS[name]
    model, x = nn.Sequential(layer, *([nn.ReLU()] if relu else [])), torch.randn(shape)
    reference = quantized(model, x, plan=PLAN[:6])
    lowered = quantized(reference, x, plan=["lower"])
    quantizes = [node for node in reference.graph.nodes if node.target is qdq.quantize]
    (scale_x, zero_x), *result = [(node.args[1], node.args[2]) for node in quantizes]
    levels = np.clip(np.round(x.double().numpy() / scale_x) + zero_x, 0, 255) - zero_x
    weight = reference.get_buffer("0.weight").double()
    scale_w = reference.get_buffer("0.weight_scale").double()
    axis = 1 if name == "transposed" else 0
    unit = [1] * weight.dim()
    unit[axis] = -1
    exact = type(layer).forward
    double = layer.double()
    with torch.no_grad():
        double.weight.copy_(weight * scale_w.reshape(unit))  # type: ignore[operator]
        y = exact(double, torch.from_numpy(levels * scale_x))
    y = y.clamp(min=0) if relu else y
    layer.float()
    assert coverage(lowered).mac_share == 1.0
    if name.startswith("linear"):
        assert not result
        np.testing.assert_allclose(lowered(x).numpy(), y.numpy(), atol=1e-5)
        return
    ((scale_y, zero_y),) = result
    expected = (np.clip(np.round(y.numpy() / scale_y) + zero_y, 0, 255) - zero_y) * scale_y
    assert (grid_steps(lowered(x), expected, scale_y) <= 1.001).mean() >= 0.999


def exact_levels(mean: Any, zero: int, own_zero: int) -> Any:
    """Where a mean of levels on a grid of scale 0.0261 lies on one of scale 0.0113, not rounded."""
    return np.clip((mean - zero) * (0.0261 / 0.0113) + own_zero, 0, 255)


@pytest.mark.parametrize("zero", [0, 127])
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize(
    ("shape", "dims"), [((16, 64, 4, 4), [2, 3]), ((1, 64, 8, 1), (-1, -2)), ((16, 8, 64), 1), ((2, 8, 3, 3), 1)]
)
def test_means_fall_on_the_nearest_level_of_their_own_grid(
    shape: tuple[int, ...], dims: Any, keepdim: bool, zero: int
) -> None:
    torch.manual_seed(0)
    levels = torch.randint(0, 256, shape, dtype=torch.uint8)
    quantized = torch._make_per_tensor_quantized_tensor(levels, 0.0261, zero)
    found = mean_of_levels(quantized, dims, keepdim, 0.0113, 91)
    axis = dims if isinstance(dims, int) else tuple(dims)
    exact = exact_levels(levels.double().numpy().mean(axis=axis, keepdims=keepdim), zero, 91)
    np.testing.assert_allclose(found.int_repr().numpy(), exact, atol=0.501)


@pytest.mark.parametrize("zero", [0, 127])
@pytest.mark.parametrize("size", [1, 2, (3, 1)])
def test_regions_are_pooled_to_the_nearest_level_of_a_grid_of_their_own(size: Any, zero: int) -> None:
    torch.manual_seed(0)
    levels = torch.randint(0, 256, (1, 16, 6, 6), dtype=torch.uint8)
    quantized = torch._make_per_tensor_quantized_tensor(levels, 0.0261, zero)
    exact = exact_levels(F.adaptive_avg_pool2d(levels.double(), size).numpy(), zero, 91)
    np.testing.assert_allclose(pooled_levels(quantized, size, 0.0113, 91).int_repr().numpy(), exact, atol=0.501)


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(1), Mean()])
@pytest.mark.parametrize("backend", ["fbgemm", "qnnpack", "onnxruntime", "openvino"])
def test_a_mean_that_uses_little_of_its_inputs_range_keeps_its_bits(backend: str, pool: nn.Module) -> None:
    if backends.find(backend).unavailable():
        pytest.skip(str(backends.find(backend).unavailable()))
    torch.manual_seed(0)
    x = torch.randn(16, 8, 20, 20) ** 5
    model = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), pool, nn.Conv2d(16, 32, 1))
    lowered = PTQQuantizer(backend=backend, calibration_method="minmax", progress=False).quantize(model, [x])
    assert coverage(lowered).mac_share == 1.0
    assert output_snr(model(x), lowered(x)) > 33


@pytest.mark.parametrize("backend", ["fbgemm", "qnnpack", "onnxruntime", "openvino"])
def test_sums_of_a_pooling_leave_the_range_of_its_input_and_do_not_saturate(backend: str) -> None:
    if backends.find(backend).unavailable():
        pytest.skip(str(backends.find(backend).unavailable()))
    torch.manual_seed(0)
    x, model = torch.randn(4, 3, 12, 13), nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AvgPool2d(2, divisor_override=1))
    assert output_snr(model(x), PTQQuantizer(backend=backend, progress=False).quantize(model, [x])(x)) > 38


@pytest.mark.parametrize("backend", ["fbgemm", "qnnpack", "onnxruntime", "openvino"])
@pytest.mark.parametrize("silent", ["channels", "input"])
def test_a_bias_is_all_that_silenced_channels_or_inputs_leave_and_it_stays(backend: str, silent: str) -> None:
    """Kernels hold a bias in units of the input's scale times the weight's, which are as fine as others' are."""
    if backends.find(backend).unavailable():
        pytest.skip(str(backends.find(backend).unavailable()))
    torch.manual_seed(0)
    first, x = nn.Conv2d(3, 8, 3), 10 * torch.randn(4, 3, 8, 8)
    if silent == "channels":
        with torch.no_grad():
            first.weight[2:].zero_()
            first.weight.mul_(0.02)
    between = nn.Identity() if silent == "channels" else nn.Threshold(1e3, 0.0)
    model = nn.Sequential(first, nn.ReLU(), between, nn.Conv2d(8, 8, 1)).eval()
    quantizer = PTQQuantizer(backend=backend, progress=False, overrides={"3": {"weight_bits": 6}})
    lowered = quantizer.quantize(model, [x])
    assert output_snr(model(x), lowered(x)) > 35
    assert not [remark for remark in quantizer.ledger.remarks("lower") if "runs in float" in remark.reason]


def test_a_lowered_graph_can_be_printed_with_its_types_and_torchs_table_of_them_is_left_alone() -> None:
    assert torch.quint8 not in dtype_abbrs
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    printed = quantized(model, torch.randn(2, 3, 8, 8)).print_readable(print_output=False)
    assert '"u8[2, 8, 6, 6]"' in printed and '"f32[2, 4]"' in printed


def test_an_operator_that_takes_what_is_stored_says_so() -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.table = nn.Conv2d(3, 8, 1), nn.Parameter(torch.randn(1, 8, 9, 9))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + F.interpolate(self.table, (6, 6))

    manager = PassManager(PLAN, reproducer=False, progress=False)
    manager.run(Sliced().eval(), torch.randn(2, 3, 6, 6), [torch.randn(2, 3, 6, 6)])
    said = [remark.reason for row in manager.ledger.rows for remark in row.remarks]
    assert "what it takes is stored, not computed" in said


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_channel_that_is_all_but_silenced_keeps_its_bias_on_qnnpack(per_channel: bool) -> None:
    """Its weights' scale is so small that the bias in units of that scale is beyond int32."""
    reason = backends.find("qnnpack").unavailable()
    if reason:
        pytest.skip(reason)
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 8, 3), torch.randn(16, 3, 12, 12)
    with torch.no_grad():
        layer.weight[0 if per_channel else slice(None)] *= 1e-8
    lowered = PTQQuantizer(backend="qnnpack", per_channel=per_channel, progress=False).quantize(nn.Sequential(layer), [x])
    assert coverage(lowered).mac_share == 1.0
    assert output_snr(layer(x), lowered(x)) > 30


def test_quantize_rounds_half_to_even_and_keeps_zero_exact() -> None:
    x = torch.tensor([-10.0, -0.75, -0.25, 0.0, 0.25, 0.75, 1.25, 1000.0])
    levels = qdq.quantize(x, 0.5, 3, 0, 255, torch.uint8)
    expected = np.clip(np.round(x.double().numpy() / 0.5) + 3, 0, 255)
    assert levels.tolist() == expected.tolist()
    assert qdq.dequantize(levels, 0.5, 3)[3] == 0.0


def test_real_digits_lose_nothing_worth_mentioning() -> None:
    model = trained()
    images, _, _, _ = digits()
    assert accuracy(model) >= 97.0
    for method in CALIBRATORS:
        result = PTQQuantizer(calibration_method=method, num_calibration_batches=20).quantize(model, list(images.split(64)))
        assert accuracy(model) - accuracy(result) <= 0.5
        assert coverage(result).mac_share >= 0.95


def small() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)), [
        torch.randn(4, 3, 8, 8) for _ in range(3)
    ]


def test_prepare_calibrate_convert_equals_quantize() -> None:
    model, batches = small()
    quantizer = StaticQuantizer(num_calibration_batches=3)
    prepared = quantizer.prepare(model, batches[0])
    assert torch.allclose(prepared(batches[0]), model.eval()(batches[0]), atol=1e-5)
    converted = quantizer.convert(quantizer.calibrate(prepared, batches))
    assert torch.equal(converted(batches[1]), quantizer.quantize(model, batches)(batches[1]))
    assert [row.step for row in quantizer.ledger.rows][-1] == "lower"


def test_a_model_in_training_mode_is_quantized_as_a_copy_in_eval_mode() -> None:
    model, batches = small()
    model.train()
    result = PTQQuantizer(num_calibration_batches=3).quantize(model, batches)
    assert model.training and not any(module.training for module in result.modules())


def test_stages_out_of_turn_are_refused() -> None:
    model, batches = small()
    quantizer = PTQQuantizer()
    with pytest.raises(ConfigError, match=r"call prepare\(model\)"):
        quantizer.calibrate(model, batches)
    with pytest.raises(ConfigError, match="is float"):
        quantizer.convert(PassManager([]).run(model, batches[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "fbgem"}, "fbgemm"),
        ({"dtype": "int9"}, "int8"),
        ({"calibration_method": "histo"}, "histogram"),
        ({"num_calibration_batches": 0}, "positive"),
        ({"calibrator_options": {"percentile": 200}}, "percentile"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        PTQQuantizer(**options)
    assert isinstance(caught.value, (ConfigError, ValueError, RuntimeError))


def test_excluded_layers_stay_in_float_and_say_so() -> None:
    model, batches = small()
    result = PTQQuantizer(num_calibration_batches=3, exclude_layers=["4"]).quantize(model, batches)
    rows = {row.node: row.reason for row in coverage(result).floats}
    assert rows == {"4": "it is excluded by name"}
    with pytest.raises(ConfigError, match="no layer is called 'fc'"):
        PTQQuantizer(exclude_layers=["fc"]).quantize(model, batches)


def test_a_share_that_is_not_reached_is_an_error_where_it_is_required() -> None:
    model, batches = small()
    plan = {"steps": [*PLAN[:3], {"insert-observers": {"exclude_layers": ["4"]}}, *PLAN[4:]], "require": {"int8_macs": 0.99}}
    with pytest.raises(VerificationError, match=r"run in integers, 99\.0% are required.*excluded"):
        PassManager(plan, reproducer=False).run(model.eval(), data=batches)


def test_a_model_on_another_device_is_refused_with_the_way_out() -> None:
    model, batches = small()
    reference = PassManager(PLAN[:6], reproducer=False).run(model.eval(), data=batches)
    with pytest.raises(BackendError, match=r"is on meta: move it with \.to\('cpu'"):
        PassManager("[lower]", reproducer=False).run(reference.to("meta"))


def test_one_value_is_quantized_once_however_many_read_it() -> None:
    class Fan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y) + self.c(y) + y

    x = torch.randn(1, 3, 4, 4)
    reference = quantized(Fan(), x, plan=PLAN[:6])
    quantizes = [node for node in reference.graph.nodes if node.target is qdq.quantize]
    assert len(quantizes) == len({node.args[0] for node in quantizes}) == 6
    lowered = quantized(reference, x, plan=["lower"])
    assert coverage(lowered).boundaries == 2


def test_a_branch_that_no_batch_reached_stays_in_float() -> None:
    model, batches = small()
    prepared = PTQQuantizer(num_calibration_batches=3).prepare(model, batches[0])
    PTQQuantizer(num_calibration_batches=3).calibrate(prepared, batches)
    observer = next(m for name, m in prepared.named_modules() if name.startswith("observers.") and m._modules == {})
    observer.calibrator.reset()  # type: ignore[union-attr, operator]
    result = PTQQuantizer().convert(prepared)
    assert any("no calibration batch reached it" in row.reason for row in coverage(result).floats)
    assert torch.isfinite(result(batches[0])).all()
