"""The figures of the compiler core and of int8 quantization, each a ratio measured in one run."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psutil
import torch
from torch import nn

from benchmarks.figure import Figure
from benchmarks.run import Run
from benchmarks.subjects import lived_in
from benchmarks.turns import in_turns, stopwatch
from fxcompress import DynamicQuantizer, PassManager, PTQQuantizer, coverage
from fxcompress.bench import models
from fxcompress.graph.cost import stored_bytes
from fxcompress.graph.results import output_snr
from fxcompress.quantization import CALIBRATORS

PLAN: list[Any] = [
    "remove-dead",
    "fold-batchnorm",
    "fuse-activations",
    {"insert-observers": {"calibrator": "minmax"}},
    {"calibrate": {"num_batches": 1}},
    "fold-quantization",
    "lower",
]


def forward(model: nn.Module, *inputs: torch.Tensor) -> Callable[[], float]:
    """The seconds of a forward pass."""

    @torch.no_grad()
    def once() -> None:
        model(*inputs)

    return stopwatch(once)


def speed(run: Run) -> Iterator[Figure]:
    """int8 on the default backend against eager fp32: latency ratio, SNR, size; batch 1, 224×224."""
    bars = {"resnet18": (2.6, 26.0, 0.26)}
    for name in run.chosen(("resnet18", "resnet50", "mobilenet_v2"), ("resnet18",)):
        model, batches = lived_in(name)
        image = models.example_inputs(name, seed=99)[0]
        quantized = PTQQuantizer(num_calibration_batches=4, progress=False).quantize(model, batches)
        seven = PTQQuantizer(num_calibration_batches=4, progress=False, reduce_range=True).quantize(model, batches)
        turns = in_turns({"eager": forward(model, image), "int8": forward(quantized, image)}, run.pick(40, 5), warmup=3)
        with torch.no_grad():
            expected = model(image)
            snrs = [output_snr(expected, quantized(image)), output_snr(expected, seven(image))]
        report = coverage(quantized)
        faster, clear, size = bars.get(name, (None, None, None))
        yield Figure(f"{name}: eager fp32 / int8", turns.ratio("eager", "int8"), "x", at_least=faster)
        yield Figure(f"{name}: SNR of the output", snrs[0], "dB", at_least=clear)
        yield Figure(f"{name}: SNR of the output, 7-bit activations", snrs[1], "dB")
        yield Figure(f"{name}: bytes / fp32", stored_bytes(quantized) / stored_bytes(model), "", at_most=size)
        yield Figure(f"{name}: share of MACs in integers", 100 * report.mac_share, "%", at_least=100.0)


def calibration(run: Run) -> Iterator[Figure]:
    """Calibrating ResNet-18 against the plain forward passes over the same batches; memory over batches."""
    for batch in (1, 8):
        model, batches = lived_in("resnet18", batch)
        candidates = {"plain": _over(model, batches)}
        for method in CALIBRATORS:
            quantizer = PTQQuantizer(calibration_method=method, num_calibration_batches=4, verify=False, progress=False)
            prepared = quantizer.prepare(model, batches[0])
            candidates[method] = stopwatch(partial(quantizer.calibrate, prepared, batches))
        turns = in_turns(candidates, run.pick(10 if batch == 1 else 5, 2))
        for method in CALIBRATORS:
            ratio = turns.ratio(method, "plain")
            yield Figure(f"{method}, batch {batch}: calibration / plain forward passes", ratio, "x", at_most=1.15)
    model, batches = lived_in("resnet18", 4)
    quantizer = PTQQuantizer(num_calibration_batches=64, verify=False, progress=False)
    ready = quantizer.prepare(model, batches[0])
    resident = {}
    for count in run.pick((4, 16, 64), (4, 8)):
        quantizer.calibrate(ready, [batches[i % 4] for i in range(count)])
        gc.collect()
        resident[count] = psutil.Process().memory_info().rss / 1e6
    few, many = min(resident), max(resident)
    note = ", ".join(f"{count} batches {used:.0f} MB" for count, used in resident.items())
    yield Figure(f"memory after {many} batches / after {few}", resident[many] / resident[few], "x", at_most=1.02, note=note)


def _over(model: nn.Module, batches: list[torch.Tensor]) -> Callable[[], float]:
    @torch.no_grad()
    def once() -> None:
        for images in batches:
            model(images)

    return stopwatch(once)


def compilation(run: Run) -> Iterator[Figure]:
    """Compiling ResNet-50 without calibrating, in forward passes of batch 8; the share of verification."""
    model, _ = lived_in("resnet50", 2)
    image = models.example_inputs("resnet50", seed=3)[0]
    eight = models.example_inputs("resnet50", batch=8, seed=4)[0]

    def compiling(verify: bool) -> float:
        manager = PassManager(PLAN, verify=verify, progress=False)
        started = time.perf_counter()
        manager.run(model, image, [image])
        whole = time.perf_counter() - started
        return whole - next(row.seconds for row in manager.ledger.rows if row.step == "calibrate")

    candidates = {
        "forward": forward(model, eight),
        "verified": lambda: compiling(True),
        "unverified": lambda: compiling(False),
    }
    turns = in_turns(candidates, run.pick(5, 1))
    yield Figure("compiling ResNet-50 / forward of batch 8", turns.ratio("verified", "forward"), "x", at_most=10.0)
    share = 100 * (1 - turns.ratio("unverified", "verified"))
    yield Figure("share of verification in compiling", share, "%", at_most=100 / 3)


def depth(run: Run) -> Iterator[Figure]:
    """Time per layer of the whole plan on chains of 100, 1,000 and 10,000 layers."""
    previous = 0.0
    for length in run.pick((100, 100, 1000, 10000), (100, 100, 1000)):
        layers = [layer for _ in range(length // 2) for layer in (nn.Conv2d(4, 4, 1), nn.ReLU())]
        chain, image = nn.Sequential(*layers).eval(), torch.randn(1, 4, 4, 4)
        started = time.perf_counter()
        PassManager(PLAN, progress=False).run(chain, image, [image])
        per_layer = (time.perf_counter() - started) / length
        if length > 100:
            note = f"{1e3 * per_layer:.2f} ms"
            yield Figure(
                f"{length:,} layers: time per layer / a tenth of them", per_layer / previous, "x", at_most=1.3, note=note
            )
        previous = per_layer


class Tagger(nn.Module):
    """A recurrent layer between an embedding and a linear layer, tokens first."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(1000, 256), kind(256, 512, 2, bidirectional=True)
        self.head = nn.Linear(1024, 20)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.embed(tokens))[0])


def dynamic(run: Run) -> Iterator[Figure]:
    """Dynamic int8 against eager fp32, without data: latency ratio, SNR, size."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 1000, (32, 1))
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True), 2)
    perceptron = nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024))
    for name, model, call in (
        ("LSTM, 2 layers, both ways", Tagger(nn.LSTM), tokens),
        ("GRU, 2 layers, both ways", Tagger(nn.GRU), tokens),
        ("transformer encoder, 128 tokens", encoder, torch.randn(1, 128, 512)),
        ("two linear layers, batch 1", perceptron, torch.randn(1, 1024)),
    ):
        model.eval()
        quantized = DynamicQuantizer(progress=False).quantize(model, example_inputs=call)
        turns = in_turns({"eager": forward(model, call), "int8": forward(quantized, call)}, run.pick(40, 5), warmup=3)
        with torch.no_grad():
            snr = output_snr(model(call), quantized(call))
        yield Figure(f"{name}: eager fp32 / int8", turns.ratio("eager", "int8"), "x")
        yield Figure(f"{name}: SNR of the output", snr, "dB")
        yield Figure(f"{name}: bytes / fp32", stored_bytes(quantized) / stored_bytes(model))
