"""The fake-quantize operator against float64 formulas, torch's own operators, and autograd of what is written out."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.graph import qdq
from fxcompress.graph.fakequant import fake_quantize

GRIDS = [(0, 255, 0), (0, 255, 131), (0, 15, 8), (-127, 127, 0), (-8, 7, 0), (-2, 1, 0), (0, 3, 0)]


def integer(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int32)


def written_out(x: Tensor, scale: Tensor, zero: int, low: int, high: int, clip: bool = False) -> Tensor:
    """s·(clamp(round(x/s) + z) − z), with round and clamp as the straight-through estimator has them.

    ``clip``: s·round(clamp(x/s)), as learned step sizes have it.
    """
    ratio = x / scale
    if clip:
        held = ratio.clamp(low - zero, high - zero)
        return (held + (held.round() - held).detach()) * scale
    rounded = ratio + (torch.round(ratio) - ratio).detach()
    level = rounded + zero
    inside = (level.detach().round() >= low) & (level.detach().round() <= high)
    held = torch.where(inside, level, level.detach().clamp(low, high))
    return (held - zero) * scale


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("low", "high", "zero"), GRIDS)
def test_values_and_both_gradients_are_autograd_of_the_formula_written_out(
    low: int, high: int, zero: int, clip: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 5, 4, dtype=torch.float64).mul(0.2 * (high - low)).requires_grad_()
    scale, weight = torch.tensor(0.37, dtype=torch.float64, requires_grad=True), torch.randn(6, 5, 4, dtype=torch.float64)
    ours = fake_quantize(x, scale, integer(zero), None, low, high, clip)
    theirs = written_out(x, scale, zero, low, high, clip)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    found = torch.autograd.grad((ours * weight).sum(), (x, scale))
    expected = torch.autograd.grad((theirs * weight).sum(), (x, scale))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)
    assert (found[0] == 0).any() and (found[0] != 0).any()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_scale_per_channel_is_that_many_scales(axis: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, dtype=torch.float64).mul(9).requires_grad_()
    scale = (torch.rand(x.shape[axis], dtype=torch.float64) + 0.1).requires_grad_()
    weight = torch.randn_like(x)
    ours = (fake_quantize(x, scale, integer(0), axis, -8, 7) * weight).sum()
    pairs = zip(x.unbind(axis), scale.unbind(), weight.unbind(axis), strict=True)
    theirs = torch.stack([(written_out(rows, s, 0, -8, 7) * w).sum() for rows, s, w in pairs]).sum()
    for a, b in zip(torch.autograd.grad(ours, (x, scale)), torch.autograd.grad(theirs, (x, scale)), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("low", "high", "zero"), GRIDS)
def test_it_is_what_torch_computes(low: int, high: int, zero: int) -> None:
    """torch multiplies by 1/s where we divide by s: equal except where that rounds a tie the other way."""
    torch.manual_seed(1)
    x = torch.randn(4000).mul(30).requires_grad_()
    ours = fake_quantize(x, torch.tensor(0.3), integer(zero), None, low, high)
    theirs = torch.fake_quantize_per_tensor_affine(x, 0.3, zero, low, high)
    assert ((ours - theirs).abs() < 1e-5).double().mean() >= 0.999
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (ours, theirs)]
    assert (gradients[0] == gradients[1]).double().mean() >= 0.999


def test_a_learned_scale_has_the_gradient_of_torchs_learnable_operator() -> None:
    torch.manual_seed(2)
    x, factor = torch.randn(64, 9).mul(4), 0.25
    scale = torch.tensor([0.21], requires_grad=True)
    theirs = torch._fake_quantize_learnable_per_tensor_affine(x, scale, torch.zeros(1), -8, 7, factor)
    weight = torch.randn_like(x)
    expected = torch.autograd.grad((theirs * weight).sum(), scale)[0]
    ours = fake_quantize(x, scale.squeeze(), integer(0), None, -8, 7, False)
    assert torch.allclose(torch.autograd.grad((ours * weight).sum(), scale)[0] * factor, expected, rtol=1e-4)


@given(st.integers(0, 2**16), st.sampled_from([(0, 255, 131), (0, 15, 3), (0, 127, 0)]), st.floats(1e-6, 1e4))
@settings(max_examples=60, deadline=None)
def test_it_is_dequantize_after_quantize_bit_for_bit(seed: int, grid: tuple[int, int, int], scale: float) -> None:
    low, high, zero = grid
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, generator=generator) * scale * 100
    step = torch.tensor(scale)
    expected = qdq.dequantize(qdq.quantize(x, float(step), zero, low, high, torch.uint8), float(step), zero)
    found = fake_quantize(x, step, integer(zero), None, low, high)
    assert torch.equal(found, expected)
    assert torch.equal(fake_quantize(found, step, integer(zero), None, low, high), found)


def test_gradients_are_one_inside_the_range_and_zero_outside() -> None:
    x = torch.tensor([-1.0, -0.26, -0.24, 0.0, 1.0, 127.7, 127.8, 1e9], requires_grad=True)
    fake_quantize(x, torch.tensor(0.5), integer(0), None, 0, 255).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


def test_averages_of_grid_values_round_their_ties_to_even() -> None:
    levels = torch.randint(0, 256, (4000, 4), generator=torch.Generator().manual_seed(0))
    scale = torch.tensor(0.037)
    values = (levels - 3) * scale
    expected = torch.round((levels - 3).double().mean(1)) * scale
    found = fake_quantize(values.mean(1), scale, integer(3), None, 0, 255, False, True)
    assert torch.equal(found, expected.float())


def test_a_scale_of_zero_passes_values_and_gradients() -> None:
    x = torch.randn(5, requires_grad=True)
    result = fake_quantize(x, torch.tensor(0.0), integer(0), None, 0, 255)
    assert torch.equal(result, x)
    assert torch.equal(torch.autograd.grad(result.sum(), x)[0], torch.ones(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_in_single_and_keeps_its_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(50).to(dtype).requires_grad_()
    result = fake_quantize(x, torch.tensor(0.1), integer(7), None, 0, 15)
    expected = fake_quantize(x.detach().float(), torch.tensor(0.1), integer(7), None, 0, 15)
    assert result.dtype == dtype
    assert torch.equal(result, expected.to(dtype))
    assert torch.autograd.grad(result.sum(), x)[0].dtype == dtype


def test_it_has_meta_kernels_and_survives_ahead_of_time_autograd() -> None:
    x, scale = torch.randn(3, 4, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    warnings.simplefilter("ignore", UserWarning)  # opcheck itself reads .grad of a tensor that is no leaf
    torch.library.opcheck(fake_quantize, (x, scale, integer(3), None, 0, 15))
    torch.library.opcheck(fake_quantize, (x, (torch.rand(4) + 0.1).requires_grad_(), integer(0), 1, -8, 7))
    assert fake_quantize(x.to("meta"), scale.to("meta"), integer(3).to("meta"), None, 0, 15).shape == (3, 4)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_step_of_lsq_has_the_papers_start_and_gradient(bits: int) -> None:
    """Esser et al. 2020: s₀ = 2·mean|w|/√Qp; ∂/∂s = g·Σ ∂L/∂ŵ·{−w/s + round(w/s), −Qn, Qp}; g = 1/√(N·Qp)."""
    from fxcompress.quantization.fake_quant import LearnedFakeQuantize
    from fxcompress.quantization.grid import Grid

    torch.manual_seed(bits)
    top = 2 ** (bits - 1) - 1
    bottom = -top - (bits < 8)
    weight, upstream = torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
    fake = LearnedFakeQuantize(Grid(torch.int8, bottom, top, True), weight=weight, axis=0)
    (fake(weight) * upstream).sum().backward()
    for channel in range(4):
        w, g = weight[channel].double().flatten(), upstream[channel].double().flatten()
        s = 2 * w.abs().mean() / math.sqrt(top)
        assert math.isclose(fake.scale[channel].item(), s.item(), rel_tol=1e-5)
        ratio = w / s
        slope = torch.where(ratio <= bottom, float(bottom), torch.where(ratio >= top, float(top), ratio.round() - ratio))
        expected = (g * slope).sum() / math.sqrt(w.numel() * top)
        assert fake.scale.grad is not None
        assert math.isclose(fake.scale.grad[channel].item(), expected.item(), rel_tol=1e-3, abs_tol=1e-4)
