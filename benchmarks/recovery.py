"""What each accuracy remedy gives back on networks whose channel ranges differ widely, with one scale per weight.

Weights are random; normalisation has the statistics that training leaves, means well above zero and scales up to
``2^octaves`` apart. Remedies see four batches, the SNR is that of a fifth.
"""

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
from fxcompress.graph.results import output_snr

MODELS = ("mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "resnet18")


def uneven(name: str, size: int, octaves: float) -> tuple[nn.Module, list[Tensor], Tensor]:
    """A seeded model whose channels differ by up to ``2^octaves``, batches of noise, and an unseen batch."""
    model = models.build(name)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            spread = torch.exp2((torch.rand(module.num_features, generator=generator) - 0.5) * octaves)
            module.weight.data.mul_(spread)
            module.bias.data.add_(spread)
    batches = [torch.randn(8, 3, size, size, generator=generator) for _ in range(5)]
    models.live_in(model, [(batches[0],), (batches[1],)])
    return model.eval(), batches[:4], batches[4]


def remedies(drop: float, iterations: int) -> dict[str, list[Any]]:
    """What stands between calibration and folding."""
    recovery: Any = {"recover-accuracy": {"max_drop": drop, "adaround_iterations": iterations}}
    return {
        "none": [],
        "equalize-layers": ["equalize-layers"],
        "correct-bias": ["correct-bias"],
        "adaround": [{"adaround": {"iterations": iterations, "batch_size": 16}}],
        "equalize-layers, correct-bias": ["equalize-layers", "correct-bias"],
        f"recover-accuracy, at most {drop:g} points": [recovery],
    }


def measure(run: Run, bits: int = 8, size: int = 64, octaves: float = 4.0, drop: float = 1.0) -> Iterator[Figure]:
    """``bits``-bit weights on one scale each, 8-bit activations, images of ``size``."""
    rows = []
    for name in run.chosen(MODELS, ("mobilenet_v2",)):
        model, batches, unseen = uneven(name, size, octaves)
        narrow = {"*": {"weight_bits": bits}} if bits < 8 else {}
        observe = {"insert-observers": {"calibrator": "minmax", "per_channel": False, "overrides": narrow}}
        plan: list[Any] = ["fold-batchnorm", "fuse-activations", observe, {"calibrate": {"num_batches": 4}}]
        for remedy, steps in remedies(drop, run.pick(100, 10)).items():
            if run.quick and ("adaround" in remedy or "recover" in remedy):
                continue
            started = time.perf_counter()
            manager = PassManager([*plan, *steps, "fold-quantization"], verify=False)
            result = manager.run(model, data=batches)
            seconds = time.perf_counter() - started
            with torch.no_grad():
                snr = output_snr(model(unseen), result(unseen))
            share = coverage(result).mac_share
            rows.append({"model": name, "remedy": remedy, "SNR dB": snr, "integer MACs": share, "seconds": seconds})
            for remark in manager.ledger.remarks("recover-accuracy"):
                run.tell(f"{name} {remark.node}: {remark.reason}")
            yield Figure(f"{name}, {bits}-bit weights, remedy {remedy}: SNR of the output", snr, "dB")
            if "recover" in remedy:
                yield Figure(f"{name}, {bits}-bit weights, after recovery: share of MACs in integers", 100 * share, "%")
    run.table(f"{bits}-bit weights on one scale each, channels {octaves:g} octaves apart, {size}×{size}", rows)
