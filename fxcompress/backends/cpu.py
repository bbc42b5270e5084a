"""What the processor can do."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

__all__ = ["has_vnni"]


@functools.cache
def has_vnni() -> bool:
    """Whether the CPU multiplies 8-bit values into 32-bit sums in one step, so that partial sums cannot saturate.

    False where it is unknown, and where torch is held below AVX-512 (FBGEMM then uses 16-bit partial sums).
    """
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore").split()
    except OSError:
        return False
    return "avx512_vnni" in flags
