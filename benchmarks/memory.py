"""Memory of this process, as Linux counts it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

__all__ = ["peak", "peak_growth"]


def peak() -> int:
    """The most bytes that were resident so far (``getrusage`` would report the parent's where that is more)."""
    return _status("VmHWM")


def peak_growth(work: Callable[[], object]) -> int:
    """How many bytes more than before were resident at the worst moment of ``work``."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    result = work()
    after = peak()
    del result
    return max(0, after - before)


def _status(field: str) -> int:
    found = Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0]
    return int(found) * 1024
