"""What each accuracy remedy gives back on MobileNetV2, whose channel ranges differ widely, quantized coarsely.

python benchmarks/recovery.py [--model NAME] [--bits N] [--size N] [--iterations N] [--threads N]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenet_v2")
    parser.add_argument("--bits", type=int, default=8, help="of weights, one scale per weight")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, batches, unseen = lived_in(options.model, options.size)
    narrow = {"*": {"weight_bits": options.bits}} if options.bits < 8 else {}
    observe = {"insert-observers": {"calibrator": "minmax", "per_channel": False, "overrides": narrow}}
    rounding: Any = {"adaround": {"iterations": options.iterations, "batch_size": 16}}
    recovery: Any = {"recover-accuracy": {"max_drop": 0.1, "adaround_iterations": options.iterations}}
    remedies: dict[str, tuple[list[Any], list[Any]]] = {
        "none": ([], []),
        "equalize-layers": (["equalize-layers"], []),
        "correct-bias": ([], ["correct-bias"]),
        "adaround": ([], [rounding]),
        "equalize-layers, correct-bias": (["equalize-layers"], ["correct-bias"]),
        "recover-accuracy, at most 0.1 points": ([], [recovery]),
    }
    rows = []
    for name, (before, after) in remedies.items():
        started = time.perf_counter()
        plan = ["fold-batchnorm", "fuse-activations", *before, observe, {"calibrate": {"num_batches": 4}}, *after]
        manager = PassManager([*plan, "fold-quantization"], verify=False)
        result = manager.run(model, data=batches)
        with torch.no_grad():
            snr = output_snr(model(unseen), result(unseen))
        rows.append((name, f"{snr:.1f}", f"{coverage(result).mac_share:.1%}", f"{time.perf_counter() - started:.0f}"))
        if name.startswith("recover"):
            print(*(f"  {r.node}: {r.reason}" for r in manager.ledger.remarks("recover-accuracy")), sep="\n")
    print(f"{options.model}, {options.bits}-bit weights on one scale each, 8-bit activations, {options.size}×{options.size}")
    print(tabulate(rows, ("remedy", "SNR dB", "integer MACs", "seconds"), disable_numparse=True))


if __name__ == "__main__":
    main()
