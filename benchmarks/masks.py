"""Exact masks on ResNet-50: 50 % of all weights together against torch.nn.utils.prune, and 2:4, interleaved.

python benchmarks/masks.py [--rounds N]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from torch.nn.utils import prune

from fxcompress.bench import models
from fxcompress.pruning import MagnitudePruner
from fxcompress.pruning.sites import PRUNABLE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    original = models.build("resnet50")
    image = models.example_inputs("resnet50")[0]
    taken: dict[str, list[float]] = {"forward": [], "torch global": [], "global": [], "2:4": []}
    for _ in range(options.rounds):
        started = time.perf_counter()
        with torch.no_grad():
            original(image)
        taken["forward"].append(time.perf_counter() - started)
        peer = copy.deepcopy(original)
        weights = [(module, "weight") for module in peer.modules() if isinstance(module, PRUNABLE)]
        started = time.perf_counter()
        prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=0.5)
        taken["torch global"].append(time.perf_counter() - started)
        for label, pruner in (("global", MagnitudePruner(0.5)), ("2:4", MagnitudePruner(pruning_type="semi_structured"))):
            model = copy.deepcopy(original)
            started = time.perf_counter()
            pruner.apply_mask(model)
            taken[label].append(time.perf_counter() - started)
    medians = {label: statistics.median(times) for label, times in taken.items()}
    print(f"torch {torch.__version__}, one thread, {options.rounds} rounds")
    print(f"global 50 %: {medians['torch global'] / medians['global']:.1f} times faster than torch.nn.utils.prune")
    for label in ("torch global", "global", "2:4"):
        print(f"{label}: {medians[label] / medians['forward']:.2f} forward passes")


if __name__ == "__main__":
    main()
