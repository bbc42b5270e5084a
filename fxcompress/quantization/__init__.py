"""Quantization: quantizers, calibrators, tools."""

from fxcompress.quantization.calibrator import (
    CALIBRATORS,
    Calibrator,
    EntropyCalibrator,
    HistogramCalibrator,
    MinMaxCalibrator,
    MSECalibrator,
    PercentileCalibrator,
    build_calibrator,
)
from fxcompress.quantization.ptq import DynamicQuantizer, PTQQuantizer, StaticQuantizer
from fxcompress.quantization.qat import LSQQuantizer, QATQuantizer

__all__ = [
    "CALIBRATORS",
    "Calibrator",
    "DynamicQuantizer",
    "EntropyCalibrator",
    "HistogramCalibrator",
    "LSQQuantizer",
    "MSECalibrator",
    "MinMaxCalibrator",
    "PTQQuantizer",
    "PercentileCalibrator",
    "QATQuantizer",
    "StaticQuantizer",
    "build_calibrator",
]
