"""Measuring compressed models: ``python -m fxcompress.bench``."""

from fxcompress.bench.timing import Timing, interleaved

__all__ = ["Timing", "interleaved"]
