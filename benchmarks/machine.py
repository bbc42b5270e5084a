"""What the figures were measured on: processor, memory, load, and the versions of everything that took part."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import versions

__all__ = ["commit", "describe", "load"]

ROOT = Path(__file__).parent.parent
FLAGS = {
    "AVX2": ("avx2",),
    "AVX512": ("avx512f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "AMX": ("amx_int8",),
}
OURS = ("torch", "torchvision", "numpy", "onnx", "onnxruntime", "onnxscript", "openvino", "scikit-learn")


def describe(threads: int, peers: dict[str, str] | None = None) -> dict[str, Any]:
    """The machine and the software; ``peers`` are the versions found in the peers' environment."""
    flags = set(_cpuinfo("flags").split())
    return {
        "CPU": _cpuinfo("model name") or platform.processor() or platform.machine(),
        **{name: any(flag in flags for flag in spellings) for name, spellings in FLAGS.items()},
        "torch's CPU capability": torch.backends.cpu.get_cpu_capability(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory GB": _memory(),
        "threads": threads,
        "system": platform.platform(),
        "Python": platform.python_version(),
        "versions": versions(OURS),
        "peers": peers or {},
    }


def load() -> list[float]:
    """Load averages over 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def commit() -> str:
    """The commit that is checked out, with a plus sign where files were changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="ignore").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == field), "")


def _memory() -> float | None:
    if not hasattr(os, "sysconf") or sys.platform == "win32":
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
