"""Backends that hand the graph to another runtime: the same numbers, one call, saved in the portable form."""

from __future__ import annotations

import copy
import functools
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress import PassManager, PTQQuantizer, backends, coverage
from fxcompress.backends import onnxruntime
from fxcompress.backends.engine import lower_to
from fxcompress.backends.flat import flatten
from fxcompress.errors import BackendError
from fxcompress.graph import qdq
from fxcompress.graph.results import output_snr
from fxcompress.timing import Timing

pytest.importorskip("onnxscript")

RUNTIMES = ["onnxruntime", "openvino"]


class Residual(nn.Module):
    """Two inputs by keyword, a residual addition, a concatenation, a head, nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, *, gain: Tensor, scale: float = 2.0) -> dict[str, Any]:
        y = F.relu6(self.stem(x))
        z = torch.cat([F.relu(self.branch(y) + y), y], 1)
        return {"scores": self.head(z.mean((2, 3))), "features": (z * scale, y * gain)}


def call(batch: int) -> dict[str, Tensor]:
    torch.manual_seed(batch)
    return {"x": torch.randn(batch, 3, 8, 8), "gain": torch.rand(batch, 1, 1, 1)}


@functools.cache
def converted(backend: str) -> tuple[nn.Module, Any]:
    pytest.importorskip(backend)
    torch.manual_seed(0)
    model = Residual().eval()
    batches = [call(2), call(3)]
    return model, PTQQuantizer(backend=backend, num_calibration_batches=2, progress=False).quantize(model, batches)


@pytest.mark.parametrize("backend", RUNTIMES)
def test_a_runtime_computes_what_the_graph_computes_at_any_batch_size(backend: str) -> None:
    """At most one output step apart, for at least 99.9 % of the values that are quantized."""
    model, result = converted(backend)
    portable = result.meta["portable"]
    step = max(float(node.args[1]) for node in portable.graph.nodes if node.target is qdq.quantize)
    for batch in (1, 2, 5):
        found, expected = result(**call(batch)), portable(**call(batch))
        assert found.keys() == expected.keys()
        for a, b in zip((found["scores"], *found["features"]), (expected["scores"], *expected["features"]), strict=True):
            assert ((a - b).abs() <= 2.001 * step).double().mean() >= 0.999
        assert output_snr(model(**call(batch)), found) > 25


@pytest.mark.parametrize("backend", RUNTIMES)
def test_an_engine_copies_pickles_and_saves_like_any_model(backend: str, tmp_path: Path) -> None:
    _, result = converted(backend)
    expected = result(**call(2))["scores"]
    fxcompress.save(result, tmp_path / "model")
    for again in (copy.deepcopy(result), pickle.loads(pickle.dumps(result)), fxcompress.load(tmp_path / "model")):
        assert torch.equal(again(**call(2))["scores"], expected)


@pytest.mark.parametrize("backend", RUNTIMES)
def test_what_is_counted_is_what_was_placed(backend: str) -> None:
    _, result = converted(backend)
    assert coverage(result).mac_share == 1.0
    assert coverage(result).integer_nodes == coverage(result.meta["portable"]).integer_nodes


def test_relu6_that_the_quantize_does_anyway_goes_and_any_other_stays() -> None:
    _, result = converted("onnxruntime")
    kept = [node.kwargs.get("activation") for node in flatten(result.meta["portable"]).module.graph.nodes]
    assert not any(kept)
    wide = PassManager(["fuse-activations"]).run(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6()).eval(), torch.rand(1, 3, 4, 4)
    )
    assert flatten(wide).module(torch.full((1, 3, 4, 4), 1e6))[0].max() <= 6


class Patches(nn.Module):
    """Patches through a convolution as wide as the layers behind it, as vision transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 32, 4, 4), nn.LayerNorm(32)
        self.wide, self.narrow = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        return tokens + self.narrow(F.gelu(self.wide(self.norm(tokens))))


def test_openvino_runs_every_layer_of_a_transformer_in_integers() -> None:
    ov = pytest.importorskip("openvino")
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    quantized = PTQQuantizer("openvino", num_calibration_batches=1, progress=False).quantize(Patches().eval(), [x])
    read = ov.Core().read_model(quantized.get_buffer("engine.model").numpy().tobytes())
    read.reshape(list(x.shape))
    compiled = ov.Core().compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).get_runtime_model()
    facts = [{key: str(value.value) for key, value in node.get_rt_info().items()} for node in compiled.get_ops()]
    layers = [fact for fact in facts if fact["layerType"].startswith(("FullyConnected", "Convolution"))]
    assert len(layers) == 3
    assert {layer["runtimePrecision"] for layer in layers} <= {"u8", "i8"}


def test_auto_keeps_the_fastest_of_those_installed_and_remembers_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxcompress.passes import lower

    pytest.importorskip("openvino")
    seen: list[set[str]] = []

    def timed(candidates: Any, **options: Any) -> Any:
        seen.append(set(candidates))
        for candidate in candidates.values():
            candidate()
        return {name: Timing({"openvino": 1.0}.get(name, 2.0), 0, 0, 1) for name in candidates}

    monkeypatch.setattr(lower, "interleaved", timed)
    torch.manual_seed(0)
    model = Residual().eval()
    quantizer = PTQQuantizer(backend="auto", num_calibration_batches=2, progress=False)
    result = quantizer.quantize(model, [call(2), call(3)])
    assert seen == [{"fbgemm", "onnxruntime", "openvino"}]
    assert "openvino" in str(result.engine)
    assert any("auto measured openvino" in remark.reason for remark in quantizer.ledger.rows[-1].remarks)
    fxcompress.save(result, tmp_path / "model")
    again = fxcompress.load(tmp_path / "model")
    assert len(seen) == 1
    assert torch.equal(again(**call(2))["scores"], result(**call(2))["scores"])


@pytest.mark.parametrize(("slower", "chosen"), [(1.01, "onnxruntime"), (1.03, "openvino")])
def test_auto_takes_the_simplest_of_those_as_fast_as_the_fastest(
    slower: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fxcompress.passes import lower

    pytest.importorskip("openvino")
    medians = {"fbgemm": 2.0, "onnxruntime": slower, "openvino": 1.0}
    monkeypatch.setattr(lower, "interleaved", lambda candidates, **_: {n: Timing(medians[n], 0, 0, 1) for n in candidates})
    torch.manual_seed(0)
    quantizer = PTQQuantizer(backend="auto", num_calibration_batches=2, progress=False)
    result = quantizer.quantize(Residual().eval(), [call(2), call(3)])
    assert chosen in str(result.engine)
    said = any(
        "auto takes onnxruntime, the simplest of those within 2%" in r.reason for r in quantizer.ledger.rows[-1].remarks
    )
    assert said == (chosen == "onnxruntime")


def test_auto_goes_on_without_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RUNTIMES:
        monkeypatch.setitem(backends.BACKENDS, name, replace(backends.find(name), unavailable=lambda: "it is not here"))
    quantizer = PTQQuantizer(backend="auto", num_calibration_batches=2, progress=False)
    result = quantizer.quantize(Residual().eval(), [call(2), call(3)])
    assert coverage(result).mac_share == 1.0
    left_out = [remark.reason for remark in quantizer.ledger.rows[-1].remarks if "leaves" in remark.reason]
    assert left_out == [f"auto leaves {name} out: it is not here" for name in RUNTIMES]


def test_a_runtime_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: bytes, threads: int) -> Any:
        session = onnxruntime.onnxruntime(model, threads)
        return lambda tensors: [result.flip(0) + 1 for result in session(tensors)]

    broken = replace(backends.find("onnxruntime"), lower=lower_to(wrong))
    monkeypatch.setitem(backends.BACKENDS, "onnxruntime", broken)
    with pytest.raises(BackendError, match="onnxruntime computes something else than the graph"):
        converted.__wrapped__("onnxruntime")


POOLS: dict[str, nn.Module] = {
    "a divisor": nn.AvgPool2d(2, divisor_override=3),
    "a divisor, over the edge": nn.AvgPool2d(3, 2, 1, ceil_mode=True, divisor_override=5),
    "over the edge": nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "nothing behind": nn.AvgPool2d((2, 3), (4, 3), (1, 1), ceil_mode=True),
    "over the edge, nothing counted": nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "padding that counts": nn.AvgPool2d(3, 2, 1),
    "a row": nn.Sequential(nn.Flatten(2), nn.AvgPool1d(5, 3, 2, ceil_mode=True)),
    "a volume": nn.Sequential(nn.Unflatten(1, (2, 4)), nn.AvgPool3d(2, padding=1, divisor_override=3)),
}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", POOLS)
def test_averages_are_pooled_as_torch_pools_them(name: str, runtime: str) -> None:
    pytest.importorskip(runtime)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), POOLS[name]).eval(), torch.randn(4, 3, 12, 13)
    lowered = PTQQuantizer(backend=runtime, progress=False).quantize(model, [x])
    for batch in (x, x[:1]):
        assert output_snr(model(batch), lowered(batch)) > 28


PADDINGS: dict[str, nn.Module] = {
    "around, by a layer": nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
    "around, each side by itself": nn.CircularPad2d((1, 2, 0, 3)),
    "zeros, each side by itself": nn.ZeroPad2d((0, 2, 1, 0)),
    "zeros before a mean": nn.Sequential(nn.Tanh(), nn.ZeroPad2d((0, 1, 0, 1)), nn.Softshrink(0.1), nn.AvgPool2d(2, 1)),
    "zeros right before a mean": nn.Sequential(nn.LogSigmoid(), nn.ZeroPad2d((0, 1, 0, 1)), nn.AvgPool2d(2, 1)),
    "reflected before a mean": nn.Sequential(nn.ReflectionPad2d(1), nn.AvgPool2d(3, 1)),
}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", PADDINGS)
def test_runtimes_pad_as_torch_pads(name: str, runtime: str) -> None:
    pytest.importorskip(runtime)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), PADDINGS[name], nn.Conv2d(8, 8, 1)).eval(), torch.randn(4, 3, 12, 13)
    lowered = PTQQuantizer(backend=runtime, progress=False).quantize(model, [x])
    for batch in (x, x[:1]):
        assert output_snr(model(batch), lowered(batch)) > 28


class Attention(nn.Module):
    """Attention of one head, which its values have no dimension for; ``kind`` says what it may not see."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.mixed, self.out, self.kind = nn.Linear(16, 48), nn.Linear(16, 16), kind

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.mixed(x).chunk(3, -1)
        seen = torch.eye(6, dtype=torch.bool) | (x.mean(-1, keepdim=True) > 0) if self.kind == "samples" else None
        causal = self.kind == "causal"
        return self.out(F.scaled_dot_product_attention(query, key, value, attn_mask=seen, is_causal=causal, scale=0.3))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", ["plain", "samples", "causal", "no batch"])
def test_attention_needs_no_dimension_for_heads(kind: str, runtime: str) -> None:
    pytest.importorskip(runtime)
    torch.manual_seed(0)
    model, x = Attention(kind).eval(), torch.randn(*([6, 16] if kind == "no batch" else [4, 6, 16]))
    lowered = PTQQuantizer(backend=runtime, progress=False, verify=False).quantize(model, [x])
    assert output_snr(model(x), lowered(x)) > 33


EXTREMES: dict[str, Any] = {
    "amax": lambda y: y.amax(1),
    "amax over two": lambda y: y.unflatten(1, (2, 3)).amax((1, 2)),
    "amin": lambda y: torch.amin(y, -2),
    "max": lambda y: y.max(1).values,
    "min": lambda y: y.min(-2, keepdim=True)[0].squeeze(1),
}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_between_integers_are_those_of_the_graph(name: str, runtime: str) -> None:
    class Extreme(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(EXTREMES[name](self.first(x)))  # type: ignore[no-any-return]

    pytest.importorskip(runtime)
    torch.manual_seed(0)
    model, x = Extreme().eval(), torch.randn(8, 6, 4)
    assert output_snr(model(x), PTQQuantizer(backend=runtime, progress=False).quantize(model, [x])(x)) > 28


BEHIND: dict[str, Any] = {
    "a normalisation": lambda y: F.batch_norm(y, torch.zeros(12), torch.linspace(0.5, 2, 12)),
    "a factor and an addend": lambda y: y * 1.5 + 0.25,
    "bounds": lambda y: F.hardtanh(y, -0.5, 0.4),
    "nothing": lambda y: y,
}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", BEHIND)
def test_a_concat_is_rounded_before_and_after_what_constants_do(name: str, runtime: str) -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(12, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.first(x))
            return self.last(BEHIND[name](torch.cat([y, self.second(y)], 1)))  # type: ignore[no-any-return]

    pytest.importorskip(runtime)
    torch.manual_seed(0)
    model, x = Joined().eval(), torch.randn(4, 3, 12, 13)
    lowered = PTQQuantizer(backend=runtime, progress=False).quantize(model, [x])
    for batch in (x, x[:1]):
        assert output_snr(model(batch), lowered(batch)) > 28
