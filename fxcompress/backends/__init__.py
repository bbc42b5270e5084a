"""Targets: what each can run in integers, and how a graph is lowered to it. ``find(name)`` gives one by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from fxcompress.backends import fbgemm, onnxruntime, openvino, qnnpack, tensorrt
from fxcompress.backends.base import Backend, Rule
from fxcompress.errors import BackendError, did_you_mean

__all__ = ["AUTO", "BACKENDS", "CANDIDATES", "Backend", "Rule", "find"]

CANDIDATES = ("fbgemm", "onnxruntime", "openvino")
"""The backends among which ``auto`` chooses, simplest first: one and the same quantize/dequantize graph fits them all."""


def _undecided(module: fx.GraphModule, remark: Callable[[fx.Node, str], None]) -> None:
    raise BackendError(f"'auto' is decided among {', '.join(CANDIDATES)} by the pass 'lower'.")


AUTO = Backend(
    name="auto",
    runs_on="CPUs",
    activation="uint8",
    per_channel=True,
    affine_weights=False,
    rules=fbgemm.RULES,
    lower=_undecided,
    unavailable=lambda: None,
    saturates=fbgemm.BACKEND.saturates,
)

BACKENDS: dict[str, Backend] = {
    "fbgemm": fbgemm.BACKEND,
    "auto": AUTO,
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
