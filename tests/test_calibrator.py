"""Calibrators: streaming, splitting, merging, state, edge cases; ranges and scales against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.errors import ConfigError, DataError
from fxcompress.quantization import CALIBRATORS, Calibrator, HistogramCalibrator, MinMaxCalibrator, build_calibrator
from fxcompress.quantization.grid import Grid, compute_scale_zp, grid

common = settings(deadline=None, max_examples=60)
floats = st.floats(-1e6, 1e6, width=32)
data = st.lists(floats, min_size=1, max_size=200).map(lambda values: torch.tensor(values))


def fed(name: str, *tensors: Tensor) -> Calibrator:
    calibrator = build_calibrator(name)
    for tensor in tensors:
        calibrator.collect(tensor)
    return calibrator


def same_state(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return all(same_state(a[key], b[key]) for key in a) if isinstance(a, dict) else a == b


@pytest.mark.parametrize("name", CALIBRATORS)
@given(values=data, cuts=st.lists(st.integers(0, 200), max_size=3), order=st.randoms())
@common
def test_any_split_order_and_merge_gives_the_same_state(name: str, values: Tensor, cuts: list[int], order: Any) -> None:
    whole = fed(name, values)
    parts = [part for part in torch.tensor_split(values, sorted(cuts)) if part.numel()]
    order.shuffle(parts)
    assert same_state(whole.state_dict(), fed(name, *parts).state_dict())
    workers = [fed(name, part) for part in parts]
    for other in workers[1:]:
        workers[0].merge(other)
    assert same_state(whole.state_dict(), workers[0].state_dict())


@pytest.mark.parametrize("name", CALIBRATORS)
@given(values=data)
@common
def test_state_is_saved_and_taken_up(name: str, values: Tensor) -> None:
    calibrator, again = fed(name, values), build_calibrator(name)
    again.load_state_dict(calibrator.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(calibrator.compute_range(), again.compute_range(), strict=True))
    again.collect(values)
    assert again.count == 2 * calibrator.count


@pytest.mark.parametrize("name", CALIBRATORS)
@given(
    values=st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=50).map(torch.tensor), power=st.integers(-8, 8)
)
@common
def test_ranges_scale_with_the_data(name: str, values: Tensor, power: int) -> None:
    values = torch.where(values.abs() < 1e-20, 0.0, values)
    low, high = fed(name, values).compute_range()
    scaled = fed(name, values * 2.0**power).compute_range()
    assert scaled[0] == low * 2.0**power and scaled[1] == high * 2.0**power


@given(data)
@common
def test_minmax_is_the_extremes(values: Tensor) -> None:
    low, high = fed("minmax", values).compute_range()
    assert (float(low), float(high)) == (values.min().item(), values.max().item())


@given(st.integers(0, 2**16), st.sampled_from([90.0, 99.0, 99.9, 99.99]), st.booleans())
@common
def test_histogram_clips_at_the_percentile_within_a_bin(seed: int, percentile: float, positive: bool) -> None:
    values = np.random.default_rng(seed).laplace(size=20_000).astype(np.float32)
    values = np.maximum(values, 0) if positive else values
    calibrator = HistogramCalibrator(num_bins=2048, percentile=percentile)
    calibrator.collect(torch.from_numpy(values))
    high = float(calibrator.compute_range()[1])
    exact = np.percentile(np.abs(values), percentile, method="inverted_cdf")
    assert min(exact, values.max()) <= high <= min(exact * (1 + 1 / 512) + 1e-12, values.max())


@pytest.mark.parametrize("name", CALIBRATORS)
@pytest.mark.parametrize("value", [0.0, 1.5, -3.25])
def test_a_constant_keeps_its_value(name: str, value: float) -> None:
    scale, zero_point = fed(name, torch.full((7,), value)).compute_scale_zp(Grid(torch.uint8, 0, 255, symmetric=False))
    level = round(value / float(scale)) + int(zero_point)
    assert 0 <= level <= 255 and float(scale) > 0
    assert (level - int(zero_point)) * float(scale) == pytest.approx(value, abs=float(scale) / 2)


def test_an_outlier_a_million_times_the_rest_is_clipped_by_the_histogram_and_kept_by_minmax() -> None:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    values[5] = 1e6
    assert float(fed("minmax", values).compute_range()[1]) == 1e6
    high = float(fed("histogram", values).compute_range()[1])
    assert high == pytest.approx(np.percentile(values.abs().numpy(), 99.99), rel=1 / 256)


@pytest.mark.parametrize("name", CALIBRATORS)
def test_empty_is_ignored_and_nothing_is_an_error(name: str) -> None:
    calibrator = fed(name, torch.zeros(0, 3))
    assert calibrator.count == 0
    with pytest.raises(DataError, match="seen no data"):
        calibrator.compute_range()
    with pytest.raises(DataError, match="NaN or infinite"):
        calibrator.collect(torch.tensor([1.0, float("nan")]))
    with pytest.raises(DataError, match="NaN or infinite"):
        calibrator.collect(torch.tensor([1.0, float("inf")]))
    assert calibrator.count == 0


@pytest.mark.parametrize("name", CALIBRATORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_layouts_count_alike(name: str, dtype: torch.dtype) -> None:
    values = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = fed(name, values.float())
    for view in (values, values.contiguous(memory_format=torch.channels_last), values.permute(3, 1, 0, 2)):
        assert same_state(expected.state_dict(), fed(name, view).state_dict())
    strided = fed(name, values[:, ::2, 1:])
    assert same_state(strided.state_dict(), fed(name, values[:, ::2, 1:].float().clone()).state_dict())


def test_minmax_per_channel() -> None:
    values = torch.randn(3, 4, 5)
    calibrator = MinMaxCalibrator(per_channel=True, axis=1)
    calibrator.collect(values)
    low, high = calibrator.compute_range()
    assert low.tolist() == values.amin((0, 2)).tolist() and high.tolist() == values.amax((0, 2)).tolist()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("histgram", {}, "Did you mean 'histogram'"),
        ("histogram", {"bins": 3}, "bins"),
        ("histogram", {"num_bins": 3}, "16 to 65536"),
        ("histogram", {"percentile": 101}, "percentile"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_calibrator(name, **options)


@given(st.floats(-1e30, 1e30), st.floats(-1e30, 1e30), st.sampled_from(["int8", "uint8"]), st.booleans(), st.integers(2, 8))
@common
def test_scales_hold_the_range_and_zero_exactly(a: float, b: float, dtype: str, symmetric: bool, bits: int) -> None:
    low, high = min(a, b), max(a, b)
    target = grid(dtype, symmetric=symmetric, bits=bits)
    scale, zero = (t.double().item() for t in compute_scale_zp(torch.tensor(low), torch.tensor(high), target))
    assert scale > 0 and np.isfinite(scale)
    assert target.quant_min <= zero <= target.quant_max and zero == int(zero)
    for value in (min(low, 0.0), max(high, 0.0)):
        level = np.clip(np.round(value / scale) + zero, target.quant_min, target.quant_max)
        assert abs((level - zero) * scale - value) <= scale * 1.01 + 1e-37


def test_symmetric_grids_follow_the_standard() -> None:
    one = torch.tensor(1.0)
    assert [t.item() for t in compute_scale_zp(-one, one, grid("int8"))] == [pytest.approx(1 / 127), 0]
    assert compute_scale_zp(-one, one, grid("uint8"))[1].item() == 128
    assert [t.item() for t in compute_scale_zp(0 * one, one, grid("uint8"))] == [pytest.approx(1 / 255), 0]
    with pytest.raises(DataError, match="NaN"):
        compute_scale_zp(one * float("nan"), one, grid("int8"))
    with pytest.raises(ConfigError, match="no quantized dtype"):
        grid("int4x")
