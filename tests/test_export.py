"""ONNX files: what is in them, that they compute what the graph computes, and what is refused."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from fxcompress import PTQQuantizer, export_onnx, export_tensorrt, trace
from fxcompress.errors import BackendError, ConfigError, DataError, VerificationError
from fxcompress.graph import qdq


class Net(nn.Module):
    """Convolutions, a gate, attention in matmuls, a head: enough to meet every rule of the mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Hardswish(), nn.Conv2d(16, 16, 1))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.block(x) + x)
        x = F.max_pool2d(x, 2)
        x = torch.cat([x, F.avg_pool2d(x, 1)], 1)[:, :16]
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(self.norm(tokens))


def images(batch: int = 2) -> Tensor:
    torch.manual_seed(batch)
    return torch.randn(batch, 3, 8, 8)


def quantized(**options: Any) -> Any:
    torch.manual_seed(0)
    options = {"calibration_method": "minmax", "num_calibration_batches": 2, "progress": False, **options}
    return PTQQuantizer(**options).quantize(Net().eval(), [images(2), images(3)])


def run(path: Path, x: Tensor, optimize: bool = True) -> np.ndarray:
    options = ort.SessionOptions()
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any]:
    model, path = quantized(), tmp_path_factory.mktemp("onnx") / "model.onnx"
    assert export_onnx(model, path) == path
    return model, path, onnx.load(path)


def producers(graph: Any) -> dict[str, Any]:
    return {name: node for node in graph.node for name in node.output}


def test_onnx_runtime_computes_what_the_graph_computes_at_any_batch(cpu: tuple[Any, Path, Any]) -> None:
    model, path, _ = cpu
    portable = model.meta["portable"]
    step = max(float(node.args[1]) for node in portable.graph.nodes if node.target is qdq.quantize)
    for batch in (1, 2, 5):
        expected = portable(images(batch)).detach().numpy()
        for optimize in (False, True):
            gap = np.abs(run(path, images(batch), optimize) - expected)
            assert (gap <= 2 * step).mean() >= 0.999


def test_weights_are_int8_initialisers_behind_a_dequantize(cpu: tuple[Any, Path, Any]) -> None:
    model, _, written = cpu
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in written.graph.initializer}
    made = producers(written.graph)
    weighted = [node for node in written.graph.node if node.op_type in ("Conv", "MatMul", "Gemm") and node.input[1] in made]
    dequantized = [made[node.input[1]] for node in weighted if made[node.input[1]].input[0] in stored]
    assert len(dequantized) == 6
    for node in dequantized:
        assert node.op_type == "DequantizeLinear"
        assert stored[node.input[0]].dtype == np.int8
        assert not stored[node.input[2]].any()
    kept = model.meta["portable"].get_buffer("stem.weight").numpy()
    assert any(np.array_equal(kept, levels) for levels in stored.values())


def test_no_two_weights_share_a_zero_point(cpu: tuple[Any, Path, Any]) -> None:
    """OpenVINO computes in float what reads a weight whose zero point another weight of the same width reads too."""
    graph = cpu[2].graph
    levels = {i.name for i in graph.initializer if i.data_type == onnx.TensorProto.INT8 and len(i.dims) > 1}
    zero_points = [node.input[2] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in levels]
    assert len(zero_points) == len(set(zero_points)) == 6


def test_nothing_stands_between_quantize_and_dequantize(cpu: tuple[Any, Path, Any]) -> None:
    graph = cpu[2].graph
    made = producers(graph)
    quantizes = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert quantizes
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in made:
            assert made[node.input[0]].op_type == "QuantizeLinear"
    assert not [node for node in graph.node if node.op_type == "Clip"]
    casts = {name for node in graph.node if node.op_type == "Cast" for name in node.output}
    assert not casts & {
        name for node in graph.node if node.op_type in ("Conv", "MatMul", "QuantizeLinear") for name in node.input
    }


def test_a_range_that_is_narrower_than_its_type_is_kept(tmp_path: Path) -> None:
    model = quantized(reduce_range=True)
    path = export_onnx(model, tmp_path / "seven.onnx")
    graph = onnx.load(path).graph
    made = producers(graph)
    quantizes = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert all(made[node.input[0]].op_type == "Clip" for node in quantizes)
    far = images() * 100
    step = max(float(node.args[1]) for node in model.meta["portable"].graph.nodes if node.target is qdq.quantize)
    gap = np.abs(run(path, far, optimize=False) - model.meta["portable"](far).detach().numpy())
    assert (gap <= 2 * step).mean() >= 0.99


@pytest.mark.parametrize("scale", [1e-10, 1e7])
def test_what_float16_does_not_hold_is_written_in_float32_with_a_warning(tmp_path: Path, scale: float, caplog: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        for parameter in model[2].parameters():
            parameter.mul_(scale)
    x = torch.randn(32, 8)
    ready = PTQQuantizer(backend="tensorrt", num_calibration_batches=1, progress=False).quantize(model, [x])
    found = run(export_onnx(ready, tmp_path / "model.onnx"), x)
    expected = model(x).detach().numpy()
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    assert "float16" in caplog.text
    with pytest.raises(VerificationError, match="half=False"):
        export_onnx(ready, tmp_path / "half.onnx", half=True)
    assert not (tmp_path / "half.onnx").exists()


def test_tensorrt_gets_symmetric_int8_float16_and_a_quantized_shortcut(tmp_path: Path) -> None:
    model = quantized(backend="tensorrt")
    graph = onnx.load(export_onnx(model, tmp_path / "model.onnx")).graph
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    made = producers(graph)
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert stored[node.input[2]].dtype == np.int8 and not stored[node.input[2]].any()
            assert (stored[node.input[1]] > 0).all()
        if node.op_type == "DequantizeLinear":
            joined = any(other.op_type == "Concat" and node.output[0] in other.input for other in graph.node)
            assert stored[node.input[1]].dtype == (np.float32 if joined else np.float16)
        if node.op_type in ("Conv", "Gemm"):
            assert all(made[name].op_type == "DequantizeLinear" for name in node.input[:2])
    shortcut = [
        node for node in graph.node if node.op_type == "Add" and "Conv" in {made[i].op_type for i in node.input if i in made}
    ]
    assert Counter(made[name].op_type for name in shortcut[0].input) == {"Conv": 1, "DequantizeLinear": 1}
    assert graph.input[0].type.tensor_type.elem_type == graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


class Joined(nn.Module):
    """Quantized, flattened and read by a layer in float: ONNX Runtime moves quantize operators past the flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(x + self.body(x))
        return self.head(torch.cat([self.pool(x), self.pool(y)], 1).flatten(1))


@pytest.mark.parametrize("half", [False, True])
def test_onnx_runtime_loads_int8_files_as_it_is_used(half: bool, tmp_path: Path, caplog: Any) -> None:
    torch.manual_seed(0)
    float_model = Joined().eval()
    model = PTQQuantizer(backend="tensorrt", num_calibration_batches=1, progress=False).quantize(float_model, [images()])
    path = export_onnx(model, tmp_path / "model.onnx", half=half)
    assert "half=False" not in caplog.text
    expected = float_model(images()).detach().numpy()
    for optimize in (False, True):
        assert np.abs(run(path, images(), optimize) - expected).max() < 0.05 * np.abs(expected).max()


def test_an_export_says_where_onnx_runtime_takes_a_file_only_as_written(
    tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fxcompress.export as subject
    from fxcompress.backends.onnxruntime import onnxruntime

    def choosy(model: bytes, threads: int, *, optimize: bool = True) -> Any:
        if optimize:
            raise RuntimeError("Type 'tensor(float16)' is invalid")
        return onnxruntime(model, threads, optimize=False)

    monkeypatch.setattr(subject, "onnxruntime", choosy)
    path = export_onnx(nn.Linear(3, 3), tmp_path / "model.onnx", torch.randn(1, 3))
    assert "graph_optimization_level=ORT_DISABLE_ALL" in caplog.text and "tensor(float16)" in caplog.text
    assert path.is_file()


def test_float_models_export_too_traced_or_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    for name, subject in {"plain": model, "traced": trace(model, images())}.items():
        path = export_onnx(subject, tmp_path / f"{name}.onnx", images())
        for batch in (1, 4):
            np.testing.assert_allclose(run(path, images(batch)), model(images(batch)).detach().numpy(), atol=1e-4)
    fixed = export_onnx(model, tmp_path / "fixed.onnx", images(2), dynamic_batch=False)
    assert onnx.load(fixed).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2


def test_what_cannot_be_written_is_refused_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"shape of input '\w+' is not known: give example_inputs"):
        export_onnx(nn.Linear(3, 3), tmp_path / "no.onnx")
    with pytest.raises(ConfigError, match="is a folder"):
        export_onnx(nn.Linear(3, 3), tmp_path, torch.randn(1, 3))
    with pytest.raises(DataError, match="do not fit"):
        export_onnx(nn.Linear(3, 3), tmp_path / "no.onnx", (torch.randn(1, 3), 1, 2))
    import fxcompress.export as subject

    monkeypatch.setattr(subject, "onnxruntime", lambda *_, **__: lambda tensors: [tensors[0] * 0])
    with pytest.raises(VerificationError, match="computes something else"):
        export_onnx(nn.Linear(3, 3), tmp_path / "no.onnx", torch.randn(1, 3))
    assert not list(tmp_path.iterdir())


def test_an_absent_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fxcompress.export as subject

    monkeypatch.setattr(subject, "missing", lambda *_: "onnxscript is not installed")
    with pytest.raises(BackendError, match=r"onnxscript is not installed.*fxcompress\[onnx\]"):
        export_onnx(nn.Linear(3, 3), tmp_path / "no.onnx", torch.randn(1, 3))


def test_asking_for_an_engine_says_what_is_missing() -> None:
    from fxcompress import PassManager
    from fxcompress.backends import tensorrt

    if tensorrt.BACKEND.unavailable() is None:
        pytest.skip("TensorRT and a GPU are here")
    model = quantized(backend="tensorrt")
    with pytest.raises(BackendError, match=r"tensorrt cannot run here: .*(not installed|no NVIDIA GPU)"):
        PassManager([{"lower": {"engine": True}}], reproducer=False).run(model.meta["portable"], images())


# engines


def test_an_engine_is_refused_with_what_is_missing_and_nothing_is_left(tmp_path: Path) -> None:
    from fxcompress.backends import tensorrt

    if tensorrt.BACKEND.unavailable() is None:
        pytest.skip("TensorRT and a GPU are here")
    with pytest.raises(BackendError, match=r"cannot be built here: .*(tensorrt is not installed|no NVIDIA GPU).*ONNX can"):
        export_tensorrt(quantized(backend="tensorrt"), tmp_path / "model.engine")
    with pytest.raises(BackendError, match=r"quantized for 'fbgemm'.*backend='tensorrt'"):
        export_tensorrt(quantized(), tmp_path / "model.engine")
    assert not list(tmp_path.iterdir())


class FakeTensorRT:
    """Of TensorRT what building an engine asks: an 'engine' is the ONNX file behind a word, for the shapes of a profile."""

    class Logger:
        ERROR = 1

        def __init__(self, severity: int) -> None:
            assert severity == self.ERROR

    class NetworkDefinitionCreationFlag:
        STRONGLY_TYPED = 1

    class Builder:
        def __init__(self, log: Any) -> None:
            self.profile: dict[str, Any] = {}

        def create_network(self, flags: int) -> Any:
            assert flags == 2
            return SimpleNamespace(model=b"", get_input=lambda number: SimpleNamespace(name=f"input {number}"))

        def create_builder_config(self) -> Any:
            return SimpleNamespace(add_optimization_profile=lambda profile: None)

        def create_optimization_profile(self) -> Any:
            return SimpleNamespace(set_shape=lambda name, *shapes: self.profile.update({name: shapes}))

        def build_serialized_network(self, network: Any, settings: Any) -> Any:
            return memoryview(repr(self.profile).encode() + b"|" + network.model)

    class OnnxParser:
        def __init__(self, network: Any, log: Any) -> None:
            self.network = network

        def parse(self, model: bytes) -> bool:
            self.network.model = model
            return True


def test_an_engine_is_built_for_the_shapes_of_the_example_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fxcompress.backends import onnxruntime, tensorrt

    model = quantized(backend="tensorrt")
    run: list[bytes] = []

    def session(plan: bytes) -> Any:
        run.append(plan)
        return onnxruntime.onnxruntime(plan.partition(b"|")[2], 1, optimize=False)

    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT)
    monkeypatch.setattr(tensorrt, "BACKEND", dataclasses.replace(tensorrt.BACKEND, unavailable=lambda: None))
    monkeypatch.setattr(tensorrt, "session", session)
    monkeypatch.setattr(Tensor, "cuda", lambda self: self)
    path = export_tensorrt(model, tmp_path / "model.engine", images(4))
    written = path.read_bytes()
    assert run == [written]
    shapes, _, onnx_model = written.partition(b"|")
    shape = (4, 3, 8, 8)
    assert shapes.decode() == repr({"input 0": (shape, shape, shape)})
    graph = onnx.load_from_string(onnx_model).graph
    assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == list(shape)
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in graph.node}
    path.unlink()
    monkeypatch.setattr(tensorrt, "session", lambda plan: lambda tensors: [torch.zeros(4, 16, 16)])
    with pytest.raises(VerificationError, match="computes something else"):
        export_tensorrt(model, path, images(4))
    monkeypatch.setattr(FakeTensorRT.Builder, "build_serialized_network", lambda *_: None)
    with pytest.raises(BackendError, match="could not build"):
        export_tensorrt(model, path, images(4))
    assert not list(tmp_path.iterdir())
