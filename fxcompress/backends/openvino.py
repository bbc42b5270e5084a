"""OpenVINO: the quantize/dequantize graph as ONNX, lowered by the runtime to oneDNN's integer kernels; x86 CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxcompress.backends.base import Backend, missing
from fxcompress.backends.cpu import has_vnni
from fxcompress.backends.engine import Session, lower_to
from fxcompress.backends.fbgemm import RULES

__all__ = ["BACKEND", "openvino"]

_KEPT = 4


def openvino(model: bytes, threads: int) -> Session:
    """A compiled model on the CPU, for one call at a time; compiled for each set of input shapes, the last few of them kept.

    With sizes left open the runtime is slower, and has been seen to compute quantized attention wrongly.
    """
    import openvino as ov

    core = ov.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    requests: dict[tuple[tuple[int, ...], ...], Any] = {}

    def request_for(shapes: tuple[tuple[int, ...], ...]) -> Any:
        if shapes not in requests:
            if len(requests) >= _KEPT:
                del requests[next(iter(requests))]
            read = core.read_model(model)
            read.reshape({number: list(shape) for number, shape in enumerate(shapes)})
            requests[shapes] = core.compile_model(read, "CPU", settings).create_infer_request()
        return requests[shapes]

    def run(tensors: list[Tensor]) -> list[Tensor]:
        request = request_for(tuple(tuple(tensor.shape) for tensor in tensors))
        request.infer([tensor.numpy() for tensor in tensors], share_inputs=True)
        results = (request.get_output_tensor(number).data for number in range(len(request.results)))
        return [torch.from_numpy(result.copy()) for result in results]

    return run


BACKEND = Backend(
    name="openvino",
    runs_on="x86 CPUs",
    activation="uint8",
    per_channel=True,
    affine_weights=False,
    rules=RULES,
    lower=lower_to(openvino, openvino=True),
    unavailable=lambda: missing("openvino", "onnx", "onnxscript"),
    saturates=lambda: not has_vnni(),
    whole=True,
)
