"""QNNPACK: integer kernels on ARM CPUs through ``torch.ops.quantized``; it runs on x86 too, slowly."""

from __future__ import annotations

from dataclasses import replace

import torch

from fxcompress.backends import fbgemm
from fxcompress.backends.base import Backend
from fxcompress.backends.quantized_ops import lower_to

__all__ = ["BACKEND", "RULES"]

_MISSING = ("conv3d", "batch_norm", "avg_pool3d", "adaptive_avg_pool3d")
RULES = {kind: rule for kind, rule in fbgemm.RULES.items() if kind not in _MISSING}
RULES["linear"] = replace(RULES["linear"], float_result=False)


def _unavailable() -> str | None:
    if "qnnpack" not in torch.backends.quantized.supported_engines:
        return "this build of torch has no QNNPACK"
    return None


BACKEND = Backend(
    name="qnnpack",
    runs_on="ARM CPUs",
    activation="uint8",
    per_channel=True,
    affine_weights=False,
    rules=RULES,
    lower=lower_to(lambda: "qnnpack"),
    unavailable=_unavailable,
    saturates=lambda: False,
)
