"""Distillation losses: each against its formula in float64, and finite where reference implementations are not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from decimal import Context, Decimal, localcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.distillation import losses
from fxcompress.distillation.losses.precision import unit
from fxcompress.distillation.memory import InBatch, MemoryBank, MemoryQueue
from fxcompress.errors import ConfigError, DataError

Loss = Callable[[Tensor, Tensor], Tensor]


def double(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def softmax(z: list[float]) -> list[float]:
    top = max(z)
    e = [math.exp(v - top) for v in z]
    return [v / sum(e) for v in e]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def norm(v: list[float]) -> float:
    return math.sqrt(sum(x * x for x in v))


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def close(found: Tensor, expected: float) -> None:
    assert found.shape == ()
    assert float(found) == pytest.approx(expected, rel=1e-9, abs=1e-12)


S, T = double(5, 7, seed=1, scale=3), double(5, 7, seed=2, scale=3)
Y = torch.tensor([0, 3, 6, 3, 1])


def test_kd_is_the_divergence_of_softened_scores_times_t_squared() -> None:
    rows = [
        16 * kl(softmax([v / 4 for v in t]), softmax([v / 4 for v in s]))
        for s, t in zip(S.tolist(), T.tolist(), strict=True)
    ]
    close(losses.kd_loss(S, T), mean(rows))


def test_kd_has_the_papers_gradient() -> None:
    s = S.clone().requires_grad_()
    losses.kd_loss(s, T, 4.0).backward()
    expected = 4.0 * (torch.softmax(S / 4, 1) - torch.softmax(T / 4, 1)) / 5
    assert torch.allclose(s.grad, expected, rtol=1e-9)  # type: ignore[arg-type]


def _exact_kd(s: list[float], t: list[float], temperature: float) -> tuple[Decimal, list[Decimal]]:
    """T² · KL of one row and its gradient, in 50 digits."""

    def logs(row: list[float]) -> list[Decimal]:
        scaled = [(Decimal(x) - Decimal(max(row))) / Decimal(temperature) for x in row]
        whole = sum((x.exp() for x in scaled), Decimal(0)).ln()
        return [x - whole for x in scaled]

    with localcontext(Context(prec=50, Emin=-(10**9), Emax=10**9)):
        log_s, log_t = logs(s), logs(t)
        terms = [b.exp() * (b - a) for a, b in zip(log_s, log_t, strict=True) if b.exp() > 0]
        slopes = [Decimal(temperature) * (a.exp() - b.exp()) for a, b in zip(log_s, log_t, strict=True)]
        return Decimal(temperature) ** 2 * sum(terms, Decimal(0)), slopes


@pytest.mark.parametrize("temperature", [1e-2, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("scores", ["apart", "huge", "masked"])
def test_kd_is_the_divergence_in_many_digits_for_huge_scores_and_for_scores_of_minus_infinity(
    scores: str, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    s, other = torch.randn(4, 10, generator=generator), torch.randn(4, 10, generator=generator)
    s, t = (1e20 * s, 1e20 * other) if scores == "huge" else (5 * s, 5 * other)
    if scores == "masked":
        s[:, 3] = t[:, 3] = t[:, 5] = -torch.inf  # what neither model, or the teacher, gives a chance
    rows = [_exact_kd(a, b, temperature) for a, b in zip(s.tolist(), t.tolist(), strict=True)]
    for dtype, rtol in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        student = s.to(dtype).requires_grad_()
        loss = losses.kd_loss(student, t.to(dtype), temperature)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.item() == pytest.approx(float(sum(row[0] for row in rows) / 4), rel=rtol, abs=1e-30)
        slopes = torch.tensor([[float(x / 4) for x in row[1]] for row in rows], dtype=torch.float64)
        assert (gradient.double() - slopes).norm() <= rtol * slopes.norm()


def _dkd(s: list[float], t: list[float], y: int, temperature: float) -> tuple[float, float]:
    ps, pt = softmax([v / temperature for v in s]), softmax([v / temperature for v in t])
    target = kl([pt[y], 1 - pt[y]], [ps[y], 1 - ps[y]])
    rest = [softmax([v / temperature for i, v in enumerate(z) if i != y]) for z in (t, s)]
    return temperature**2 * target, temperature**2 * kl(*rest)


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 8.0, 4.0), (0.3, 2.0, 1.0)])
def test_dkd_takes_target_and_other_classes_apart(alpha: float, beta: float, temperature: float) -> None:
    parts = [_dkd(s, t, y, temperature) for s, t, y in zip(S.tolist(), T.tolist(), Y.tolist(), strict=True)]
    expected = mean([alpha * a + beta * b for a, b in parts])
    close(losses.dkd_loss(S, T, Y, alpha, beta, temperature), expected)


def _pearson(a: list[float], b: list[float]) -> float:
    a, b = [x - mean(a) for x in a], [x - mean(b) for x in b]
    return dot(a, b) / (norm(a) * norm(b) + 1e-8)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_dist_correlates_rows_and_columns(tau: float) -> None:
    p = [softmax([v / tau for v in row]) for row in S.tolist()]
    q = [softmax([v / tau for v in row]) for row in T.tolist()]
    inter = 1 - mean([_pearson(a, b) for a, b in zip(p, q, strict=True)])
    columns = zip(zip(*p, strict=True), zip(*q, strict=True), strict=True)
    intra = 1 - mean([_pearson(list(a), list(b)) for a, b in columns])
    close(losses.dist_loss(S, T, 2.0, 0.5, tau), tau**2 * (2 * inter + 0.5 * intra))


FS, FT = double(3, 4, 6, 5, seed=3), double(3, 4, 6, 5, seed=4)


def test_feature_losses_follow_their_names() -> None:
    pairs = list(zip(FS.flatten().tolist(), FT.flatten().tolist(), strict=True))
    close(losses.hint_loss(FS, FT), mean([(a - b) ** 2 for a, b in pairs]))
    close(losses.feature_loss(FS, FT), mean([(a - b) ** 2 for a, b in pairs]))
    close(losses.feature_loss(FS, FT, "l1"), mean([abs(a - b) for a, b in pairs]))


AXES = {
    "channel": lambda f: f.permute(0, 2, 3, 1).reshape(-1, 4),
    "spatial": lambda f: f.reshape(-1, 30),
    "flat": lambda f: f.reshape(3, -1),
}


@pytest.mark.parametrize("axis", AXES)
def test_cosine_and_kl_run_along_the_named_axis(axis: Any) -> None:
    rows = list(zip(AXES[axis](FS).tolist(), AXES[axis](FT).tolist(), strict=True))
    cosine = mean([1 - dot(a, b) / norm(a) / norm(b) for a, b in rows])
    close(losses.feature_loss(FS, FT, "cosine", axis=axis), cosine)
    close(losses.feature_loss(FS, FT, "kl", axis=axis), mean([kl(softmax(b), softmax(a)) for a, b in rows]))
    unit = [([x / norm(a) for x in a], [x / norm(b) for x in b]) for a, b in rows]
    squares = mean([(x - y) ** 2 for a, b in unit for x, y in zip(a, b, strict=True)])
    close(losses.feature_loss(FS, FT, "mse", axis=axis, normalize=True), squares)


def test_tokens_name_their_channel_axis_and_vectors_are_one_position() -> None:
    tokens_s, tokens_t = FS.flatten(2).transpose(1, 2), FT.flatten(2).transpose(1, 2)
    expected = losses.feature_loss(FS, FT, "cosine")
    assert torch.allclose(losses.feature_loss(tokens_s, tokens_t, "cosine", channel_dim=-1), expected)
    rows = zip(S.tolist(), T.tolist(), strict=True)
    close(losses.feature_loss(S, T, "kl"), mean([kl(softmax(t), softmax(s)) for s, t in rows]))


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("normalize", [True, False])
def test_attention_maps_are_means_of_powers(p: int, normalize: bool) -> None:
    def attention(feature: Tensor) -> list[list[float]]:
        maps = []
        for sample in feature.tolist():
            q = [mean([abs(channel[i][j]) ** p for channel in sample]) for i in range(6) for j in range(5)]
            maps.append([v / norm(q) for v in q] if normalize else q)
        return maps

    other = double(3, 9, 6, 5, seed=9)
    gaps = [(a - b) ** 2 for s, t in zip(attention(FS), attention(other), strict=True) for a, b in zip(s, t, strict=True)]
    close(losses.attention_transfer_loss(FS, other, p, normalize), mean(gaps))
    close(losses.attention_transfer_loss([FS, FS], [other, other], p, normalize), 2 * mean(gaps))


def test_the_larger_attention_map_is_pooled_first() -> None:
    large = double(3, 4, 12, 10, seed=5)
    pooled = torch.stack([large[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]).mean(0)
    expected = losses.attention_transfer_loss(FS, pooled)
    assert torch.allclose(losses.attention_transfer_loss(FS, large), expected)
    swapped = losses.attention_transfer_loss(pooled, FS)
    assert torch.allclose(losses.attention_transfer_loss(large, FS), swapped)


def test_flow_is_the_product_of_consecutive_layers() -> None:
    second_s, second_t = double(3, 2, 6, 5, seed=6), double(3, 2, 6, 5, seed=7)

    def flow(a: Tensor, b: Tensor) -> list[float]:
        return [
            sum(float(a[n, i, y, x] * b[n, j, y, x]) for y in range(6) for x in range(5)) / 30
            for n in range(3)
            for i in range(4)
            for j in range(2)
        ]

    gaps = [(a - b) ** 2 for a, b in zip(flow(FS, second_s), flow(FT, second_t), strict=True)]
    close(losses.fsp_loss([FS, second_s], [FT, second_t]), mean(gaps))
    with pytest.raises(DataError, match="two layers"):
        losses.fsp_loss([FS], [FT])


def test_the_margin_is_the_mean_of_the_negative_part() -> None:
    """Against numerical integration of the truncated normal density."""
    for mu, sigma in [(0.0, 1.0), (0.5, 0.7), (-1.0, 2.0), (-0.2, 0.1)]:
        grid = torch.linspace(mu - 12 * sigma, 0.0, 400_001, dtype=torch.float64)
        density = torch.exp(-(((grid - mu) / sigma) ** 2) / 2)
        expected = torch.trapezoid(grid * density, grid) / torch.trapezoid(density, grid)
        found = losses.ofd_margin(torch.tensor([mu]), torch.tensor([-sigma]))
        assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_the_margin_of_rare_and_dead_channels_is_defined() -> None:
    found = losses.ofd_margin(torch.tensor([9.0, 0.5, -0.5]), torch.tensor([1.0, 0.0, 0.0]))
    assert found.tolist() == [-3.0, 0.0, -0.5]


def test_ofd_counts_what_the_student_overshoots_or_the_teacher_has() -> None:
    margin = torch.tensor([-0.3, -0.1, -1.0, 0.0], dtype=torch.float64)
    total = 0.0
    for n, c, y, x in itertools.product(range(3), range(4), range(6), range(5)):
        s, t = float(FS[n, c, y, x]), max(float(FT[n, c, y, x]), float(margin[c]))
        if s > t or t > 0:
            total += (s - t) ** 2
    close(losses.ofd_loss(FS, FT, margin), total / 3 / 1000)
    close(losses.ofd_loss([FS, FS], [FT, FT], [margin, margin]), 1.5 * total / 3 / 1000)


def test_hcl_averages_scales() -> None:
    s, t = double(2, 3, 8, 8, seed=8), double(2, 3, 8, 8, seed=9)

    def pooled(f: Tensor, size: int) -> Tensor:
        step = 8 // size
        return f.reshape(2, 3, size, step, size, step).mean((3, 5))

    def mse(size: int) -> float:
        return float((pooled(s, size) - pooled(t, size)).square().mean())

    close(losses.hcl_loss(s, t), (mse(8) + mse(4) / 2 + mse(2) / 4 + mse(1) / 8) / (1 + 1 / 2 + 1 / 4 + 1 / 8))
    small_s, small_t = pooled(s, 2), pooled(t, 2)
    close(losses.hcl_loss(small_s, small_t), (mse(2) + mse(1) / 2) / 1.5)
    close(losses.hcl_loss(S, T), float((S - T).square().mean()))


ES, ET = double(5, 6, seed=11), double(5, 9, seed=12)


def distances(e: Tensor) -> list[list[float]]:
    rows = e.tolist()
    d = [[norm([x - y for x, y in zip(a, b, strict=True)]) for b in rows] for a in rows]
    positive = [v for row in d for v in row if v > 0]
    return [[v / mean(positive) for v in row] for row in d]


def test_distances_are_relative_to_their_mean() -> None:
    gaps = [huber(a - b) for s, t in zip(distances(ES), distances(ET), strict=True) for a, b in zip(s, t, strict=True)]
    close(losses.distance_loss(ES, ET), mean(gaps))


def test_angles_are_over_all_triples() -> None:
    def angles(e: Tensor) -> list[float]:
        rows = e.tolist()
        found = []
        for i, j, k in itertools.product(range(5), repeat=3):
            a, b = ([x - y for x, y in zip(rows[other], rows[i], strict=True)] for other in (j, k))
            found.append(dot(a, b) / norm(a) / norm(b) if norm(a) and norm(b) else 0.0)
        return found

    close(losses.angle_loss(ES, ET), mean([huber(a - b) for a, b in zip(angles(ES), angles(ET), strict=True)]))


def test_similarity_compares_rows_of_the_gram_matrix() -> None:
    def gram(e: Tensor) -> list[list[float]]:
        rows = e.tolist()
        g = [[dot(a, b) for b in rows] for a in rows]
        return [[v / norm(row) for v in row] for row in g]

    gaps = [(a - b) ** 2 for s, t in zip(gram(ES), gram(ET), strict=True) for a, b in zip(s, t, strict=True)]
    close(losses.similarity_loss(ES, ET), sum(gaps) / 25)


def cosines(e: Tensor) -> list[list[float]]:
    rows = e.tolist()
    return [[dot(a, b) / norm(a) / norm(b) for b in rows] for a in rows]


def test_pkt_compares_neighbourhoods() -> None:
    def neighbours(e: Tensor) -> list[list[float]]:
        return [[(c / 2 + 0.5) / sum(v / 2 + 0.5 for v in row) for c in row] for row in cosines(e)]

    terms = [
        t * math.log((t + 1e-7) / (s + 1e-7))
        for a, b in zip(neighbours(ES), neighbours(ET), strict=True)
        for s, t in zip(a, b, strict=True)
    ]
    close(losses.pkt_loss(ES, ET), mean(terms))


@pytest.mark.parametrize(("gamma", "order"), [(0.4, 2), (0.7, 4)])
def test_cc_is_the_taylor_series_of_a_gaussian_kernel(gamma: float, order: int) -> None:
    def kernel(c: float) -> float:
        return sum(math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * c**p for p in range(order + 1))

    gaps = [
        (kernel(a) - kernel(b)) ** 2
        for s, t in zip(cosines(ES), cosines(ET), strict=True)
        for a, b in zip(s, t, strict=True)
    ]
    close(losses.correlation_congruence_loss(ES, ET, gamma, order), mean(gaps))


def test_nce_scores_hits_and_misses() -> None:
    positive, negatives = double(4, seed=13).exp(), double(4, 6, seed=14).exp()
    noise, total = 6 / 50, 0.0
    for x, row in zip(positive.tolist(), negatives.tolist(), strict=True):
        total += math.log(x / (x + noise + 1e-7)) + sum(math.log(noise / (v + noise + 1e-7)) for v in row)
    close(losses.nce_loss(positive, negatives, 50), -total / 4)
    close(losses.nce_loss(positive.log(), negatives.log(), 50, logarithms=True), -total / 4)
    counted = torch.ones(4, 6, dtype=torch.bool)
    counted[:, 3:] = False
    assert losses.nce_loss(positive, negatives, 50, counted) < losses.nce_loss(positive, negatives, 50)


def test_info_nce_is_the_cross_entropy_of_the_positive() -> None:
    positive, negatives = double(4, seed=13), double(4, 6, seed=14)
    rows = [
        -math.log(math.exp(p) / (math.exp(p) + sum(map(math.exp, row))))
        for p, row in zip(positive.tolist(), negatives.tolist(), strict=True)
    ]
    close(losses.info_nce_loss(positive, negatives), mean(rows))
    counted = torch.zeros(4, 6, dtype=torch.bool)
    close(losses.info_nce_loss(positive, negatives, counted), 0.0)


# What holds of all of them

LOGITS: dict[str, Loss] = {
    "kd": losses.kd_loss,
    "kd T=1": lambda s, t: losses.kd_loss(s, t, 1.0),
    "dkd": lambda s, t: losses.dkd_loss(s, t, torch.arange(len(s)) % s.shape[1]),
    "dkd T=1": lambda s, t: losses.dkd_loss(s, t, torch.arange(len(s)) % s.shape[1], temperature=1.0),
    "dist": losses.dist_loss,
    "dist T=4": lambda s, t: losses.dist_loss(s, t, temperature=4.0),
}
RELATIONS: dict[str, Loss] = {
    "distance": losses.distance_loss,
    "angle": losses.angle_loss,
    "similarity": losses.similarity_loss,
    "pkt": losses.pkt_loss,
    "cc": losses.correlation_congruence_loss,
}


def _feature(kind: str, axis: Any, normalize: bool) -> Loss:
    return lambda s, t: losses.feature_loss(s, t, kind, axis=axis, normalize=normalize)


MAPS: dict[str, Loss] = {
    "hint": losses.hint_loss,
    **{
        f"{kind} {axis}{' normalized' * n}": _feature(kind, axis, n)
        for kind in ("mse", "l1", "cosine", "kl")
        for axis in AXES
        for n in (False, True)
    },
    "at": losses.attention_transfer_loss,
    "at p=1": lambda s, t: losses.attention_transfer_loss(s, t, 1),
    "at p=3 plain": lambda s, t: losses.attention_transfer_loss(s, t, 3, False),
    "fsp": lambda s, t: losses.fsp_loss([s, s], [t, t]),
    "ofd": lambda s, t: losses.ofd_loss(s, t, losses.ofd_margin(torch.zeros(s.shape[1]), torch.zeros(s.shape[1]))),
    "hcl": losses.hcl_loss,
}


def _contrast(make: Callable[[], torch.nn.Module]) -> Loss:
    """A contrastive loss of directions, as the distiller has it."""

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        rows = [t.double() if t.dtype == torch.float64 else t.float() for t in (student, teacher)]
        with torch.autocast("cpu", enabled=False):
            pair = [unit(r.flatten(2).mean(2) if r.dim() == 4 else r) for r in rows]
            return make().to(pair[0].dtype)(*pair, torch.arange(len(student)), None)

    return loss


def _memories(temperature: float) -> dict[str, Loss]:
    return {
        f"bank T={temperature}": _contrast(lambda: MemoryBank(9, 5, 12, temperature, 0.5, 0)),
        f"queue T={temperature}": _contrast(lambda: MemoryQueue(9, 5, temperature, 0)),
        f"batch T={temperature}": _contrast(lambda: InBatch(temperature)),
    }


CONTRAST = {**_memories(0.07), **_memories(0.001)}


def hazards(shape: tuple[int, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of student and teacher that break naive code."""
    plain = lambda seed: double(*shape, seed=seed).float()  # noqa: E731
    signs = plain(3).sign() * 500
    repeated = plain(4)[:1].expand(shape).clone()
    dead = plain(5)
    dead[:, 0] = 0.0
    constant = plain(6)
    constant[:, 1] = 0.1
    return {
        "logits of 500": (signs, -signs),
        "equal logits of 500": (signs, signs.clone()),
        "one at 500": (signs, plain(1)),
        "batch of one": (plain(1)[:1], plain(2)[:1]),
        "zero rows": (torch.zeros(shape), plain(2)),
        "both zero": (torch.zeros(shape), torch.zeros(shape)),
        "one zero row": (plain(1) * (torch.arange(shape[0]) > 0).view(-1, *[1] * (len(shape) - 1)), plain(2)),
        "duplicate rows": (repeated, plain(2)),
        "duplicates in both": (repeated, repeated * 2),
        "dead channel": (dead, dead * 0.5),
        "constant column": (constant, plain(2)),
        "close rows": (plain(1) * 1e-3 + 226.0 / math.sqrt(shape[1]), plain(2) * 1e-3 + 226.0 / math.sqrt(shape[1])),
        "tiny": (plain(1) * 1e-20, plain(2) * 1e-20),
        "equal": (plain(1), plain(1)),
        "large": (plain(1) * 1e4, plain(2) * 1e4),
    }


STEEP = ("tiny", "large")
"""Where the true gradient is large: relative losses of tiny rows, powers of large ones."""

CASES = [
    pytest.param(loss, shape, hazard, id=f"{name}-{'x'.join(map(str, shape))}-{hazard}")
    for table, shapes in (
        (LOGITS, [(6, 5), (2, 3, 4, 4)]),
        (RELATIONS, [(6, 5), (3, 4, 2, 2)]),
        (CONTRAST, [(6, 5), (3, 5, 2, 2)]),
        (MAPS, [(3, 4, 6, 6)]),
    )
    for name, loss in table.items()
    for shape in shapes
    for hazard in hazards(shape)
    if not (len(shape) == 4 and name.startswith("dkd"))
    if not (name in ("at p=3 plain", "fsp") and hazard in ("one at 500", "large"))  # no length to divide by: fp16 ends
]


@pytest.mark.parametrize(("loss", "shape", "hazard"), CASES)
def test_values_and_gradients_are_finite_and_bounded(loss: Loss, shape: tuple[int, ...], hazard: str) -> None:
    s, t = hazards(shape)[hazard]
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        student = s.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype in (torch.bfloat16, torch.float16)):
            value = loss(student, t.to(dtype))
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert value.shape == () and bool(value.isfinite()) and float(value.detach()) > -1e-5
        (gradient,) = torch.autograd.grad(value, student, allow_unused=True)
        assert gradient is None or bool(gradient.isfinite().all())
        assert gradient is None or hazard in STEEP or float(gradient.abs().max()) < 1e6


@pytest.mark.parametrize(("name", "loss"), [*LOGITS.items(), *RELATIONS.items(), *MAPS.items()])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**16), batch=st.integers(2, 5), scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_losses_vanish_at_the_teacher_and_do_not_depend_on_the_order_of_samples(
    name: str, loss: Loss, seed: int, batch: int, scale: float
) -> None:
    shape = (batch, 5, 4, 4) if name in MAPS else (batch, 6)
    s, t = double(*shape, seed=seed, scale=scale), double(*shape, seed=seed + 1, scale=scale)
    if name != "ofd" and not name.startswith("dist"):  # a margin moves the teacher; a constant column has r = 0
        assert float(loss(t, t)) == pytest.approx(0.0, abs=1e-5)
    assert float(loss(s, t)) >= -1e-12
    if not name.startswith("dkd"):
        order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
        assert float(loss(s[order], t[order])) == pytest.approx(float(loss(s, t)), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("name", "loss"), [*LOGITS.items(), *RELATIONS.items(), *MAPS.items()])
def test_analytic_gradients_are_the_numeric_ones(name: str, loss: Loss) -> None:
    shape = (3, 4, 5, 5) if name in MAPS else (3, 4)
    s, t = double(*shape, seed=21).requires_grad_(), double(*shape, seed=22)
    assert torch.autograd.gradcheck(lambda x: loss(x, t), s)


def test_dense_logits_are_averaged_per_position() -> None:
    s, t = double(2, 4, 3, 5, seed=31), double(2, 4, 3, 5, seed=32)
    rows_s, rows_t = s.permute(0, 2, 3, 1).reshape(-1, 4), t.permute(0, 2, 3, 1).reshape(-1, 4)
    y = torch.randint(4, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(losses.kd_loss(s, t), losses.kd_loss(rows_s, rows_t))
    assert torch.allclose(losses.dist_loss(s, t), losses.dist_loss(rows_s, rows_t))
    assert torch.allclose(losses.dkd_loss(s, t, y), losses.dkd_loss(rows_s, rows_t, y.flatten()))


def test_ignored_labels_do_not_count() -> None:
    y = torch.tensor([0, 255, 2, 255, 1])
    kept = y != 255
    found = losses.dkd_loss(S, T, y, ignore_index=255)
    assert torch.allclose(found, losses.dkd_loss(S[kept], T[kept], y[kept]))
    assert float(losses.dkd_loss(S, T, torch.full((5,), 255), ignore_index=255)) == 0.0


def test_close_rows_keep_their_true_distances() -> None:
    base = double(8, 32, seed=41) * 1e-3
    far = base + 226 / math.sqrt(32)
    other = double(8, 32, seed=42)
    exact = losses.distance_loss(far.float().double(), other)
    assert torch.allclose(losses.distance_loss(far.float(), other.float()).double(), exact, rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: losses.kd_loss(S, T[:, :5]), "the student tells 7 classes apart and the teacher 5"),
        (lambda: losses.kd_loss(S[:, 0], T[:, 0]), r"logits are \(B, C\)"),
        (lambda: losses.kd_loss(S, T[:3]), "the teacher's"),
        (lambda: losses.dkd_loss(S, T, torch.tensor([0, 1, 2, 3, 7])), "label 7 is out of range"),
        (lambda: losses.dkd_loss(S, T, torch.tensor([0, 1, 2, 3, -1])), "label -1 is out of range"),
        (lambda: losses.dkd_loss(S, T, torch.rand(5)), "class numbers"),
        (lambda: losses.dkd_loss(S, T, None), "labels are a NoneType"),  # type: ignore[arg-type]
        (lambda: losses.feature_loss(S[0], T[0]), "single axis"),
        (lambda: losses.angle_loss(ES[:, 0], ET[:, 0]), r"embeddings are \(B, D\)"),
        (lambda: losses.dkd_loss(S, T, Y[:2]), "2 labels for 5 rows"),
        (lambda: losses.dkd_loss(S[:, :1], T[:, :1], torch.zeros(5, dtype=torch.long)), "two classes"),
        (lambda: losses.hint_loss(FS, FT[:, :2]), "project and resize it first"),
        (lambda: losses.hint_loss(FS, FT[:1]), "batch"),
        (lambda: losses.hint_loss([FS], [FT, FT]), "1 layers of the student"),
        (lambda: losses.feature_loss(FS, FT, "l2"), "no loss_type 'l2'"),
        (lambda: losses.feature_loss(FS, FT, axis="depth"), "no axis 'depth'"),  # type: ignore[arg-type]
        (lambda: losses.attention_transfer_loss(FS, FT, 0.5), "1 or more"),
        (lambda: losses.attention_transfer_loss(S, T), "equal rank"),
        (lambda: losses.distance_loss(ES, ET[:2]), "batch"),
        (lambda: losses.distance_loss(ES[:0], ET[:0]), r"shape \(0, \d+\): it has no values"),
        (lambda: losses.pkt_loss(student=None, teacher=ET), "pkt_loss was given a NoneType"),  # type: ignore[arg-type]
        (lambda: losses.kd_loss(S, T, 0.0), "temperature is 0.0"),
        (lambda: losses.dkd_loss(S, T, Y, temperature=math.nan), "temperature is nan"),
        (lambda: losses.dist_loss(S, T, temperature=-1.0), "temperature is -1.0"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Tensor], match: str) -> None:
    with pytest.raises((DataError, ConfigError), match=match):
        call()
