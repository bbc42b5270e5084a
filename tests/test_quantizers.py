"""Quantizers: overrides, affine weights, what layer options reach, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress import DynamicQuantizer, LSQQuantizer, PassManager, PTQQuantizer, QATQuantizer, coverage
from fxcompress.errors import ConfigError
from fxcompress.graph import qdq
from fxcompress.graph.results import output_snr
from fxcompress.quantization import build_calibrator
from fxcompress.quantization.observer import Backlog, observers
from fxcompress.quantization.weights import quantize_weight

OBSERVED = ["remove-dead", "fold-batchnorm", "fuse-activations"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(F.relu(self.stem(x))).mean((2, 3)))


def net() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return Net().eval(), [torch.randn(8, 3, 12, 12) for _ in range(2)]


def portable(model: nn.Module, batches: list[Tensor], **options: Any) -> Any:
    quantizer = PTQQuantizer(**{"num_calibration_batches": 2, "progress": False, **options})
    prepared = quantizer.calibrate(quantizer.prepare(model, batches[0]), batches)
    return PassManager(["fold-quantization"], reproducer=False, progress=False).run(prepared)


def weight_levels(model: Any, name: str) -> tuple[int, int]:
    weight = model.get_buffer(f"{name}.weight")
    return int(weight.min()), int(weight.max())


def read_on(model: Any, layer: str) -> tuple[int, int]:
    """The integer range that the input of a layer is quantized on."""
    node = next(
        n
        for n in model.graph.nodes
        if getattr(n.args[2:3][0] if len(n.args) > 2 else None, "target", None) == f"{layer}.bias"
    )
    return tuple(node.args[0].args[0].args[3:5])  # type: ignore[return-value]


def test_bits_of_a_layer_reach_its_weight_and_what_it_reads() -> None:
    model, batches = net()
    result = portable(model, batches, overrides={"body.*": {"bits": 4}, "body.3": {"weight_bits": 3}, "head": {"bits": 8}})
    assert weight_levels(result, "body.0") == (-7, 7)
    assert max(map(abs, weight_levels(result, "body.3"))) == 3
    assert max(map(abs, weight_levels(result, "stem"))) == 127
    assert read_on(result, "body.0") == read_on(result, "body.3") == (0, 15)
    assert read_on(result, "stem") == read_on(result, "head") == (0, 255)
    lowered = PTQQuantizer(num_calibration_batches=2, overrides={"body": {"bits": 4}}).quantize(model, batches)
    with torch.no_grad():
        full = PTQQuantizer(num_calibration_batches=2).quantize(model, batches)
        expected = model(batches[0])
        assert 5 < output_snr(expected, lowered(batches[0])) < output_snr(expected, full(batches[0])) - 5


def test_a_value_with_several_readers_has_the_widest_grid_they_ask_for() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x)

    torch.manual_seed(0)
    _, batches = net()
    result = portable(Fork().eval(), batches, overrides={"a": {"bits": 4}, "b": {"activation_bits": 6}})
    assert read_on(result, "a") == (0, 63)


def test_a_calibrator_of_a_layer_watches_what_it_reads() -> None:
    model, batches = net()
    quantizer = PTQQuantizer(overrides={"head": {"calibrator": "minmax"}}, calibrator_options={"percentile": 99.0})
    prepared = quantizer.prepare(model, batches[0])
    names = {name: m.calibrator_name for name, m in prepared.named_modules() if hasattr(m, "calibrator_name")}
    assert list(names.values()).count("minmax") == 1


def test_a_layer_may_stay_in_float_by_an_override() -> None:
    model, batches = net()
    result = PTQQuantizer(num_calibration_batches=2, overrides={"body.3": {"float": True}}).quantize(model, batches)
    assert {row.node: row.reason for row in coverage(result).floats}["body.3"] == "it is excluded by name"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"stem": {"bit": 4}}, "no option 'bit'.*Did you mean 'bits'"),
        ({"stem": {"bits": 9}}, "'stem': bits is 9; it is an integer from 2 to 8"),
        ({"stem": {"bits": True}}, "integer from 2 to 8"),
        ({"stem": {"calibrator": "hist"}}, "'stem'.*no calibration method 'hist'"),
        ({"stem": {"float": "yes"}}, "float is 'yes'; it is a bool"),
        ({"stem": 4}, "overrides is {.stem.: 4}: input should be a valid dictionary"),
        ({"stem": {"calibrator_options": {"percentile": 99}}}, "without a calibrator"),
    ],
)
def test_overrides_that_cannot_be_meant_are_refused(overrides: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PTQQuantizer(overrides=overrides)


@pytest.mark.parametrize("make", [PTQQuantizer, DynamicQuantizer, QATQuantizer, LSQQuantizer])
@pytest.mark.parametrize(
    "option", [{"verify": "no"}, {"progress": "no"}, {"overrides": [1]}, {"per_channel": 1}, {"symmetric": 0}]
)
def test_options_of_another_type_are_refused_when_they_enter(make: Any, option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(option))} is "):
        make(**option)


@pytest.mark.parametrize("option", [{"recover": 3}, {"never_slower": "no"}, {"calibrator_options": 3}])
def test_options_of_calibration_of_another_type_are_refused_too(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(option))} is "):
        PTQQuantizer(**option)


def test_layers_may_be_given_as_a_set() -> None:
    model, batches = net()
    names = {"stem"}
    assert "stem" in {row.node for row in coverage(portable(model, batches, exclude_layers=names)).floats}


def test_a_model_is_quantized_in_inference_mode_as_outside_it() -> None:
    model, batches = net()
    expected = portable(model, batches)(batches[0])
    with torch.inference_mode():
        assert torch.equal(portable(model, batches)(batches[0]), expected)


def test_an_override_for_no_layer_is_an_error_with_the_closest_names() -> None:
    model, batches = net()
    with pytest.raises(ConfigError, match=r"no layer is called 'steam'. Did you mean 'stem'"):
        PTQQuantizer(overrides={"steam": {"bits": 4}}).quantize(model, batches)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_affine_weights_are_within_half_a_step_and_keep_zero(per_channel: bool, bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, 3, generator=generator) + torch.tensor([-3.0, -1, 0, 1, 3, 9])[:, None, None]
    weight[2] = 0
    levels, scale, zero = quantize_weight(weight, per_channel=per_channel, symmetric=False, bits=bits)
    assert zero is not None and levels.dtype == zero.dtype == torch.int8
    assert levels.min() >= -(2 ** (bits - 1)) and levels.max() <= 2 ** (bits - 1) - 1
    s, z = scale.double().numpy().reshape(-1, 1, 1), zero.double().numpy().reshape(-1, 1, 1)
    gap = np.abs((levels.double().numpy() - z) * s - weight.double().numpy()) / s
    assert gap.max() <= 1.0 + 1e-6 and np.quantile(gap, 0.9) <= 0.5 + 1e-6


@pytest.mark.parametrize("per_channel", [True, False])
def test_affine_weights_run_in_integers_as_the_reference_graph_says(per_channel: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(72, 5))
    for layer in (model[0], model[2], model[4]):
        nn.init.uniform_(layer.weight, -0.1, 0.4)  # type: ignore[arg-type]
    batches = [torch.randn(16, 3, 11, 11)]
    options: dict[str, Any] = {"per_channel": per_channel, "num_calibration_batches": 1, "calibration_method": "minmax"}
    reference = portable(model.eval(), batches, symmetric=False, **options)
    assert reference.get_buffer("0.weight_zero_point").any()
    lowered = PassManager(["lower"], reproducer=False).run(reference)
    step = max(float(n.args[1]) for n in reference.graph.nodes if n.target is qdq.quantize)
    x = torch.randn(64, 3, 11, 11)
    with torch.no_grad():
        gap = (reference(x) - lowered(x)).abs() / step
        assert (gap <= 1.001).double().mean() >= 0.999
        options["overrides"] = {"*": {"weight_bits": 4}}
        four = {s: PTQQuantizer(symmetric=s, **options).quantize(model, batches) for s in (True, False)}
        assert output_snr(model(x), four[False](x)) > output_snr(model(x), four[True](x)) + 2


def test_a_model_quantized_in_steps_is_counted_like_one_quantized_at_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    batches = [torch.randn(2, 3, 8, 8) for _ in range(2)]
    quantizer = PTQQuantizer(num_calibration_batches=2)
    stepwise = quantizer.convert(quantizer.calibrate(quantizer.prepare(model), batches))
    counted = coverage(stepwise)
    assert counted.total_macs == 2 * (8 * 36 * 27 + 8 * 36 * 4) and counted.mac_share == 1.0
    assert coverage(quantizer.quantize(model, batches)) == counted


def seen(model: nn.Module, batches: Any) -> dict[str, tuple[float, float]]:
    """The extremes that observers see, by the value they watch."""
    quantizer = PTQQuantizer(calibration_method="minmax", num_calibration_batches=3, progress=False)
    prepared = quantizer.prepare(model, torch.randn(1, 3, 12, 12))
    quantizer.calibrate(prepared, batches)
    ranges = {name: observer.calibrator.compute_range() for name, observer in observers(prepared).items()}
    return {name.rpartition(".")[2]: (float(low), float(high)) for name, (low, high) in ranges.items()}


def test_batches_that_come_in_the_same_memory_are_all_seen() -> None:
    model, _ = net()
    buffer = torch.empty(1, 3, 12, 12)
    feed = (buffer.copy_(torch.full_like(buffer, value)) for value in (-3.0, 5.0, 1.0))
    assert seen(model, feed)["x"] == (-3.0, 5.0)


class Overwriting(nn.Module):
    """Python code that decides by values, and overwrites what its compiled child was given."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        given = x + 1
        result: Tensor = self.body(given)
        given.zero_()
        return result if float(result.sum()) > 0 else -result


def test_what_python_code_overwrites_afterwards_is_seen_as_it_was_given() -> None:
    torch.manual_seed(0)
    images = torch.randn(1, 3, 12, 12)
    low, high = float((images + 1).min()), float((images + 1).max())
    assert (low, high) in seen(Overwriting().eval(), [images]).values()


def test_no_more_values_wait_than_may_be_held() -> None:
    backlog, calibrator = Backlog(held=10), build_calibrator("minmax")
    for held in (4, 8, 0, 4):
        backlog.add(calibrator, torch.randn(4))
        assert backlog.size == sum(values.numel() for _, values in backlog.shown) == held
    backlog.settle()
    assert calibrator.count == 16 and not backlog.shown
