"""Calibrators: streaming, splitting, merging, state, edge cases; ranges and scales against numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.errors import ConfigError, DataError
from fxcompress.quantization import (
    CALIBRATORS,
    Calibrator,
    HistogramCalibrator,
    MinMaxCalibrator,
    PercentileCalibrator,
    build_calibrator,
)
from fxcompress.quantization.grid import Grid, compute_scale_zp, grid
from fxcompress.quantization.thresholds import entropy_threshold, even_bins, graded, squared_error

UINT8 = grid("uint8", symmetric=False)

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
@pytest.mark.parametrize("first", [True, False])
def test_what_is_seen_in_inference_mode_and_outside_of_it_counts_alike(name: str, first: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    parts = [10.0**power * torch.randn(size, generator=generator) for power, size in enumerate((100, 70_000, 140_000, 5))]
    mixed, other = build_calibrator(name), fed(name, parts[3])
    for number, part in enumerate(parts[:3]):
        with torch.inference_mode((number % 2 == 0) == first):
            mixed.collect(part.clone())
    with torch.inference_mode():
        mixed.merge(other)
    mixed.collect(parts[0])
    assert same_state(mixed.state_dict(), fed(name, *parts, parts[0]).state_dict())


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


def smallest(values: np.ndarray, percentile: float) -> float:
    """The smallest value that ``percentile`` % of the values do not exceed."""
    rank = math.ceil(round(percentile * len(values) / 100, 6))
    return float(np.sort(values)[rank - 1])


@given(st.integers(0, 2**16), st.sampled_from([90.0, 99.0, 99.9, 99.99]), st.booleans())
@common
def test_histogram_clips_at_the_percentile_within_a_bin(seed: int, percentile: float, positive: bool) -> None:
    values = np.random.default_rng(seed).laplace(size=20_000).astype(np.float32)
    values = np.maximum(values, 0) if positive else values
    calibrator = HistogramCalibrator(num_bins=2048, percentile=percentile)
    calibrator.collect(torch.from_numpy(values))
    high = float(calibrator.compute_range()[1])
    exact = smallest(np.abs(values), percentile)
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


def laplace(seed: int, size: int = 20_000) -> np.ndarray:
    return np.random.default_rng(seed).laplace(size=size).astype(np.float32)


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.9])
def test_percentile_is_that_of_magnitudes_or_of_both_tails_within_a_bin(percentile: float) -> None:
    values = laplace(3) - np.float32(0.4)
    calibrator = PercentileCalibrator(percentile)
    calibrator.collect(torch.from_numpy(values))
    low, high = (float(t) for t in calibrator.compute_range(grid("int8")))
    exact = smallest(np.abs(values), percentile)
    assert -low == high and exact <= high <= exact * (1 + 1 / 256)
    low, high = (float(t) for t in calibrator.compute_range(UINT8))
    tail = (100 - percentile) / 2
    upper = smallest(values, 100 - tail)
    lower = -smallest(-values, 100 - tail)
    assert upper <= high <= upper * (1 + 1 / 256) and lower * (1 + 1 / 256) <= low <= lower


def divergence(counts: np.ndarray, kept: int, levels: int, ends: np.ndarray | None = None) -> float:
    """KL(P ‖ Q) written out: P clipped at ``kept`` bins, Q its version in ``levels`` levels; both over all values."""
    ends = np.arange(len(counts) + 1) if ends is None else ends
    p, width = counts[:kept].astype(np.float64), np.diff(ends)[:kept]
    level = ends[:kept] * levels // ends[kept]
    inside = np.bincount(level, weights=p, minlength=levels)
    p[-1] += counts[kept:].sum()
    seen = p > 0
    occupied = np.bincount(level[seen], weights=width[seen], minlength=levels)
    if (inside[level[seen]] == 0).any():
        return np.inf
    q = inside[level] * width / np.maximum(occupied[level], 1)
    return float((p[seen] * np.log(p[seen] / q[seen])).sum() / counts.sum())


@given(st.integers(0, 2**16), st.sampled_from([8, 16, 31]), st.sampled_from([1.0, 0.2, 0.02]), st.integers(0, 3))
@common
def test_entropy_takes_the_threshold_of_least_divergence(seed: int, levels: int, density: float, octaves: int) -> None:
    generator = np.random.default_rng(seed)
    ends = graded(64, octaves)
    counts = np.round(1000 * np.exp(-ends[:-1].numpy() / generator.uniform(2, 60))) * (
        generator.random(len(ends) - 1) < density
    )
    counts[generator.integers(len(counts), size=2)] += 1
    candidates = [i for i in range(levels, len(ends)) if ends[i] - ends[i - 1] == 1 or counts[i - 1] > 0]
    every = {kept: divergence(counts, kept, levels, ends.numpy()) for kept in candidates}
    kept = entropy_threshold(torch.from_numpy(counts), levels, ends)
    assert every.get(kept, np.inf) <= min(every.values()) + 1e-9 or kept == len(counts)
    assert kept != len(counts) or kept not in every or every[kept] <= min(every.values()) + 1e-9


MIXTURES: dict[str, tuple[float, int]] = {
    "a thousandth": (20.0, 100),
    "half of that": (20.0, 50),
    "not so far out": (8.0, 100),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_entropy_keeps_outliers_where_a_search_over_the_whole_range_keeps_them(name: str) -> None:
    """The search written plainly: 2048 equal bins up to the largest magnitude, every threshold."""
    place, number = MIXTURES[name]
    generator = np.random.default_rng(0)
    far = generator.choice([-1, 1], number) * generator.normal(place, 0.2, number)
    values = np.concatenate([generator.normal(size=100_000), far]).astype(np.float32)
    counts, edges = np.histogram(np.abs(values), 2048, (0, np.abs(values).max()))
    plain = edges[min(range(128, 2049), key=lambda kept: divergence(counts, kept, 128))]
    assert plain > place
    assert float(fed("entropy", torch.from_numpy(values)).compute_range()[1]) == pytest.approx(plain, rel=0.02)


def test_entropy_does_not_throw_away_the_bulk_of_bimodal_data() -> None:
    """All the mass in one bin far out has no divergence once it is clipped into one bin; it must be charged."""
    generator = np.random.default_rng(0)
    values = np.concatenate([generator.normal(0, 0.1, 10), generator.normal(3, 0.1, 100_000)]).astype(np.float32)
    high = float(fed("entropy", torch.from_numpy(values)).compute_range()[1])
    assert (values > high).mean() < 0.01


def test_entropy_is_not_blurred_by_a_single_outlier() -> None:
    values = torch.from_numpy(laplace(0))
    alone = float(fed("entropy", values).compute_range()[1])
    with_outlier = float(fed("entropy", torch.cat([values, torch.tensor([1e6])])).compute_range()[1])
    assert alone / 2 < with_outlier < 2 * alone


def test_entropy_takes_values_below_what_a_histogram_tells_apart() -> None:
    values = torch.cat([torch.full((100_000,), 1.4e-45), torch.tensor([3e38])])
    assert float(fed("entropy", values).compute_range()[1]) == pytest.approx(3e38)
    assert float(fed("entropy", values[:1]).compute_range()[1]) == float(values[0])


@given(st.integers(0, 2**16), st.integers(10, 200))
@common
def test_even_bins_keep_the_count_and_the_mass_below_every_edge(seed: int, number: int) -> None:
    values = np.abs(laplace(seed, 2000)).astype(np.float32)
    calibrator = build_calibrator("entropy")
    calibrator.collect(torch.from_numpy(values))
    left, right, counts = calibrator.histogram.bins(0.0, float(values.max()))  # type: ignore[attr-defined]
    ends = torch.linspace(0, 1, number + 1, dtype=torch.float64) * float(values.max())
    even = even_bins(left, right, counts, ends).numpy()
    assert even.sum() == pytest.approx(len(values))
    edges = np.arange(1, number + 1) / number * float(values.max())
    exact = (values[None] <= edges[:, None]).sum(1)
    assert np.abs(even.cumsum() - exact).max() <= (counts.max() + 1)


def quantization_error(values: np.ndarray, low: float, high: float, target: Grid) -> float:
    """Mean squared error in float64, the grid's arithmetic written out."""
    low, high = min(low, 0.0), max(high, 0.0)
    if target.symmetric:
        scale, zero = max(-low, high) / target.quant_max, 0.0
    else:
        scale = (high - low) / (target.quant_max - target.quant_min)
        zero = np.round(target.quant_min - low / scale)
    levels = np.clip(np.round(values.astype(np.float64) / scale) + zero, target.quant_min, target.quant_max)
    return float(np.square((levels - zero) * scale - values).mean())


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("kind", ["laplace", "student", "relu", "hardswish", "negative", "coarse"])
def test_mse_finds_a_range_as_good_as_an_exhaustive_search(kind: str, bits: int) -> None:
    x = laplace(1, 4000)
    values = {
        "laplace": x,
        "student": np.random.default_rng(1).standard_t(3, 4000).astype(np.float32),
        "relu": np.maximum(x, 0),
        "hardswish": (x * np.clip(x + 3, 0, 6) / 6).astype(np.float32),
        "negative": -np.abs(x),
        "coarse": np.round(x * 2) / 2,
    }[kind]
    calibrator = build_calibrator("mse")
    calibrator.collect(torch.from_numpy(values))
    top = float(np.abs(values).max())
    symmetric = grid("int8", bits=bits)
    low, high = (float(t) for t in calibrator.compute_range(symmetric))
    best = min(quantization_error(values, -t, t, symmetric) for t in np.linspace(top / 200, top, 400))
    assert quantization_error(values, low, high, symmetric) <= 1.03 * best + 1e-12
    affine = grid("uint8", symmetric=False, bits=bits)
    low, high = (float(t) for t in calibrator.compute_range(affine))
    shares = np.linspace(0.02, 1, 50)
    lows = shares * min(float(values.min()), 0.0) if values.min() < 0 else np.zeros(1)
    highs = shares * max(float(values.max()), 0.0) if values.max() > 0 else np.zeros(1)
    best = min(quantization_error(values, a, b, affine) for a in lows for b in highs if b > a)
    assert quantization_error(values, low, high, affine) <= 1.05 * best + 1e-12


@given(values=data, low=st.floats(-2, 0), high=st.floats(0.01, 2), bits=st.integers(2, 8))
@common
def test_squared_error_of_points_is_that_of_the_values(values: Tensor, low: float, high: float, bits: int) -> None:
    values = values.double() / 1e6
    bins = (values, values, torch.ones_like(values))
    ends = (torch.tensor([low], dtype=torch.float64), torch.tensor([high], dtype=torch.float64))
    for target in (grid("int8", bits=bits), grid("uint8", symmetric=False, bits=bits)):
        scale, zero = (float(t) for t in compute_scale_zp(*ends, target))
        levels = np.clip(np.round(values.numpy() / scale) + zero, target.quant_min, target.quant_max)
        exact = np.square((levels - zero) * scale - values.numpy()).sum()
        assert float(squared_error(*ends, target, bins)) == pytest.approx(exact, rel=1e-5, abs=1e-9)


def test_squared_error_of_spread_bins_is_the_integral() -> None:
    edges = torch.linspace(-3, 3, 32, dtype=torch.float64)
    bins = (edges[:-1], edges[1:], torch.rand(31, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    dense = np.concatenate(
        [np.linspace(float(a), float(b), 20_001)[:-1] + float(b - a) / 40_000 for a, b, _ in zip(*bins, strict=True)]
    )
    weights = np.repeat(bins[2].numpy() / 20_000, 20_000)
    for target, low, high in ((grid("int8", bits=4), -2.0, 2.0), (grid("uint8", symmetric=False, bits=5), -1.0, 2.5)):
        ends = (torch.tensor([low], dtype=torch.float64), torch.tensor([high], dtype=torch.float64))
        scale, zero = (float(t) for t in compute_scale_zp(*ends, target))
        levels = np.clip(np.round(dense / scale) + zero, target.quant_min, target.quant_max)
        exact = (np.square((levels - zero) * scale - dense) * weights).sum()
        assert float(squared_error(*ends, target, bins)) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("name", CALIBRATORS)
@pytest.mark.parametrize("target", [grid("int8"), Grid(torch.uint8, 0, 255, symmetric=False), grid("int8", bits=3)])
@pytest.mark.parametrize("kind", ["zeros", "constant", "positive", "negative", "outlier", "one value", "two values"])
def test_ranges_lie_inside_the_extremes_on_every_edge_case(name: str, target: Grid, kind: str) -> None:
    x = torch.from_numpy(laplace(2, 1000))
    values = {
        "zeros": torch.zeros(50),
        "constant": torch.full((50,), 0.3),
        "positive": x.abs() + 0.5,
        "negative": -x.abs() - 0.5,
        "outlier": torch.cat([x, torch.tensor([-1e6])]),
        "one value": torch.tensor([7.0]),
        "two values": torch.tensor([-1e-3, 5.0]),
    }[kind]
    calibrator = fed(name, values, torch.zeros(0))
    low, high = (float(t) for t in calibrator.compute_range(target))
    assert values.min() <= low <= high <= values.max()
    scale, _ = calibrator.compute_scale_zp(target)
    assert 0 < float(scale) < np.inf


def test_calibrators_that_do_not_fit_are_refused() -> None:
    x = torch.randn(8)
    coarse, fine = HistogramCalibrator(num_bins=64), HistogramCalibrator(num_bins=128)
    for calibrator in (coarse, fine):
        calibrator.collect(x)
    with pytest.raises(ConfigError, match=r"'num_bins': 64.*'num_bins': 128.*cannot merge"):
        coarse.merge(fine)
    with pytest.raises(ConfigError, match="cannot merge with a MinMax"):
        coarse.merge(fed("minmax", x))
    with pytest.raises(ConfigError, match="the num_bins it was saved with"):
        coarse.load_state_dict(fine.state_dict())
    for state in ({}, {"count": 3}, coarse.state_dict()):
        with pytest.raises(ConfigError, match="the state of a MinMaxCalibrator holds count"):
            MinMaxCalibrator().load_state_dict(state)
    with pytest.raises(DataError, match="shown a list; it collects tensors"):
        coarse.collect([1.0])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="complex64 values; it collects real numbers"):
        coarse.collect(torch.ones(2) * 1j)
    with pytest.raises(DataError, match=r"channels of axis 2 was shown a shape of \(3, 4\)"):
        MinMaxCalibrator(per_channel=True, axis=2).collect(torch.randn(3, 4))
    channels = MinMaxCalibrator(per_channel=True)
    channels.collect(torch.randn(3, 4))
    with pytest.raises(DataError, match="seen 3 channels was shown 5"):
        channels.collect(torch.randn(5, 4))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"count": -1}, "damaged"),
        ({"count": "many"}, "damaged"),
        ({"minimum": torch.tensor(torch.nan)}, "damaged"),
        ({"minimum": torch.tensor(1e9)}, "damaged"),
        ({"maximum": torch.zeros(3)}, "damaged"),
        ({"maximum": 1.0}, "damaged"),
        ({"histogram": None}, "damaged"),
        ({"histogram": {"top": 3}}, "damaged"),
        ({"histogram": {"top": 3, "counts": torch.zeros(1, 24 * 512, dtype=torch.int64)}}, "not of its extremes"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(changed: dict[str, Any], message: str) -> None:
    x = torch.randn(8)
    calibrator = fed("histogram", x)
    with pytest.raises(ConfigError, match=message):
        HistogramCalibrator().load_state_dict({**calibrator.state_dict(), **changed})
    with pytest.raises(ConfigError, match="is a dict; this is a NoneType"):
        calibrator.load_state_dict(None)  # type: ignore[arg-type]
    assert calibrator.compute_range() == fed("histogram", x).compute_range()


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
        ("percentile", {"percentile": True}, "percentile"),
        ("percentile", {"percentile": 0.0}, "percentile"),
        ("minmax", {"symmetric": "no"}, "symmetric is 'no'"),
        ("minmax", {"per_channel": 1}, "per_channel is 1"),
        ("minmax", {"axis": 1.5}, "axis is 1.5"),
        ("entropy", {"num_quantized_bins": 1}, "from 2 to num_bins"),
        ("entropy", {"num_bins": 64, "num_quantized_bins": 128}, "from 2 to num_bins"),
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
    for low, high in ((-1.0, 1.0), (-1.0, 0.5), (-0.5, 1.0)):
        scale, zero = compute_scale_zp(low * one, high * one, grid("uint8"))
        assert [scale.item(), zero.item()] == [pytest.approx(1 / 127), 128]
    assert [t.item() for t in compute_scale_zp(0 * one, one, grid("uint8"))] == [pytest.approx(1 / 255), 0]
    with pytest.raises(DataError, match="NaN"):
        compute_scale_zp(one * float("nan"), one, grid("int8"))
    with pytest.raises(ConfigError, match="no quantized dtype"):
        grid("int4x")
