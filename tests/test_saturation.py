"""16-bit saturation: the pair bound against an emulation of vpmaddubsw, and weights that satisfy it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxcompress import PassManager, backends
from fxcompress.backends import cpu, fbgemm, saturation
from fxcompress.quantization.weights import quantize_weight


def saturating_product(activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """u8·s8 dot products as x86 without VNNI computes them: pairs summed in a saturating int16, then in int32."""
    if weights.shape[1] % 2:
        activations = np.pad(activations, ((0, 0), (0, 1)))
        weights = np.pad(weights, ((0, 0), (0, 1)))
    products = activations[:, None].astype(np.int64) * weights[None].astype(np.int64)
    pairs = products[..., 0::2] + products[..., 1::2]
    return np.clip(pairs, -32768, 32767).sum(-1)


def exact_product(activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return activations.astype(np.int64) @ weights.astype(np.int64).T


weights_strategy = st.integers(1, 9).flatmap(
    lambda k: st.lists(st.lists(st.integers(-128, 127), min_size=k, max_size=k), min_size=1, max_size=4)
)


@given(weights_strategy)
def test_the_bound_is_safe_and_one_more_is_not(rows: list[list[int]]) -> None:
    weights = np.array(rows, dtype=np.int8)
    limit = saturation.largest_activation(torch.from_numpy(weights))
    for mask in _worst_masks(weights, limit):
        assert (saturating_product(mask, weights) == exact_product(mask, weights)).all()
    if limit < 255:
        worst = np.concatenate(_worst_masks(weights, limit + 1))
        assert (saturating_product(worst, weights) != exact_product(worst, weights)).any()


def _worst_masks(weights: np.ndarray, value: int) -> list[np.ndarray]:
    """Activations that put ``value`` under the weights of one sign, for each channel and sign."""
    return [(value * (sign * weights.astype(np.int16) > 0)).astype(np.uint8) for sign in (1, -1)]


@given(
    st.integers(0, 2**16), st.sampled_from([(8, 3, 3, 3), (4, 16, 1, 1), (6, 5), (4, 7, 3, 3), (3, 1, 3, 3)]), st.booleans()
)
def test_bounded_weights_never_saturate_at_full_range(seed: int, shape: tuple[int, ...], per_channel: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) ** 3
    levels, scale, _ = quantize_weight(weight, per_channel=per_channel, bound_pairs=True)
    rows = saturation.reduction_rows(levels).numpy()
    for activations in _worst_masks(rows, 255):
        assert (saturating_product(activations, rows) == exact_product(activations, rows)).all()
    assert saturation.largest_activation(levels) == 255
    unit = scale.reshape(-1, *[1] * (weight.dim() - 1))
    assert ((levels * unit - weight).abs() <= unit * 0.5000001).all()


def test_any_two_elements_are_bounded_where_the_packing_is_not_known() -> None:
    weight = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    levels, _, _ = quantize_weight(weight, bound_pairs=True, adjacent=False)
    assert int(levels.max()) + int(levels.max()) <= saturation.LIMIT


def test_unbounded_weights_use_the_whole_grid() -> None:
    levels, scale, _ = quantize_weight(torch.tensor([[2.0, 2.0], [0.0, 0.0]]))
    assert levels.tolist() == [[127, 127], [0, 0]]
    assert scale.tolist() == pytest.approx([2 / 127, 1 / 127])


class _Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.linear = nn.Linear(8, 4)
        for parameter in self.parameters():
            nn.init.ones_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.depthwise(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize("saturates", [True, False])
def test_a_cpu_that_saturates_gets_bounded_weights(saturates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(1, 8, 6, 6)
    monkeypatch.setitem(backends.BACKENDS, "fbgemm", replace(fbgemm.BACKEND, saturates=lambda: saturates))
    result = PassManager(["insert-observers", "calibrate", "fold-quantization"]).run(_Wide().eval(), x, [x])
    limits = [
        saturation.largest_activation(result.get_buffer(f"{name}.weight"), adjacent=name != "depthwise")
        for name in ("conv", "depthwise", "linear")
    ]
    assert (limits == [255, 255, 255]) is saturates
    assert result.meta["quantization"]["bound_pairs"] is saturates


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**16))
def test_reduced_range_keeps_activations_to_seven_bits(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 8, 6, 6, generator=generator)
    steps = ["fuse-activations", {"insert-observers": {"reduce_range": True}}, "calibrate", "fold-quantization"]
    result = PassManager(steps).run(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()).eval(), x, [x])
    tops = [node.args[4] for node in result.graph.nodes if str(node.target) == "fxcompress.quantize.default"]
    assert tops == [127, 127]
    lowered = PassManager("[lower]").run(result, x)
    loud = 100 * x
    assert torch.allclose(result(loud), lowered(loud), atol=float(result(loud).max()) / 100)


@pytest.mark.parametrize("isa", ["AVX2", "avx512_core", "SSE41"])
def test_kernels_held_below_vnni_count_as_without_it(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(Path, "read_text", lambda *args, **kwargs: "flags: avx2 avx512f avx512_vnni")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert cpu.has_vnni.__wrapped__()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    assert not cpu.has_vnni.__wrapped__()


def test_a_cpu_without_vnni_or_unknown_saturates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(Path, "read_text", lambda *args, **kwargs: "flags: avx2 avx512f")
    assert not cpu.has_vnni.__wrapped__()
    monkeypatch.setattr(Path, "read_text", lambda *args, **kwargs: "flags: avx2 avx512_vnni")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not cpu.has_vnni.__wrapped__()


class _Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_model_quantized_on_another_cpu_is_made_safe_when_it_is_lowered(
    full: bool, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = (_Tagger(), torch.rand(5, 1, 8)) if dynamic else (_Wide(), torch.rand(1, 8, 6, 6))
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.5, 1.0)
    monkeypatch.setitem(backends.BACKENDS, "fbgemm", replace(fbgemm.BACKEND, saturates=lambda: False))
    chosen = {"reduce_range": False} if full else {}
    steps = [{"quantize-dynamic": chosen}] if dynamic else [{"insert-observers": chosen}, "calibrate", "fold-quantization"]
    portable = PassManager(steps).run(model.eval(), x, [x])
    monkeypatch.setitem(backends.BACKENDS, "fbgemm", replace(fbgemm.BACKEND, saturates=lambda: True))
    manager = PassManager(["lower"])
    lowered = manager.run(portable, x)
    said = " ".join(remark.reason for remark in manager.ledger.remarks("lower"))
    weights = [(name, b) for name, b in lowered.named_buffers() if b.dtype == torch.int8 and b.dim() > 1]
    safe = [saturation.largest_activation(b, adjacent="depthwise" not in name) == 255 for name, b in weights]
    assert len(safe) == 3
    assert (not any(safe) and "as" in said) if full else (all(safe) and "coarser scales" in said)
    for name, b in lowered.meta["portable"].named_buffers():
        if b.dtype == torch.int8 and b.dim() > 1:
            assert saturation.largest_activation(b, adjacent="depthwise" not in name) < 255
    with torch.no_grad():
        expected, found = model(x), lowered(x)
    assert full or float((expected - found).abs().max()) < 0.03 * float(expected.abs().max())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(128, 128, 3, padding=1, groups=128), (2, 128, 9, 9)),
        (nn.Conv2d(32, 32, 5, padding=2, groups=32), (2, 32, 9, 9)),
        (nn.Conv3d(104, 104, 3, padding=1, groups=104), (1, 104, 5, 5, 5)),
        (nn.Conv1d(128, 128, 3, groups=128), (2, 128, 20)),
    ],
    ids=str,
)
def test_kernels_for_one_channel_per_group_never_saturate(layer: nn.Module, shape: tuple[int, ...], symmetric: bool) -> None:
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -1, 1, torch.Generator().manual_seed(0))
    model, x = nn.Sequential(layer).eval(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    observe = {"insert-observers": {"symmetric": symmetric, "calibrator": "minmax"}}
    lowered = PassManager([observe, {"calibrate": {"num_batches": 1}}, "fold-quantization", "lower"]).run(model, x, [x])
    portable = lowered.meta["portable"]
    scale = next(n.args[1] for n in reversed(portable.graph.nodes) if n.target is torch.ops.fxcompress.quantize.default)
    with torch.no_grad():
        steps = (portable(x) - lowered(x)).abs() / scale
    assert float(steps.max()) < 1.001
    assert float((steps > 0.5).float().mean()) < 1e-3
