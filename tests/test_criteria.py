"""Channel importance against formulas written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.errors import ConfigError
from fxcompress.pruning import criteria

common = settings(deadline=None, max_examples=30)
shapes = st.tuples(st.integers(1, 7), st.integers(1, 6), st.integers(1, 3))
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


def rows(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(shapes, dtypes, st.integers(0, 2))
@common
def test_norms_are_the_formulas_along_any_dimension(shape: tuple[int, ...], dtype: torch.dtype, dim: int) -> None:
    weight = rows(shape, dtype)
    slices = weight.movedim(dim, 0).flatten(1)
    exact = np.moveaxis(weight.double().numpy(), dim, 0).reshape(shape[dim], -1)
    assert np.allclose(criteria.l1_norm(slices), np.abs(exact).sum(1), rtol=1e-6)
    assert np.allclose(criteria.l2_norm(slices), np.sqrt((exact**2).sum(1)), rtol=1e-6)
    assert criteria.l1_norm(slices).dtype == torch.float64


@given(shapes, dtypes)
@common
def test_taylor_is_the_first_order_change_of_the_loss(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, gradient = rows(shape, dtype).flatten(1), rows(shape, dtype, 1).flatten(1)
    exact = np.abs((weight.double().numpy() * gradient.double().numpy()).sum(1))
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 0.1
    assert np.allclose(criteria.taylor(weight, gradient), exact, atol=tolerance)


def test_taylor_predicts_what_zeroing_a_slice_does_to_a_linear_loss() -> None:
    weight = rows((4, 5), torch.float64).requires_grad_()
    slope = rows((4, 5), torch.float64, 3)
    loss = (weight * slope).sum()
    loss.backward()
    for index, score in enumerate(criteria.taylor(weight, weight.grad)):
        changed = weight.detach().clone()
        changed[index] = 0
        assert abs(float((changed * slope).sum() - loss.detach())) == pytest.approx(float(score), rel=1e-12)


def test_bn_scale_is_the_absolute_value() -> None:
    assert criteria.bn_scale(torch.tensor([-2.0, 0.5])).tolist() == [2.0, 0.5]


def test_fpgm_is_least_at_the_geometric_median_and_equals_the_double_loop() -> None:
    points = rows((9, 4), torch.float32)
    exact = np.array([sum(np.linalg.norm(a - b) for b in points.double().numpy()) for a in points.double().numpy()])
    assert np.allclose(criteria.fpgm(points), exact, rtol=1e-9)
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0]])
    assert int(criteria.fpgm(line).argmin()) == 2


def test_hrank_counts_the_rank_of_every_map_and_takes_the_mean_over_the_batch() -> None:
    ranks = torch.tensor([[0, 1, 5], [2, 1, 3]])
    maps = torch.zeros(2, 3, 6, 5)
    for n in range(2):
        for c in range(3):
            r = int(ranks[n, c])
            maps[n, c] = rows((6, r), torch.float32, n * 3 + c) @ rows((r, 5), torch.float32, 50 + n * 3 + c)
    assert criteria.hrank(maps).tolist() == ranks.double().mean(0).tolist()
    assert criteria.hrank(maps[:, :, None]).tolist() == ranks.double().mean(0).tolist()
    sequences = torch.zeros(4, 2, 5)
    sequences[:, 1] = torch.arange(4.0)[:, None] * torch.ones(5)
    assert criteria.hrank(sequences).tolist() == [0.0, 1.0]
    assert criteria.hrank(torch.tensor([[0.0, 1.0], [0.0, 2.0]])).tolist() == [0.0, 1.0]


def test_random_is_reproducible() -> None:
    draws = [criteria.random(6, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@given(st.lists(st.lists(st.floats(0, 100), min_size=5, max_size=5), min_size=1, max_size=4))
@common
def test_slices_of_a_unit_combine_by_the_named_reduction(lists: list[list[float]]) -> None:
    parts = [torch.tensor(scores, dtype=torch.float64) for scores in lists]
    exact = np.array(lists)
    assert np.allclose(criteria.combine(parts, "sum"), exact.sum(0))
    assert np.allclose(criteria.combine(parts, "mean"), exact.mean(0))
    assert np.allclose(criteria.combine(parts, "max"), exact.max(0))
    assert np.allclose(criteria.combine(parts, "norm"), np.sqrt((exact**2).sum(0)))


def test_parts_name_the_unit_of_each_slice_and_units_without_slices_score_zero() -> None:
    part = (torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2, 0, 2, 0]))
    assert criteria.combine([part, torch.tensor([10.0])], "sum", 4).tolist() == [16.0, 0.0, 4.0, 0.0]
    assert criteria.combine([part, torch.tensor([10.0])], "mean", 4).tolist() == [16 / 3, 0.0, 2.0, 0.0]


def test_the_norm_of_l2_norms_is_the_l2_norm_of_all_slices_together() -> None:
    a, b = rows((3, 4), torch.float64), rows((3, 9), torch.float64, 1)
    together = criteria.combine([criteria.l2_norm(a), criteria.l2_norm(b)], "norm")
    assert torch.allclose(together, torch.cat([a, b], 1).square().sum(1).sqrt())


def test_groups_are_scaled_by_their_mean_or_largest_and_zeros_stay() -> None:
    scores = torch.tensor([1.0, 3.0, 4.0], dtype=torch.float64)
    assert criteria.normalise(scores, "mean").tolist() == [0.375, 1.125, 1.5]
    assert criteria.normalise(scores, "max").tolist() == [0.25, 0.75, 1.0]
    assert criteria.normalise(scores, "none").tolist() == scores.tolist()
    for how in criteria.NORMALISATIONS:
        assert criteria.normalise(torch.zeros(3), how).tolist() == [0.0, 0.0, 0.0]
        assert criteria.normalise(torch.zeros(0), how).numel() == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused_by_name(value: float) -> None:
    bad = torch.tensor([[1.0, value], [0.0, 1.0]])
    for function in (criteria.l1_norm, criteria.l2_norm, criteria.fpgm, criteria.bn_scale, criteria.hrank):
        with pytest.raises(ConfigError, match=r"layer1\.weight: NaN"):
            function(bad, "layer1.weight")
    with pytest.raises(ConfigError, match=r"layer1\.weight: NaN"):
        criteria.taylor(torch.ones(2, 2), bad, "layer1.weight")


def test_missing_gradients_unknown_words_and_wrong_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"fc\.weight has no gradient"):
        criteria.taylor(torch.ones(2, 2), None, "fc.weight")
    with pytest.raises(ConfigError, match="Did you mean 'mean'"):
        criteria.combine([torch.ones(2)], "means")
    with pytest.raises(ConfigError, match="Did you mean 'max'"):
        criteria.normalise(torch.ones(2), "maxi")
    with pytest.raises(ConfigError, match="batch, channels"):
        criteria.hrank(torch.ones(3))
