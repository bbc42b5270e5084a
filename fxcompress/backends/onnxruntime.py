"""ONNX Runtime: the quantize/dequantize graph as ONNX, fused into integer kernels by the runtime; x86 and ARM CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.backends.base import Backend, missing
from fxcompress.backends.cpu import has_vnni
from fxcompress.backends.engine import Session, lower_to
from fxcompress.backends.fbgemm import RULES

__all__ = ["BACKEND", "onnxruntime"]


def onnxruntime(model: bytes, threads: int, *, optimize: bool = True) -> Session:
    """A session on the CPU; without ``optimize`` every operator runs as it is written."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(tensors: list[Tensor]) -> list[Tensor]:
        arrays = (tensor.numpy() for tensor in tensors)
        return [torch.from_numpy(array) for array in session.run(None, dict(zip(names, arrays, strict=True)))]

    return run


BACKEND = Backend(
    name="onnxruntime",
    runs_on="CPUs",
    activation="uint8",
    per_channel=True,
    affine_weights=False,
    rules=RULES,
    lower=lower_to(onnxruntime),
    unavailable=lambda: missing("onnxruntime", "onnx", "onnxscript"),
    saturates=lambda: not has_vnni(),
    whole=True,
)
