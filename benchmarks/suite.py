"""The table of benchmarks."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.figure import Figure
from benchmarks.run import Run

__all__ = ["BENCHMARKS", "Benchmark"]


@dataclass(frozen=True)
class Benchmark:
    """``where`` is ``module:function`` in this package; ``minutes`` are of a full run on two cores, roughly."""

    name: str
    where: str
    measures: str
    asked: str
    minutes: float
    peers: str = ""

    def function(self) -> Callable[[Run], Iterator[Figure]]:
        """What yields the figures."""
        module, _, function = self.where.partition(":")
        found: Callable[[Run], Iterator[Figure]] = getattr(importlib.import_module(f"benchmarks.{module}"), function)
        return found


_QUANTIZERS = "torch.ao, torchao, NNCF + OpenVINO, ONNX Runtime"
BENCHMARKS = tuple(
    Benchmark(*row)
    for row in (
        (
            "int8",
            "figures:speed",
            "int8 on the default backend beside eager fp32",
            "ResNet-18 ≥ 2.6x, 26 dB, size ≤ 0.26",
            2,
        ),
        ("dynamic", "figures:dynamic", "dynamic int8 of LSTM, GRU, transformer, linear layers", "", 2),
        ("calibration", "figures:calibration", "every calibrator beside plain forward passes", "≤ 1.15x, memory flat", 4),
        ("compiling", "figures:compilation", "the whole plan on ResNet-50", "≤ 10 forwards, verification ≤ a third", 1),
        ("depth", "figures:depth", "time per layer of chains up to 10,000 layers", "≤ 1.3x per tenfold", 3),
        (
            "quantization",
            "quantization:one",
            "int8 on every backend beside other quantizers, batch 1, one thread",
            "speed-up and SNR of four models; SNR ≥ every peer's",
            15,
            _QUANTIZERS,
        ),
        ("quantization-batch8", "quantization:batch8", "the same at batch 8", "≥ the fastest peer", 20, _QUANTIZERS),
        (
            "quantization-threads2",
            "quantization:threads2",
            "the same with two threads",
            "≥ the fastest peer",
            15,
            _QUANTIZERS,
        ),
        ("qat", "qat:measure", "a step of quantization-aware training beside fp32 and torch.ao", "≤ 1.6x", 6),
        ("recovery", "recovery:measure", "what each accuracy remedy gives back where channels are uneven", "", 12),
        (
            "quantized-digits",
            "digits:measure",
            "accuracy of calibrators, QAT and LSQ",
            "8 bits ≤ 0.5, 4 bits ≤ 2 points; LSQ > QAT at 2",
            3,
        ),
        (
            "quantized-zoo",
            "zoo:measure",
            "every torchvision model captured and quantized",
            "no failure, bit-equal, finite",
            30,
        ),
        (
            "pruning",
            "pruning:speed",
            "whole pruning runs, and their proof",
            "≥ 1.5x (DenseNet ≥ 5x) Torch-Pruning; ≤ 20 forwards; proof ≤ 10",
            6,
            "Torch-Pruning",
        ),
        ("pruning-growth", "pruning:growth", "analysis time per unit against depth and width", "≤ 1.3x per tenfold", 2),
        ("pruning-gain", "pruning:gain", "ResNet-50 without half of its channels", "predicted = counted", 1),
        ("pruning-memory", "pruning:memory", "peak extra memory of a pruning run", "≤ the model", 1),
        ("masks", "masks:measure", "exact global and 2:4 masks on ResNet-50", "≥ 10x torch, ≥ 4x ModelOpt", 3, "ModelOpt"),
        ("pruned-digits", "digits_pruning:measure", "accuracy of pruned and fine-tuned networks", "≤ 1, 1, 0.5 points", 3),
        (
            "pruned-zoo",
            "pruning_zoo:measure",
            "every torchvision model without half its channels",
            "no failure, none wrong",
            60,
        ),
        (
            "pruned-shares",
            "pruning_shares:measure",
            "shares of channels achieved at 10, 25, 50, 75 % over every torchvision model",
            "exact to one unit of every group",
            6,
        ),
        (
            "distilled-digits",
            "distilled_digits:measure",
            "accuracy of students of every distiller",
            "none below the bare student, best ≥ 2 points",
            10,
        ),
        ("distilled-pairs", "distillation:run_pairs", "every distiller on two large pairs", "finite", 2),
        (
            "distillation-cost",
            "distillation:cost",
            "steps, taps, a cached teacher, CRD's bank",
            "≤ 1.03, 1.02, 1.1x; flat",
            4,
        ),
        ("distillation-memory", "distillation:peaks", "peak memory of a step beside one by hand", "≤ 1.05x", 1),
        ("training", "training:measure", "the training loop beside one by hand", "", 4),
    )
)
