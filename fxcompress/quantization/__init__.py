"""Quantization: quantizers, calibrators, tools."""

from fxcompress.quantization.calibrator import (
    CALIBRATORS,
    Calibrator,
    HistogramCalibrator,
    MinMaxCalibrator,
    build_calibrator,
)
from fxcompress.quantization.ptq import PTQQuantizer, StaticQuantizer

__all__ = [
    "CALIBRATORS",
    "Calibrator",
    "HistogramCalibrator",
    "MinMaxCalibrator",
    "PTQQuantizer",
    "StaticQuantizer",
    "build_calibrator",
]
