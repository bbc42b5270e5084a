"""The figures of the compiler core and of int8 quantization, each a ratio measured in one run.

python benchmarks/figures.py [speed dynamic calibration compile depth] [--threads N]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from tabulate import tabulate
from torch import nn

from fxcompress import DynamicQuantizer, PassManager, PTQQuantizer, coverage
from fxcompress.bench import interleaved, models
from fxcompress.graph.cost import stored_bytes
from fxcompress.observe import output_snr
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


def lived_in(name: str, batch: int = 4) -> tuple[nn.Module, list[torch.Tensor]]:
    """A seeded model whose normalisation has lived on seeded noise, and batches of such noise."""
    model = models.build(name)
    batches = [models.example_inputs(name, batch=batch, seed=seed)[0] for seed in range(1, 5)]
    models.live_in(model, [(batches[0],), (batches[1],)])
    return model, batches


def speed() -> None:
    """int8 against eager fp32: latency ratio, SNR, size; batch 1, 224×224."""
    rows = []
    for name in ("resnet18", "resnet50", "mobilenet_v2"):
        model, batches = lived_in(name)
        image = models.example_inputs(name, seed=99)[0]
        quantized = PTQQuantizer(num_calibration_batches=4, progress=False).quantize(model, batches)
        seven = PTQQuantizer(num_calibration_batches=4, progress=False, reduce_range=True).quantize(model, batches)
        candidates: dict[str, Callable[[], object]] = {"eager": lambda m=model, x=image: m(x)}  # type: ignore[misc]
        candidates["int8"] = lambda m=quantized, x=image: m(x)  # type: ignore[misc]
        found = interleaved(candidates, runs=40, seconds=30)
        with torch.no_grad():
            expected = model(image)
            ratios = [found["eager"].median / found["int8"].median, stored_bytes(quantized) / stored_bytes(model)]
            snrs = [output_snr(expected, quantized(image)), output_snr(expected, seven(image))]
        report = coverage(quantized)
        rows.append(
            (
                name,
                f"{ratios[0]:.2f}x",
                f"{snrs[0]:.1f}",
                f"{snrs[1]:.1f}",
                f"{ratios[1]:.3f}",
                f"{report.mac_share:.1%}",
                f"{report.integer_nodes}/{report.total_nodes}",
            )
        )
    heads = ("model", "eager / int8", "SNR dB", "SNR dB, 7-bit activations", "size / fp32", "int8 MACs", "int8 operators")
    print(tabulate(rows, heads, disable_numparse=True))


def calibration(rounds: int = 5) -> None:
    """Calibrating ResNet-18 against the plain forward passes over the same batches; peak memory over batches."""
    rows = []
    for batch in (1, 8):
        model, batches = lived_in("resnet18", batch)
        quantizers = {
            method: PTQQuantizer(calibration_method=method, num_calibration_batches=4, verify=False, progress=False)
            for method in CALIBRATORS
        }
        prepared = {method: quantizer.prepare(model, batches[0]) for method, quantizer in quantizers.items()}
        taken: dict[str, list[float]] = {name: [] for name in ("plain", *CALIBRATORS)}
        for _ in range(2 * rounds if batch == 1 else rounds):
            started = time.perf_counter()
            with torch.no_grad():
                for images in batches:
                    model(images)
            taken["plain"].append(time.perf_counter() - started)
            for method, quantizer in quantizers.items():
                started = time.perf_counter()
                quantizer.calibrate(prepared[method], batches)
                taken[method].append(time.perf_counter() - started)
        medians = {method: statistics.median(times) for method, times in taken.items()}
        rows += [(method, batch, f"{medians[method] / medians['plain']:.3f}") for method in quantizers]
    print(tabulate(rows, ("calibrator", "batch", "calibration / plain forwards"), disable_numparse=True))
    model, batches = lived_in("resnet18", 4)
    quantizer = PTQQuantizer(num_calibration_batches=64, verify=False, progress=False)
    ready = quantizer.prepare(model, batches[0])
    memory = {}
    for count in (4, 16, 64):
        quantizer.calibrate(ready, [batches[i % 4] for i in range(count)])
        gc.collect()
        memory[count] = psutil.Process().memory_info().rss / 1e6
    print("resident MB after calibrating with batches:", {count: round(used) for count, used in memory.items()})


def compilation(rounds: int = 3) -> None:
    """Compiling ResNet-50 without calibrating, in forward passes of batch 8; the share of verification."""
    model, _ = lived_in("resnet50", 2)
    image = models.example_inputs("resnet50", seed=3)[0]
    eight = models.example_inputs("resnet50", batch=8, seed=4)[0]
    times: dict[str, list[float]] = {"forward": [], "verified": [], "unverified": []}
    for _ in range(rounds):
        started = time.perf_counter()
        with torch.no_grad():
            model(eight)
        times["forward"].append(time.perf_counter() - started)
        for label, verify in (("verified", True), ("unverified", False)):
            manager = PassManager(PLAN, verify=verify, progress=False)
            started = time.perf_counter()
            manager.run(model, image, [image])
            whole = time.perf_counter() - started
            calibrating = next(row.seconds for row in manager.ledger.rows if row.step == "calibrate")
            times[label].append(whole - calibrating)
    medians = {label: statistics.median(values) for label, values in times.items()}
    share = 1 - medians["unverified"] / medians["verified"]
    print(
        f"compiling ResNet-50: {medians['verified'] / medians['forward']:.2f} forward passes of batch 8, "
        f"verification {share:.0%} of it"
    )


def depth() -> None:
    """Time per layer of the whole plan on chains of 100, 1,000 and 10,000 layers."""
    rows = []
    previous = 0.0
    for length in (100, 100, 1000, 10000):
        layers = [layer for _ in range(length // 2) for layer in (nn.Conv2d(4, 4, 1), nn.ReLU())]
        chain, image = nn.Sequential(*layers).eval(), torch.randn(1, 4, 4, 4)
        started = time.perf_counter()
        PassManager(PLAN, progress=False).run(chain, image, [image])
        per_layer = (time.perf_counter() - started) / length
        rows.append((length, f"{1e3 * per_layer:.2f}", f"{per_layer / previous:.2f}" if previous else ""))
        previous = per_layer
    print(tabulate(rows[1:], ("layers", "ms per layer", "growth"), disable_numparse=True))


class Tagger(nn.Module):
    """A recurrent layer between an embedding and a linear layer, tokens first."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(1000, 256), kind(256, 512, 2, bidirectional=True)
        self.head = nn.Linear(1024, 20)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.embed(tokens))[0])  # type: ignore[no-any-return]


def dynamic() -> None:
    """Dynamic int8 against eager fp32, without data: latency ratio, SNR, size."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 1000, (32, 1))
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True), 2)
    perceptron = nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024))
    rows = []
    for name, model, call in (
        ("LSTM, 2 layers, both ways", Tagger(nn.LSTM), tokens),
        ("GRU, 2 layers, both ways", Tagger(nn.GRU), tokens),
        ("transformer encoder, 128 tokens", encoder, torch.randn(1, 128, 512)),
        ("two linear layers, batch 1", perceptron, torch.randn(1, 1024)),
    ):
        model.eval()
        quantized = DynamicQuantizer(progress=False).quantize(model, example_inputs=call)
        candidates: dict[str, Callable[[], object]] = {"eager": lambda m=model, x=call: m(x)}  # type: ignore[misc]
        candidates["int8"] = lambda m=quantized, x=call: m(x)  # type: ignore[misc]
        found = interleaved(candidates, runs=40, seconds=20)
        with torch.no_grad():
            snr = output_snr(model(call), quantized(call))
        size = stored_bytes(quantized) / stored_bytes(model)
        rows.append((name, f"{found['eager'].median / found['int8'].median:.2f}x", f"{snr:.1f}", f"{size:.3f}"))
    print(tabulate(rows, ("model", "eager / int8", "SNR dB", "size / fp32"), disable_numparse=True))


FIGURES = {"speed": speed, "dynamic": dynamic, "calibration": calibration, "compile": compilation, "depth": depth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", choices=[*FIGURES, []], default=[])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {options.threads} thread(s)")
    for name in options.figures or FIGURES:
        print(f"\n{FIGURES[name].__doc__}")
        FIGURES[name]()


if __name__ == "__main__":
    main()
