"""Others' quantizers and pruners, in a process and an environment of their own.

Started by benchmarks/peer_process.py: reads one JSON command per line, answers with one JSON line. The environment holds
what it can of: torch with torch.ao, torchao, nncf and openvino, onnxruntime and onnx, torch-pruning, nvidia-modelopt.
Nothing of fxcompress is imported here.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[Tensor], Tensor]


def torch_ao_fx(model: nn.Module, batches: list[Tensor], folder: Path) -> Call:
    """torch.ao FX graph mode, its own x86 configuration."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.backends.quantized.engine = "x86"
    prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), (batches[0],))
    for batch in batches:
        prepared(batch)
    return convert_fx(prepared)


def torch_ao_dynamic(model: nn.Module, batches: list[Tensor], folder: Path) -> Call:
    """torch.ao dynamic quantization of linear layers."""
    from torch.ao.quantization import quantize_dynamic

    torch.backends.quantized.engine = "x86"
    return quantize_dynamic(model, {nn.Linear})


def torchao_pt2e(model: nn.Module, batches: list[Tensor], folder: Path) -> Call:
    """torchao PT2E with the x86 Inductor quantizer, compiled."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    torch._inductor.config.freezing = True
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    image = torch.load(folder / "image.pt", weights_only=True)
    exported = torch.export.export(model, (image,)).module()
    prepared = prepare_pt2e(exported, quantizer)
    for one in torch.cat(batches).split(image.shape[0]):
        prepared(one)
    compiled = torch.compile(convert_pt2e(prepared))
    return lambda x: torch.cat([compiled(one) for one in x.split(image.shape[0])])


def nncf_openvino(model: nn.Module, batches: list[Tensor], folder: Path) -> Call:
    """NNCF post-training quantization, run by OpenVINO."""
    import nncf
    import openvino as ov

    torch.backends.mha.set_fastpath_enabled(False)  # the tracer does not see through it
    image = torch.load(folder / "image.pt", weights_only=True)
    converted = ov.convert_model(model, example_input=image)
    transformer = any(isinstance(m, nn.LayerNorm) for m in model.modules())
    kind = nncf.ModelType.TRANSFORMER if transformer else None
    data = nncf.Dataset(batches, lambda batch: batch.numpy())
    quantized = nncf.quantize(converted, data, subset_size=len(batches), model_type=kind)
    threads = torch.get_num_threads()
    request = (
        ov.Core()
        .compile_model(quantized, "CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"})
        .create_infer_request()
    )
    return lambda x: torch.from_numpy(request.infer([x.numpy()])[0].copy())


def onnxruntime_static(model: nn.Module, batches: list[Tensor], folder: Path) -> Call:
    """ONNX Runtime quantize_static, U8S8 per channel, 7-bit weights."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            return None if batch is None else {"x": batch.numpy()}

    source, target = _float_onnx(model, folder), folder / "static.onnx"
    quant_pre_process(source, folder / "ready.onnx", skip_symbolic_shape=True)
    quantize_static(
        folder / "ready.onnx",
        target,
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=True,
    )
    return _session(target)


def onnxruntime_dynamic(model: nn.Module, batches: list[Tensor], folder: Path) -> Call:
    """ONNX Runtime quantize_dynamic."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source, target = _float_onnx(model, folder), folder / "dynamic.onnx"
    quant_pre_process(source, folder / "ready.onnx", skip_symbolic_shape=True)
    quantize_dynamic(
        folder / "ready.onnx", target, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul", "Gemm"]
    )
    return _session(target)


def _float_onnx(model: nn.Module, folder: Path) -> Path:
    path = folder / "float.onnx"
    if not path.exists():
        image = torch.load(folder / "image.pt", weights_only=True)
        wide = torch.cat([image, image])
        torch.onnx.export(
            model,
            (wide,),
            path,
            dynamo=True,
            external_data=False,
            input_names=["x"],
            dynamic_shapes=({0: torch.export.Dim("n")},),
            verbose=False,
        )
    return path


def _session(path: Path) -> Call:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


PEERS: dict[str, Callable[[nn.Module, list[Tensor], Path], Call]] = {
    "torch.ao FX": torch_ao_fx,
    "torch.ao dynamic": torch_ao_dynamic,
    "torchao PT2E": torchao_pt2e,
    "NNCF + OpenVINO": nncf_openvino,
    "ONNX Runtime static": onnxruntime_static,
    "ONNX Runtime dynamic": onnxruntime_dynamic,
}


PACKAGES = ("torch", "torchao", "nncf", "openvino", "onnx", "onnxruntime", "torch-pruning", "nvidia-modelopt")


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Package → its version here; what is not installed is left out."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


class Server:
    """Answers commands: builds peers and times them."""

    def __init__(self, folder: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self.folder = folder
        self.calls: dict[str, Call] = {}

    @functools.cached_property
    def batches(self) -> list[Tensor]:
        return self._read("batches")

    @functools.cached_property
    def image(self) -> Tensor:
        return self._read("image")

    @functools.cached_property
    def lived_in(self) -> nn.Module:
        """The model of the folder, with its weights."""
        found = self.model(json.loads((self.folder / "model.json").read_text())["model"])
        found.load_state_dict(self._read("weights"))
        return found

    @functools.cache  # noqa: B019 - a server lives as long as its process
    def model(self, name: str) -> nn.Module:
        """torchvision's, weights drawn at random."""
        import torchvision

        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        return torchvision.models.get_model(name, weights=None, **options).eval()

    def _read(self, word: str) -> Any:
        return torch.load(self.folder / f"{word}.pt", weights_only=True)

    def versions(self, name: str) -> dict[str, Any]:
        return {"versions": versions()}

    def build(self, name: str) -> dict[str, Any]:
        """A quantizer, by name; its outputs on held-out images are left in the folder."""
        with torch.no_grad():
            self.calls[name] = PEERS[name](copy.deepcopy(self.lived_in), self.batches, self.folder)
            outputs = torch.cat([self.calls[name](image).detach() for image in self._read("held_out")])
        torch.save(outputs, self.folder / "outputs.pt")
        return {}

    def time(self, name: str) -> dict[str, Any]:
        with torch.no_grad():
            started = time.perf_counter()
            self.calls[name](self.image)
            return {"seconds": time.perf_counter() - started}

    def prune(self, name: str) -> dict[str, Any]:
        """Torch-Pruning on a copy: dependency graph, groups, step; half of the channels, by l1 norm, in eights."""
        import torch_pruning as tp

        model = copy.deepcopy(self.model(name))
        size = 299 if name == "inception_v3" else 224
        image = torch.randn(1, 3, size, size)
        started = time.perf_counter()
        classifiers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
        heads = {m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
        importance = tp.importance.MagnitudeImportance(p=1)
        options = {"pruning_ratio": 0.5, "ignored_layers": classifiers, "round_to": 8, "num_heads": heads}
        tp.pruner.MagnitudePruner(model, image, importance=importance, **options).step()
        return {"seconds": time.perf_counter() - started}

    def sparsify(self, name: str) -> dict[str, Any]:
        """ModelOpt's 2:4 masks on a copy of a model."""
        import modelopt.torch.sparsity as mts  # type: ignore[import-not-found]

        model = copy.deepcopy(self.model(name))
        started = time.perf_counter()
        model = mts.sparsify(model, "sparse_magnitude")
        taken = time.perf_counter() - started
        rows = model.get_submodule("layer3.1.conv2").weight.detach().movedim(1, -1).reshape(-1, 4)
        return {"seconds": taken, "exact": bool((rows.count_nonzero(1) == 2).all())}


def main() -> None:
    warnings.simplefilter("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr
    server = Server(Path(sys.argv[1]), int(sys.argv[2]))
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(server, command["do"])(command["name"])
        except Exception as error:  # a peer that fails is a row of the table
            first = str(error).strip().splitlines()[0] if str(error).strip() else ""
            answer = {"error": f"{type(error).__name__}: {first}"[:120]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
