"""Other quantizers, each built from the same weights and the same batches, in a process and an environment of their own.

Started by benchmarks/quantization.py: reads one JSON command per line, answers with one JSON line. The environment holds
what it can of: torch with torch.ao, torchao, nncf and openvino, onnxruntime and onnx.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
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
    return convert_fx(prepared)  # type: ignore[no-any-return]


def torch_ao_dynamic(model: nn.Module, batches: list[Tensor], folder: Path) -> Call:
    """torch.ao dynamic quantization of linear layers."""
    from torch.ao.quantization import quantize_dynamic

    torch.backends.quantized.engine = "x86"
    return quantize_dynamic(model, {nn.Linear})  # type: ignore[no-any-return]


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
    for batch in batches:
        for one in batch.split(image.shape[0]):
            prepared(one)
    compiled = torch.compile(convert_pt2e(prepared))
    return lambda x: torch.cat([compiled(one) for one in x.split(image.shape[0])])


def nncf_openvino(model: nn.Module, batches: list[Tensor], folder: Path) -> Call:
    """NNCF post-training quantization, run by OpenVINO."""
    import nncf
    import openvino as ov

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


class Server:
    """Builds peers and times them, command by command."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torchvision

        torch.set_num_threads(threads)
        self.folder = folder
        self.calls: dict[str, Call] = {}
        name = json.loads((folder / "model.json").read_text())["model"]
        self.model = torchvision.models.get_model(name, weights=None).eval()
        self.model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
        self.batches = torch.load(folder / "batches.pt", weights_only=True)
        self.image = torch.load(folder / "image.pt", weights_only=True)
        self.held_out = torch.load(folder / "held_out.pt", weights_only=True)

    def build(self, name: str) -> dict[str, Any]:
        import copy

        self.calls[name] = PEERS[name](copy.deepcopy(self.model), self.batches, self.folder)
        outputs = torch.cat([self.calls[name](image).detach() for image in self.held_out])
        torch.save(outputs, self.folder / "outputs.pt")
        return {}

    def time(self, name: str) -> dict[str, Any]:
        started = time.perf_counter()
        self.calls[name](self.image)
        return {"seconds": time.perf_counter() - started}


def main() -> None:
    warnings.simplefilter("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr
    server = Server(Path(sys.argv[1]), int(sys.argv[2]))
    with torch.no_grad():
        for line in sys.stdin:
            command = json.loads(line)
            try:
                answer = getattr(server, command["do"])(command["name"])
            except Exception as error:  # a peer that fails is a row of the table
                answer = {
                    "error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:120]
                }
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
