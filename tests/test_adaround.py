"""Adaptive rounding against the formulas of the paper, and against rounding to nearest."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress import PassManager, QATQuantizer
from fxcompress.errors import ConfigError
from fxcompress.graph.results import output_snr
from fxcompress.quantization.grid import Grid
from fxcompress.quantization.rounding import Rounding, adaptive_levels, rectified_sigmoid, regularizer
from tests.imbalanced import imbalanced, mobile


def plan(bits: int, *more: Any) -> list[Any]:
    observe = {"calibrator": "minmax", "overrides": {"*": {"weight_bits": bits}}}
    return ["fold-batchnorm", "fuse-activations", {"insert-observers": observe}, "calibrate", *more, "fold-quantization"]


def run(model: nn.Module, data: list[Tensor], steps: list[Any], seed: int = 0) -> Any:
    return PassManager(steps, reproducer=False, progress=False, seed=seed).run(model, data=data)


def data() -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randn(16, 3, 12, 12) for _ in range(4)]


QUICK: dict[str, Any] = {"adaround": {"iterations": 200, "batch_size": 16}}
ONE: dict[str, Any] = {"adaround": {**QUICK["adaround"], "include_layers": ["3.*"]}}


def test_the_parts_are_those_of_the_paper() -> None:
    v = torch.linspace(-8, 8, 101, dtype=torch.float64)
    expected = ((1 / (1 + torch.exp(-v))) * 1.2 - 0.1).clip(0, 1)
    assert torch.allclose(rectified_sigmoid(v), expected)
    assert float(regularizer(torch.tensor([0.0, 1.0, 1.0]), 2.0)) == 0.0
    assert float(regularizer(torch.tensor([0.5, 0.25]), 2.0)) == pytest.approx((1.0 + (1 - 0.25)) / 2)


def test_it_finds_the_best_of_all_roundings_of_a_small_layer() -> None:
    """Every one of 2⁸ roundings tried, in float64; the learned one is among the best, and better than the nearest."""
    torch.manual_seed(0)
    weight, scale = torch.randn(1, 8), torch.full((1, 1), 0.5)
    mixing = torch.randn(8, 8)
    x = torch.randn(256, 8) @ mixing
    y = x @ weight.T
    grid = Grid(torch.int8, -7, 7, True)
    options = Rounding(iterations=300, batch_size=64)
    zero = torch.zeros(1, 1, dtype=torch.int32)
    levels = adaptive_levels(
        weight, scale, zero, grid, torch.nn.functional.linear, [x], [y], options, torch.Generator().manual_seed(0)
    )
    floor = (weight / scale).floor().double()

    def loss(candidate: Tensor) -> float:
        return float((x.double() @ (candidate * scale.double()).T - y.double()).square().mean())

    everything = sorted(
        loss(floor + torch.tensor([bits], dtype=torch.float64)) for bits in itertools.product((0, 1), repeat=8)
    )
    assert set((levels - floor).flatten().tolist()) <= {0.0, 1.0}
    assert loss(levels.double()) <= everything[3]
    assert loss(levels.double()) < loss((weight / scale).round().double())


@pytest.mark.parametrize("bits", [3, 4])
def test_it_beats_rounding_to_nearest_on_data_it_has_not_seen(bits: int) -> None:
    model, x = mobile(), torch.randn(32, 3, 12, 12)
    with torch.no_grad():
        plain, learned = (output_snr(model(x), run(model, data(), plan(bits, *more))(x)) for more in ((), (QUICK,)))
    assert learned > plain + 2


def test_it_mends_imbalanced_channels_on_one_scale() -> None:
    model, x = imbalanced(mobile(), octaves=4), torch.randn(32, 3, 12, 12)
    steps = plan(4)
    steps[2]["insert-observers"]["per_channel"] = False
    with torch.no_grad():
        plain = output_snr(model(x), run(model, data(), steps)(x))
        learned = output_snr(model(x), run(model, data(), [*steps[:-1], QUICK, steps[-1]])(x))
    assert learned > plain + 2


def test_weights_end_on_their_grid_one_step_from_where_they_were_and_scales_stay() -> None:
    model = mobile()
    nearest, learned = run(model, data(), plan(4)), run(model, data(), plan(4, QUICK))
    for name, buffer in nearest.named_buffers():
        if name.endswith("weight_scale"):
            assert torch.equal(buffer, learned.get_buffer(name))
        elif name.endswith("weight"):
            assert buffer.dtype == learned.get_buffer(name).dtype == torch.int8
            assert int((buffer.int() - learned.get_buffer(name).int()).abs().max()) <= 1
            assert int(learned.get_buffer(name).abs().max()) <= 7


def test_the_seed_decides_and_layers_can_be_chosen() -> None:
    model = mobile()
    one, same, other = (run(model, data(), plan(4, ONE), seed) for seed in (1, 1, 2))
    x = data()[0]
    assert torch.equal(one(x), same(x)) and not torch.equal(one(x), other(x))
    nearest = run(model, data(), plan(4))
    changed = [n for n, b in nearest.named_buffers() if not torch.equal(b, one.get_buffer(n))]
    assert changed and all(name.startswith("3.") for name in changed)
    with pytest.raises(ConfigError, match="no layer is called 'nine'"):
        run(model, data(), plan(4, {"adaround": {"exclude_layers": ["nine"]}}))


def test_a_rounded_model_copies_pickles_saves_and_corrects_biases_too(tmp_path: Path) -> None:
    rounded = run(mobile(), data(), [*plan(4, ONE)[:-1], "correct-bias"])
    fxcompress.save(rounded, tmp_path / "model")
    others = [copy.deepcopy(rounded), pickle.loads(pickle.dumps(rounded)), fxcompress.load(tmp_path / "model")]
    x = data()[0]
    expected = run(rounded, data(), ["fold-quantization"])(x)
    assert all(torch.equal(run(other, data(), ["fold-quantization"])(x), expected) for other in others)


def test_a_trained_model_can_be_rounded_again() -> None:
    quantizer = QATQuantizer(bits=4)
    prepared = quantizer.prepare(mobile().train(), data()[0])
    prepared(data()[0])
    result = run(
        prepared.eval(), data(), [QUICK, "freeze-scales", "fold-batchnorm", "fuse-activations", "fold-quantization"]
    )
    assert bool(result(data()[0]).isfinite().all())
