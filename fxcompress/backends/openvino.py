"""OpenVINO: the quantize/dequantize graph as ONNX, lowered by the runtime to oneDNN's integer kernels; x86 CPUs."""

from __future__ import annotations

from typing import Any

from fxcompress.backends.base import Backend
from fxcompress.backends.cpu import has_vnni
from fxcompress.backends.engine import Session, lower_to
from fxcompress.backends.fbgemm import RULES
from fxcompress.backends.onnx_graph import missing

__all__ = ["BACKEND", "openvino"]


def openvino(model: bytes, threads: int) -> Session:
    """A compiled model on the CPU, for one call at a time."""
    import openvino as ov

    core = ov.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()

    def run(arrays: list[Any]) -> list[Any]:
        request.infer(arrays, share_inputs=True)
        return [request.get_output_tensor(number).data.copy() for number in range(len(request.results))]

    return run


BACKEND = Backend(
    name="openvino",
    runs_on="x86 CPUs",
    activation="uint8",
    per_channel=True,
    affine_weights=False,
    rules=RULES,
    lower=lower_to(openvino),
    unavailable=lambda: missing("openvino", "onnx", "onnxscript"),
    saturates=lambda: not has_vnni(),
)
