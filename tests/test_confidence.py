"""What few samples say about all the others, and which samples say it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress import trace
from fxcompress.errors import DataError
from fxcompress.graph.inputs import Arguments
from fxcompress.quantization.confidence import share, share_at_most, student_t
from fxcompress.quantization.evidence import Evidence
from fxcompress.quantization.sensitivity import Judge


def test_the_quantile_is_that_of_student_t() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 5, 9, 30, 1000):
        for confidence in (0.5, 0.8, 0.95, 0.99):
            assert student_t(confidence, freedom) == pytest.approx(
                scipy_stats.t.ppf(confidence, freedom), rel=0.01, abs=1e-9
            )


def test_the_bound_holds_as_often_as_it_says() -> None:
    """2,000 times ten samples of noise and signal whose powers go together; the true share is 0.1."""
    generator = torch.Generator().manual_seed(0)
    of = 1 + torch.rand(2000, 10, generator=generator)
    lost = 0.2 * torch.rand(2000, 10, generator=generator) * of
    held = sum(share_at_most(part, whole, 0.9) >= 0.1 for part, whole in zip(lost.tolist(), of.tolist(), strict=True))
    assert 0.87 < held / 2000 < 0.93
    assert share_at_most(lost[0].tolist(), of[0].tolist(), 0.5) == share(lost[0].tolist(), of[0].tolist())


def test_one_sample_or_no_signal_gives_the_share_itself() -> None:
    assert share_at_most([1.0], [4.0], 0.95) == 0.25
    assert share_at_most([0.0, 0.0], [0.0, 0.0], 0.95) == 0.0
    assert share_at_most([1.0, 0.0], [0.0, 0.0], 0.95) == 1.0


def test_samples_are_told_apart_along_the_first_axis_of_every_result() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x.sum(1)

    class Off(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1, x.sum(1)

    torch.manual_seed(0)
    calls = [Arguments((torch.randn(5, 3),), {}), Arguments((torch.randn(2, 3),), {})]
    judge = Judge(calls, [None, None])
    judge.listen(Doubled())
    found = judge.drop(Off())
    x = torch.cat([call.args[0] for call in calls]).double()
    signal = x.square().sum(1) + x.sum(1).square()
    assert judge.samples == 7
    assert found.noise == pytest.approx(float(21 / signal.sum()))
    assert found.drop == pytest.approx(100 * found.noise)
    assert found.at_most == pytest.approx(100 * share_at_most([3.0] * 7, signal.tolist(), 0.95))


def test_accuracy_counts_what_was_right_and_is_wrong_less_what_was_wrong_and_is_right() -> None:
    x, targets = torch.eye(4), torch.tensor([0, 1, 2, 0])
    judge = Judge([Arguments((x,), {})], [targets], "accuracy")
    judge.listen(nn.Identity())
    worse = nn.Linear(4, 4, bias=False)
    worse.weight.data = torch.eye(4).roll(1, 0)
    with torch.no_grad():
        found = judge.drop(worse)
    lost = [1.0, 1.0, 1.0, -1.0]
    assert found.drop == pytest.approx(50.0)
    assert found.at_most == pytest.approx(100 * share_at_most(lost, [1.0] * 4, 0.95))


def evidence(number: int, calibrated: int, size: int = 12) -> tuple[list[float], list[float], list[Any], str]:
    """What mends and what judges, by number, of ``size`` batches whose targets are twice their numbers, read only once."""

    class Once:
        def __init__(self) -> None:
            self.walks = 0

        def __iter__(self) -> Any:
            self.walks += 1
            assert self.walks == 1
            return iter([(torch.full((2, 3), float(i)), 2 * i) for i in range(size)])

    model = trace(nn.Linear(3, 2).eval(), torch.randn(1, 3))
    model.meta["calibrated"] = calibrated
    made = Evidence.of(Once(), model, number)
    numbers = [[float(call.args[0][0, 0]) for call in calls] for calls in (made.mending, made.judging)]
    assert [2 * n for n in numbers[1]] == made.targets
    return *numbers, made.targets, made.where  # type: ignore[return-value]


def test_what_follows_the_calibrated_batches_judges() -> None:
    mending, judging, _, where = evidence(3, 4)
    assert (mending, judging) == ([0, 1, 2], [4, 5, 6])
    assert where == "that nothing was fitted to"
    assert evidence(8, 4)[:2] == ([0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11])


def test_a_quarter_is_kept_apart_where_no_batch_follows() -> None:
    mending, judging, _, where = evidence(8, 12)
    assert (mending, judging) == ([0, 1, 2, 3, 4, 5], [6, 7])
    assert "kept apart" in where
    assert evidence(8, 0)[:2] == (mending, judging)
    assert evidence(8, 2, size=2)[:2] == ([0], [1])


def test_one_batch_has_to_serve_for_both_and_says_so() -> None:
    mending, judging, _, where = evidence(8, 1, size=1)
    assert mending == judging == [0]
    assert "one batch only" in where
    with pytest.raises(DataError, match="empty"):
        evidence(8, 0, size=0)
