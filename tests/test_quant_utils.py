"""Quantization tools: the arithmetic against numpy, fusion against eager, sizes by hand, comparisons against hooks."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress import DynamicQuantizer, PTQQuantizer, QATQuantizer
from fxcompress.errors import ConfigError, DataError
from fxcompress.quantization import quant_utils as tools

common = settings(deadline=None, max_examples=60)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.drop, self.fc1, self.fc2 = nn.Dropout(), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)) + x)
        return self.fc2(F.relu(self.fc1(self.drop(x.mean((2, 3))))))


def net() -> tuple[Net, list[Tensor]]:
    torch.manual_seed(0)
    model = Net()
    batches = [torch.randn(8, 3, 10, 10) for _ in range(3)]
    for batch in batches:
        model(batch)
    return model.eval(), batches


def test_quantizable_modules_are_layers_activations_and_what_folds() -> None:
    model, _ = net()
    assert list(tools.get_quantizable_modules(model)) == ["conv1", "bn1", "relu", "conv2", "bn2", "fc1", "fc2"]
    lstm = nn.ModuleDict({"lstm": nn.LSTM(2, 2), "norm": nn.LayerNorm(2), "drop": nn.Dropout()})
    assert list(tools.get_quantizable_modules(lstm)) == ["lstm"]


def test_named_groups_fuse_and_nothing_else() -> None:
    model, batches = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused = tools.fuse_modules(model, [["conv1", "bn1", "relu"], ["conv2", "bn2"]])
    assert torch.allclose(fused(batches[0]), model(batches[0]), atol=1e-5)
    assert type(fused.conv1).__name__ == "ConvActivation2d" and type(fused.conv2) is nn.Conv2d
    assert not hasattr(fused, "bn1") and not hasattr(fused, "bn2") and type(fused.fc1) is nn.Linear
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    alone = tools.fuse_modules(model, ["conv1", "bn1"])
    assert type(alone.conv1) is nn.Conv2d and hasattr(alone, "bn2")


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["conv1", "bn"], "no layer is called 'bn'.*Did you mean"),
        (["bn1", "relu"], "what fuses is"),
        (["conv1"], "what fuses is"),
        ([["conv2", "bn2", "relu"]], "'bn2' is not followed by 'relu' alone, but by add"),
        (["conv2", "bn1"], "'conv2' is not followed by 'bn1' alone, but by bn2"),
        (["fc1", "relu"], "'fc1' is not followed by 'relu' alone"),
    ],
)
def test_groups_that_do_not_fuse_are_errors(groups: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tools.fuse_modules(net()[0], groups)


def test_auto_fuse_leaves_no_normalisation_and_no_relu_behind_a_layer() -> None:
    model, batches = net()
    fused = tools.auto_fuse(model)
    names = {type(m).__name__ for m in fused.modules()}
    assert "BatchNorm2d" not in names and {"ConvActivation2d", "LinearActivation"} & names
    assert torch.allclose(fused(batches[0]), model(batches[0]), atol=1e-5)


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.sampled_from(["int8", "uint8"]), st.booleans())
@common
def test_scale_and_zero_point_are_the_written_out_formulas(a: float, b: float, dtype: str, symmetric: bool) -> None:
    low, high = min(a, b), max(a, b)
    scale, zero = tools.compute_scale_zp(low, high, dtype, symmetric=symmetric)
    assert isinstance(scale, float) and isinstance(zero, int)
    low, high = min(low, 0.0), max(high, 0.0)
    bottom, top = {"int8": (-128, 127), "uint8": (0, 255)}[dtype]
    if symmetric and dtype == "int8":
        expected = max(-low, high) / 127
        assert zero == 0
    elif symmetric:
        expected = max(-low / 128, high / 127) if low < 0 else high / 255
        assert zero == (128 if low < 0 else 0)
    else:
        expected = (high - low) / 255
        assert zero == (np.clip(np.round(bottom - low / expected), bottom, top) if expected else bottom)
    empty = 1 / 254 if symmetric and dtype == "int8" else 1 / 255
    assert scale == pytest.approx(expected if expected > 1.2e-38 else (1.18e-38 if expected else empty), rel=1e-2)
    tensors = tools.compute_scale_zp(torch.tensor([low]), torch.tensor([high]), getattr(torch, dtype), symmetric=symmetric)
    assert tensors[0].shape == (1,) and tensors[1].dtype == torch.int32


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    st.floats(0.0009765625, 8.0, width=32),
    st.integers(-20, 20),
)
@common
def test_quantizing_is_rounding_half_to_even_and_clamping(values: list[float], scale: float, zero: int) -> None:
    tensor = torch.tensor(values)
    levels = tools.quantize_tensor(tensor, scale, zero, "int8")
    expected = np.clip(np.round(tensor.numpy() / np.float32(scale)) + zero, -128, 127)
    assert levels.dtype == torch.int8 and levels.tolist() == expected.tolist()
    back = tools.dequantize_tensor(levels, scale, zero)
    assert back.tolist() == pytest.approx(((expected - zero) * scale).tolist(), rel=1e-6)


def test_scales_per_channel_run_along_their_axis() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    levels = tools.quantize_tensor(tensor, torch.tensor([1.0, 0.5, 0.25]), torch.tensor([0, 1, 2]), "uint8", axis=1)
    assert levels.tolist() == [[0, 3, 10], [3, 9, 22]]
    assert torch.equal(
        tools.dequantize_tensor(levels, torch.tensor([1.0, 0.5, 0.25]), torch.tensor([0, 1, 2]), axis=1), tensor
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tools.quantize_tensor(torch.tensor([math.nan]), 1.0, 0), DataError, "NaN"),
        (lambda: tools.quantize_tensor(torch.ones(2), 0.0, 0), ConfigError, "positive and finite"),
        (lambda: tools.quantize_tensor(torch.ones(2), torch.ones(3), 0), ConfigError, "does not fit"),
        (lambda: tools.quantize_tensor(torch.ones(2), 1.0, 0, "int7"), ConfigError, "no quantized dtype"),
        (lambda: tools.quantize_tensor(torch.ones(2), 1.0, 0, torch.float16), ConfigError, "no quantized dtype"),
        (lambda: tools.compute_scale_zp(1.0, -1.0), ConfigError, "minimum exceeds"),
        (lambda: tools.compute_snr(torch.ones(2), torch.ones(3)), ConfigError, "shapes"),
        (lambda: tools.compute_snr(torch.ones(1), torch.tensor([math.inf])), DataError, "infinite"),
        (lambda: tools.benchmark_latency(nn.Identity(), (1, -3)), ConfigError, "positive integers"),
        (lambda: tools.benchmark_latency(nn.Identity(), (1, 3), runs=0), ConfigError, "at least 1"),
        (lambda: tools.benchmark_latency(nn.Linear(3, 2), (1, 4)), ConfigError, "do not run through the model"),
        (lambda: tools.benchmark_latency(nn.Identity(), 3), ConfigError, "input_shape is 3"),  # type: ignore[arg-type]
        (lambda: tools.benchmark_latency("model", (1, 3)), ConfigError, "it is an nn.Module"),  # type: ignore[arg-type]
        (lambda: tools.get_model_size(None), ConfigError, "it is an nn.Module"),  # type: ignore[arg-type]
        (lambda: tools.compare_weights(nn.Identity(), nn.Identity()), ConfigError, "same name and shape"),
        (lambda: tools.compare_weights(nn.Identity(), None), ConfigError, "quant_model is a NoneType"),  # type: ignore[arg-type]
        (lambda: tools.fuse_modules(nn.Identity(), "conv1"), ConfigError, "a list of names"),
        (lambda: tools.quantize_tensor(torch.ones(2), 1.0, 256, "uint8"), ConfigError, "from 0 to 255"),
        (lambda: tools.quantize_tensor(torch.ones(2), 1.0, torch.tensor(0.5)), ConfigError, "zero point is an integer"),
        (lambda: tools.quantize_tensor([1.0], 1.0, 0), ConfigError, "it is a torch.Tensor"),  # type: ignore[arg-type]
        (lambda: tools.compute_scale_zp("low", 1.0), ConfigError, "min_val is 'low'"),  # type: ignore[arg-type]
        (lambda: tools.compute_scale_zp(torch.zeros(2), torch.ones(3)), ConfigError, "min_val has shape"),
        (lambda: tools.compute_scale_zp(0.0, 1.0, symmetric="no"), ConfigError, "symmetric is 'no'"),  # type: ignore[arg-type]
        (lambda: tools.quantize_tensor(torch.ones(2) * 1j, 1.0, 0), ConfigError, "it is of real numbers"),
        (lambda: tools.compute_snr({"a": torch.ones(2)}, {"b": torch.ones(2)}), ConfigError, "the keys are"),
        (lambda: tools.fuse_modules(nn.Identity(), [1, 2]), ConfigError, "a list of names"),  # type: ignore[list-item]
    ],
)
def test_what_cannot_be_meant_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_snr_is_the_ratio_of_energies_in_decibels() -> None:
    x, y = torch.randn(50, generator=torch.Generator().manual_seed(0)), torch.full((50,), 0.1)
    expected = 10 * math.log10(float((x.double() ** 2).sum() / ((x.double() - y.double()) ** 2).sum()))
    assert tools.compute_snr(x, y) == pytest.approx(expected)
    assert tools.compute_snr(x, x) == math.inf


def test_snr_takes_torchs_quantized_tensors_for_what_they_stand_for() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    quantized = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
    assert tools.compute_snr(x, quantized) == tools.compute_snr(x, quantized.dequantize())


@pytest.mark.parametrize("bound", [1.0, 0.7, 1e-6, 3e4, 1 / 3])
def test_a_range_as_wide_on_both_sides_has_torchs_zero_point_whatever_its_width(bound: float) -> None:
    for dtype, middle in (("int8", 0), ("uint8", 128)):
        assert tools.compute_scale_zp(-bound, bound, dtype, symmetric=False)[1] == middle
        zero_points = tools.compute_scale_zp(torch.tensor([-bound]), torch.tensor([bound]), dtype, symmetric=False)[1]
        assert zero_points.tolist() == [middle]


def test_sizes_are_counted_by_hand() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5, bias=False)).eval()
    assert tools.get_model_size(model) == 4 * (200 + 20 + 100)
    estimate = 200 + 100 + 4 * (20 + 5) + 4 * 20
    assert tools.get_model_size(model, quantized=True) == estimate
    result = PTQQuantizer(num_calibration_batches=1).quantize(model, [torch.randn(4, 10)])
    assert tools.get_model_size(result, quantized=True) == tools.get_model_size(result) == estimate


def test_latency_counts_its_runs() -> None:
    calls: list[tuple[int, ...]] = []

    class Noted(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            calls.append((*x.shape, *y.shape))
            return x

    timing = tools.benchmark_latency(Noted(), [(2, 3), (4,)], runs=7, warmup=2)
    assert timing.runs == 7 and calls == [(2, 3, 4)] * 9
    assert 0 < timing.min <= timing.median <= timing.p90


def test_timing_a_model_in_training_leaves_it_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = copy.deepcopy(model.state_dict())
    tools.benchmark_latency(model, (2, 3, 8, 8), runs=2, warmup=1)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_is_timed_on_numbers_of_its_own_type() -> None:
    halved = DynamicQuantizer(dtype="fp16").quantize(nn.Linear(4, 2).eval(), example_inputs=torch.randn(1, 4))
    for model in (nn.Linear(4, 2).bfloat16(), nn.Linear(4, 2).double(), halved):
        assert tools.benchmark_latency(model, (2, 4), runs=2).runs == 2


def test_models_without_integers_are_compared_layer_by_layer() -> None:
    model, batches = net()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    weights = {row.name: row for row in tools.compare_weights(model, other)}
    noise = 0.01**2 * model.fc2.weight.numel()
    assert weights["fc2"].snr_db == pytest.approx(
        10 * math.log10(float(model.fc2.weight.detach().square().sum()) / noise), abs=1e-3
    )
    values = {row.name: row for row in tools.compare_activations(model, other, batches)}
    outputs = [torch.cat([each(batch) for batch in batches]).double().detach() for each in (model, other)]
    assert values["fc2"].max_error == pytest.approx(float((outputs[0] - outputs[1]).abs().max()), abs=1e-5)
    half = PTQQuantizer(dtype="fp16").quantize(model, batches)
    assert all(60 < row.snr_db < 90 for row in tools.compare_weights(model, half))
    assert all(row.local_snr_db > 50 for row in tools.compare_activations(model, half, batches))


def test_weights_are_compared_after_the_same_folding() -> None:
    model, batches = net()
    result = PTQQuantizer(num_calibration_batches=3).quantize(model, batches)
    rows = {row.name: row for row in tools.compare_weights(model, result)}
    assert set(rows) == {"conv1", "conv2", "fc1", "fc2"}
    factor = (model.bn1.weight / torch.sqrt(model.bn1.running_var + model.bn1.eps)).double()  # type: ignore[operator, arg-type]
    folded = (model.conv1.weight.double() * factor[:, None, None, None]).detach()
    portable = result.meta["portable"]
    stored = (
        portable.get_buffer("conv1.weight").double()
        * portable.get_buffer("conv1.weight_scale").double()[:, None, None, None]
    )
    noise = (folded - stored).square().sum()
    assert rows["conv1"].snr_db == pytest.approx(10 * math.log10(float(folded.square().sum() / noise)), abs=0.01)
    assert rows["conv1"].max_error == pytest.approx(float((folded - stored).detach().abs().max()), rel=1e-3)
    ordered = [row.snr_db for row in tools.compare_weights(model, result)]
    assert ordered == sorted(ordered)


def test_activations_are_compared_as_readers_see_them(tmp_path: Path) -> None:
    model, batches = net()
    result = PTQQuantizer(num_calibration_batches=3, calibration_method="minmax").quantize(model, batches)
    found = tools.compare_activations(model, result, batches)
    rows = {row.name: row for row in found}
    assert {"x", "conv1", "conv2", "fc1", "fc2"} <= set(rows)
    exact, kept = torch.cat(batches), {}
    with torch.no_grad():
        kept["conv1"] = torch.cat([model.relu(model.bn1(model.conv1(batch))) for batch in batches])
        kept["fc2"] = torch.cat([model(batch) for batch in batches])
        outputs = torch.cat([result.meta["portable"](batch) for batch in batches])
    scale = float(exact.max() - exact.min()) / 255
    assert rows["x"].max_error <= scale / 2 * 1.01 and rows["x"].local_snr_db == rows["x"].snr_db
    assert rows["fc2"].snr_db == pytest.approx(tools.compute_snr(kept["fc2"], outputs), abs=0.01)
    assert rows["fc2"].local_snr_db > rows["fc2"].snr_db
    assert rows["conv1"].range_use == pytest.approx(1.0, abs=0.01) and rows["conv1"].clip_rate == 0.0
    assert [row.snr_db for row in found] == sorted(row.snr_db for row in found)
    assert "local_snr_db" in str(found)
    found.plot(str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_clipping_and_unused_range_are_seen() -> None:
    model, batches = net()
    options = {"calibration_method": "percentile", "calibrator_options": {"percentile": 90.0}}
    tight = PTQQuantizer(num_calibration_batches=3, **options).quantize(model, batches)  # type: ignore[arg-type]
    assert 0.01 < {r.name: r for r in tools.compare_activations(model, tight, batches)}["x"].clip_rate < 0.11
    wide = PTQQuantizer(num_calibration_batches=1, calibration_method="minmax").quantize(model, [batches[0] * 10])
    assert {r.name: r for r in tools.compare_activations(model, wide, batches)}["x"].range_use < 0.2


def test_models_quantized_in_other_ways_are_compared_too() -> None:
    model, batches = net()
    dynamic = DynamicQuantizer().quantize(model, example_inputs=batches[0])
    assert {row.name for row in tools.compare_activations(model, dynamic, batches[0])} == {"fc1", "fc2"}
    quantizer = QATQuantizer()
    prepared = quantizer.prepare(model, batches[0])
    prepared.train()(batches[0])
    rows = tools.compare_activations(model, prepared.eval(), batches, num_batches=1)
    assert "conv1" in {row.name for row in rows}
    with pytest.raises(DataError, match="empty"):
        tools.compare_activations(model, dynamic, [])
