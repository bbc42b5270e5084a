"""Quantization: quantizers, calibrators, tools."""

from fxcompress.quantization.calibrator import (
    CALIBRATORS,
    Calibrator,
    HistogramCalibrator,
    MinMaxCalibrator,
    build_calibrator,
)
from fxcompress.quantization.ptq import PTQQuantizer, StaticQuantizer
from fxcompress.quantization.qat import LSQQuantizer, QATQuantizer

__all__ = [
    "CALIBRATORS",
    "Calibrator",
    "HistogramCalibrator",
    "LSQQuantizer",
    "MinMaxCalibrator",
    "PTQQuantizer",
    "QATQuantizer",
    "StaticQuantizer",
    "build_calibrator",
]
