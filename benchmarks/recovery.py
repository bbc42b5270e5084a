"""What each accuracy remedy gives back on MobileNetV2, whose channel ranges differ widely, quantized coarsely."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.figure import Figure
from benchmarks.run import Run
from fxcompress import PassManager, coverage
from fxcompress.bench import models
from fxcompress.graph.verify import output_snr


def lived_in(name: str, size: int, octaves: float = 1.0) -> tuple[nn.Module, list[Tensor], Tensor]:
    """A seeded model whose normalisation scales differ by up to ``2^octaves``, batches of noise, and an unseen batch."""
    model = models.build(name)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            spread = torch.exp2((torch.rand(module.num_features, generator=generator) - 0.5) * octaves)
            module.weight.data.mul_(spread)
    batches = [torch.randn(4, 3, size, size, generator=generator) for _ in range(5)]
    models.live_in(model, [(batches[0],), (batches[1],)])
    return model.eval(), batches[:4], batches[4]


def measure(run: Run, bits: int = 8, size: int = 64) -> Iterator[Figure]:
    """``bits``-bit weights on one scale each, 8-bit activations, images of ``size``."""
    name = run.chosen(("mobilenet_v2",), ("mobilenet_v2",))[0]
    model, batches, unseen = lived_in(name, size)
    iterations = run.pick(200, 10)
    narrow = {"*": {"weight_bits": bits}} if bits < 8 else {}
    observe = {"insert-observers": {"calibrator": "minmax", "per_channel": False, "overrides": narrow}}
    rounding: Any = {"adaround": {"iterations": iterations, "batch_size": 16}}
    recovery: Any = {"recover-accuracy": {"max_drop": 0.1, "adaround_iterations": iterations}}
    remedies: dict[str, tuple[list[Any], list[Any]]] = {
        "none": ([], []),
        "equalize-layers": (["equalize-layers"], []),
        "correct-bias": ([], ["correct-bias"]),
        "adaround": ([], [rounding]),
        "equalize-layers, correct-bias": (["equalize-layers"], ["correct-bias"]),
        "recover-accuracy, at most 0.1 points": ([], [recovery]),
    }
    if run.quick:
        del remedies["recover-accuracy, at most 0.1 points"]
    rows = []
    for remedy, (before, after) in remedies.items():
        started = time.perf_counter()
        plan = ["fold-batchnorm", "fuse-activations", *before, observe, {"calibrate": {"num_batches": 4}}, *after]
        manager = PassManager([*plan, "fold-quantization"], verify=False)
        result = manager.run(model, data=batches)
        with torch.no_grad():
            snr = output_snr(model(unseen), result(unseen))
        seconds = time.perf_counter() - started
        rows.append({"remedy": remedy, "SNR dB": snr, "integer MACs": coverage(result).mac_share, "seconds": seconds})
        for remark in manager.ledger.remarks("recover-accuracy"):
            run.tell(f"{remark.node}: {remark.reason}")
        yield Figure(f"{name}, {bits}-bit weights, remedy {remedy}: SNR of the output", snr, "dB")
    run.table(f"{name}, {bits}-bit weights on one scale each, 8-bit activations, {size}×{size}", rows)
