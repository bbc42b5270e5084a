"""Rounding by second-order information against the optimum, against the formulas, and against rounding to nearest."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxcompress
from fxcompress import PassManager, QATQuantizer
from fxcompress.backends.saturation import largest_activation
from fxcompress.graph.results import output_snr
from fxcompress.quantization.second_order import second_order_levels
from tests.imbalanced import mobile


def plan(bits: int, *more: Any, **observing: Any) -> list[Any]:
    observe = {"calibrator": "minmax", "overrides": {"*": {"weight_bits": bits}}, **observing}
    return ["fold-batchnorm", "fuse-activations", {"insert-observers": observe}, "calibrate", *more, "fold-quantization"]


def run(model: nn.Module, data: list[Tensor], steps: list[Any]) -> tuple[Any, list[str]]:
    manager = PassManager(steps, reproducer=False, progress=False)
    result = manager.run(model, data=data)
    return result, [f"{r.node}: {r.reason}" for r in manager.ledger.remarks("gptq")]


def correlated(count: int, inputs: int, seed: int = 0) -> Tensor:
    """Samples whose inputs go together, as those of a layer do."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(count, max(1, inputs // 4), generator=generator, dtype=torch.float64)
    mixing = torch.randn(max(1, inputs // 4), inputs, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return few @ mixing + 0.3 * torch.randn(count, inputs, generator=generator, dtype=torch.float64)


def levels(rows: Tensor, scale: Tensor, x: Tensor, reach: float = 7, **options: Any) -> Tensor:
    """The levels of one group; ``x`` is ``[samples, inputs]``."""
    end = torch.full((1, rows.shape[0], 1), reach, dtype=rows.dtype)
    found = second_order_levels(rows[None], scale[None], -end, end, (x.T @ x)[None], **options)
    assert found is not None
    return found[0]


def loss(candidate: Tensor, rows: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """Per output, the squared error of the results, in float64."""
    return (x @ (candidate.double() * scale.double() - rows.double()).T).square().sum(0)


def test_it_is_near_the_best_of_all_roundings_of_small_layers() -> None:
    """All 3⁷ roundings within a step of twenty layers' weights tried; on the geometric mean it costs little more."""
    excess = []
    steps = torch.tensor(list(itertools.product((-1, 0, 1), repeat=7)), dtype=torch.float64)
    for seed in range(20):
        torch.manual_seed(seed)
        rows, scale, x = torch.randn(1, 7).double(), torch.full((1, 1), 0.5).double(), correlated(64, 7, seed)
        nearest = (rows / scale).round()
        best = loss((nearest + steps).clamp(-7, 7), rows.expand(len(steps), -1), scale, x).min()
        found, plain = (float(loss(c, rows, scale, x) / best) for c in (levels(rows, scale, x), nearest.clamp(-7, 7)))
        assert found <= plain * 1.001
        excess.append((found, plain))
    found, plain = torch.tensor(excess, dtype=torch.float64).log().mean(0).exp().tolist()
    assert found < 1.4 < plain


def test_it_is_the_recursion_of_the_paper() -> None:
    """Column by column with the inverse Hessian's Cholesky factor, as Frantar et al. write it, in their order of columns."""
    torch.manual_seed(0)
    rows, x = torch.randn(5, 40).double(), correlated(200, 40)
    scale = rows.abs().amax(1, keepdim=True) / 7
    hessian = x.T @ x
    hessian += 0.02 * hessian.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    order = hessian.diagonal().argsort(descending=True)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    work, expected = rows[:, order].clone(), torch.empty_like(rows)
    for k in range(40):
        level = (work[:, k] / scale[:, 0]).round().clamp(-7, 7)
        expected[:, order[k]] = level
        error = (work[:, k] - level * scale[:, 0]) / upper[k, k]
        work[:, k:] -= error[:, None] * upper[k, k:]
    for block in (1, 7, 40, 128):
        assert torch.equal(levels(rows, scale, x, damping=0.02, block=block), expected)
    assert torch.equal(levels(rows.float(), scale.float(), x.float(), damping=0.02), expected.float())


@given(st.integers(2, 8), st.integers(1, 33), st.integers(1, 5), st.integers(1, 60), st.booleans(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_levels_are_on_the_grid_and_cost_no_more_than_the_nearest_where_samples_are_known(
    bits: int, inputs: int, outputs: int, samples: int, adjacent: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    rows, x, top = torch.randn(outputs, inputs), correlated(samples, inputs, seed).float(), 2 ** (bits - 1) - 1
    x[:, torch.rand(inputs) < 0.2] = 0.0
    scale = rows.abs().amax(1, keepdim=True) / top
    found = levels(rows, scale, x, float(top), adjacent=adjacent)
    assert torch.equal(found, found.round()) and int(found.abs().max()) <= top
    if adjacent:
        assert bool(((found - rows / scale).abs() < 1 + 1e-4).all())
    dead = ~x.any(0)
    assert torch.equal(found[:, dead], (rows / scale).round().clamp(-top, top)[:, dead])


def test_inputs_that_are_all_dead_or_not_finite_are_told() -> None:
    rows, scale = torch.randn(3, 4), torch.full((3, 1), 0.1)
    assert torch.equal(levels(rows, scale, torch.zeros(5, 4)), (rows / scale).round().clamp(-7, 7))
    ends = torch.full((1, 3, 1), 7.0)
    assert second_order_levels(rows[None], scale[None], -ends, ends, torch.full((1, 4, 4), torch.nan)) is None


LAYERS = {
    "linear": (lambda: nn.Linear(24, 10), (4, 3, 24)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding="same", dilation=2), (4, 6, 20)),
    "conv2d": (lambda: nn.Conv2d(6, 8, (3, 2), stride=2, padding=1), (4, 6, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(6, 4, 3, padding=(0, 1, 2)), (2, 6, 5, 5, 5)),
    "grouped": (lambda: nn.Conv2d(8, 8, 3, groups=2, padding=1), (4, 8, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(8, 16, 3, groups=8, padding=1), (4, 8, 8, 8)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(6, 8, 4, stride=3, padding=1), (4, 6, 9)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1), (4, 6, 5, 5)),
}


def smooth(shape: tuple[int, ...], seed: int) -> Tensor:
    """Inputs whose channels go together, and neighbours in space too."""
    generator = torch.Generator().manual_seed(seed)
    axis = -1 if len(shape) == 3 and shape[1] == 3 else 1
    few = torch.randn(*[2 if d == axis % len(shape) else n for d, n in enumerate(shape)], generator=generator)
    mixing = torch.randn(2, shape[axis], generator=torch.Generator().manual_seed(9))
    mixed = torch.tensordot(few, mixing, dims=([axis], [0])).movedim(-1, axis)
    for d in range(2, len(shape) if axis == 1 else 2):
        mixed = sum((mixed.roll(shift, d) for shift in range(1, 4)), mixed)
    return mixed + 0.1 * torch.randn(shape, generator=generator)


@pytest.mark.parametrize("backend", ["fbgemm", "onnxruntime"])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer_is_nearer_on_data_it_has_not_seen(kind: str, backend: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    model = nn.Sequential(make()).eval()  # type: ignore[no-untyped-call]
    data, unseen = [smooth(shape, seed) for seed in range(8)], torch.cat([smooth(shape, seed) for seed in range(50, 60)])
    with torch.no_grad():
        expected = model(unseen)
        plain, found = (run(model, data, plan(4, *more, backend=backend))[0](unseen) for more in ((), ("gptq",)))
    assert output_snr(expected, found) > output_snr(expected, plain) + 1


def test_a_grouped_convolution_is_its_groups_side_by_side() -> None:
    torch.manual_seed(0)
    grouped = nn.Conv2d(6, 8, 3, groups=2, bias=False)
    halves = [nn.Conv2d(3, 4, 3, bias=False) for _ in range(2)]
    for half, weight in zip(halves, grouped.weight.chunk(2), strict=True):
        half.weight.data.copy_(weight)

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.halves = nn.ModuleList(halves)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([half(part) for half, part in zip(self.halves, x.chunk(2, 1), strict=True)], 1)

    data = [smooth((4, 6, 8, 8), seed) for seed in range(4)]
    one, two = (run(model.eval(), data, plan(4, "gptq"))[0] for model in (nn.Sequential(grouped), Split()))
    side_by_side = torch.cat([two.get_buffer(f"halves.{i}.weight") for i in range(2)])
    nearest = run(nn.Sequential(grouped).eval(), data, plan(4))[0].get_buffer("0.weight")
    assert int((one.get_buffer("0.weight") != side_by_side).sum()) <= 2  # sums in another order may tip a tie
    assert int((one.get_buffer("0.weight") != nearest).sum()) > 20


@pytest.mark.parametrize("bits", [3, 4])
def test_it_beats_rounding_to_nearest_on_data_it_has_not_seen(bits: int) -> None:
    torch.manual_seed(2)
    model, data, unseen = mobile(), [torch.randn(16, 3, 12, 12) for _ in range(4)], torch.randn(64, 3, 12, 12)
    with torch.no_grad():
        plain, found = (output_snr(model(unseen), run(model, data, plan(bits, *m))[0](unseen)) for m in ((), ("gptq",)))
    assert found > plain + 1.5


def test_few_samples_do_no_harm() -> None:
    """Fewer samples than inputs: what is fitted to them must serve others."""
    gained = []
    for seed, count in itertools.product(range(5), (2, 12, 100)):
        torch.manual_seed(seed)
        rows, x, unseen = torch.randn(32, 256).double(), correlated(count, 256, seed), correlated(500, 256, seed + 100)
        scale = rows.abs().amax(1, keepdim=True) / 7
        both = levels(rows, scale, x, samples=count), (rows / scale).round()
        found, plain = (float(loss(candidate, rows, scale, unseen).sum()) for candidate in both)
        assert found < 1.02 * plain
        gained.append(plain / found)
    assert max(gained) > 1.2


@pytest.mark.parametrize("observing", [{}, {"per_channel": False}, {"symmetric": False}, {"reduce_range": True}])
def test_weights_end_on_their_grid_and_scales_stay(observing: dict[str, Any]) -> None:
    torch.manual_seed(2)
    model, data = mobile(), [torch.randn(16, 3, 12, 12)]
    nearest, found = (run(model, data, plan(4, *more, **observing))[0] for more in ((), ("gptq",)))
    changed = 0
    for name, buffer in nearest.named_buffers():
        other = found.get_buffer(name)
        assert buffer.dtype == other.dtype
        if name.endswith(("_scale", "_zero_point")):
            assert torch.equal(buffer, other)
        elif name.endswith("weight"):
            assert int(other.min()) >= -8 and int(other.max()) <= 7
            changed += int((buffer != other).sum())
    assert changed


def test_weights_stay_in_float_until_they_are_folded() -> None:
    """What is rounded is kept beside the weight, so that a layer can go back to float, and another pass can start anew."""
    torch.manual_seed(2)
    model, data = mobile(), [torch.randn(16, 3, 12, 12)]
    observed, _ = run(model, data, plan(4, "gptq")[:-1])
    kept = dict(observed.named_parameters())
    assert all(torch.equal(kept[name], value) for name, value in model.named_parameters() if name.endswith("weight"))
    again, _ = run(observed, data, [{"adaround": {"iterations": 50}}, "fold-quantization"])
    directly, _ = run(model, data, plan(4, {"adaround": {"iterations": 50}}))
    assert torch.equal(again(data[0]), directly(data[0]))


def test_bounded_pairs_stay_bounded() -> None:
    """Where 16-bit sums could saturate, no pair of the rounded weights sums beyond 128."""
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(64, 32)).eval(), [correlated(256, 64).float()]
    observed, _ = run(model, data, plan(8)[:-1])
    observed.meta["quantization"]["bound_pairs"] = True
    result, _ = run(observed, data, ["gptq", "fold-quantization"])
    plain, _ = run(observed, data, ["fold-quantization"])
    weight = result.get_buffer("0.weight")
    assert largest_activation(weight) == 255
    assert not torch.equal(weight, plain.get_buffer("0.weight"))


def test_a_layer_that_gains_nothing_keeps_its_rounding_and_says_so() -> None:
    layer = nn.Linear(8, 8)
    nn.init.eye_(layer.weight)
    model = nn.Sequential(layer).eval()
    result, said = run(model, [torch.randn(16, 8)], plan(8, "gptq"))
    assert said == ["0: no rounding was found that is better than the one it has"]
    assert torch.equal(result.get_buffer("0.weight"), 127 * torch.eye(8, dtype=torch.int8))


def test_layers_can_be_chosen() -> None:
    torch.manual_seed(2)
    model, data = mobile(), [torch.randn(16, 3, 12, 12)]
    nearest, found = (run(model, data, plan(4, *m))[0] for m in ((), ({"gptq": {"include_layers": ["3.*"]}},)))
    changed = [n for n, b in nearest.named_buffers() if not torch.equal(b, found.get_buffer(n))]
    assert changed and all(name.startswith("3.") for name in changed)


def test_a_rounded_model_copies_pickles_and_saves(tmp_path: Path) -> None:
    torch.manual_seed(2)
    data = [torch.randn(16, 3, 12, 12)]
    rounded, _ = run(mobile(), data, plan(4, "gptq", "correct-bias")[:-1])
    fxcompress.save(rounded, tmp_path / "model")
    others = [copy.deepcopy(rounded), pickle.loads(pickle.dumps(rounded)), fxcompress.load(tmp_path / "model")]
    expected = run(rounded, data, ["fold-quantization"])[0](data[0])
    assert torch.equal(expected, rounded(data[0])) or output_snr(expected, rounded(data[0])) > 20
    assert all(torch.equal(run(other, data, ["fold-quantization"])[0](data[0]), expected) for other in others)


def test_a_trained_model_keeps_its_scales() -> None:
    torch.manual_seed(2)
    data = [torch.randn(16, 3, 12, 12)]
    prepared = QATQuantizer(bits=4).prepare(mobile().train(), data[0])
    prepared(data[0])
    end = ["freeze-scales", "fold-batchnorm", "fuse-activations", "fold-quantization"]
    plain, found = (run(prepared.eval(), data, [*more, *end])[0] for more in ([], ["gptq"]))
    assert all(torch.equal(b, found.get_buffer(n)) for n, b in plain.named_buffers() if n.endswith("_scale"))
    assert any(not torch.equal(b, found.get_buffer(n)) for n, b in plain.named_buffers())
