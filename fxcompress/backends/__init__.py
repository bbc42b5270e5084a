"""Targets: what each can run in integers, and how a graph is lowered to it. ``find(name)`` gives one by name."""

from __future__ import annotations

from fxcompress.backends import fbgemm, onnxruntime, openvino, qnnpack, tensorrt
from fxcompress.backends.base import Backend, Rule
from fxcompress.errors import BackendError, did_you_mean

__all__ = ["BACKENDS", "Backend", "Rule", "find"]

BACKENDS: dict[str, Backend] = {
    "fbgemm": fbgemm.BACKEND,
    "x86": fbgemm.BACKEND,
    "onednn": fbgemm.BACKEND,
    "onnxruntime": onnxruntime.BACKEND,
    "openvino": openvino.BACKEND,
    "qnnpack": qnnpack.BACKEND,
    "tensorrt": tensorrt.BACKEND,
}


def find(name: str) -> Backend:
    """The backend called ``name`` (``x86`` and ``onednn`` are other words for ``fbgemm``)."""
    if name not in BACKENDS:
        raise BackendError(f"there is no backend {name!r}.{did_you_mean(name, BACKENDS)} Known: {', '.join(BACKENDS)}.")
    return BACKENDS[name]
