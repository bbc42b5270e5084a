"""What the processor can do."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

__all__ = ["has_vnni"]

_WITHOUT_VNNI = ("SSE41", "AVX", "AVX2", "AVX512_CORE")


@functools.cache
def has_vnni() -> bool:
    """Whether the CPU multiplies 8-bit values into 32-bit sums in one step, so that partial sums cannot saturate.

    False where it is unknown, and where kernels are held below what the CPU can do: torch's below AVX-512
    (``ATEN_CPU_CAPABILITY``), oneDNN's, which torch and OpenVINO call, below VNNI (``ONEDNN_MAX_CPU_ISA``). They use 16-bit
    partial sums then.
    """
    if any(os.environ.get(f"{library}_MAX_CPU_ISA", "").upper() in _WITHOUT_VNNI for library in ("ONEDNN", "DNNL")):
        return False
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore").split()
    except OSError:
        return False
    return "avx512_vnni" in flags
