"""Measuring compressed models: ``python -m fxcompress.bench``."""

from fxcompress.timing import Timing, interleaved

__all__ = ["Timing", "interleaved"]
