"""Every torchvision model: traced, verified against eager, quantized; islands named. Prints a table.

python benchmarks/zoo.py [--models NAME ...] [--seed S --sample N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import time
from typing import Any

import torch
from tabulate import tabulate
from torch.utils import _pytree as pytree

from fxcompress import PassManager, coverage
from fxcompress.bench import models
from fxcompress.graph import trace
from fxcompress.observe import output_snr

_SMALL = {"classification": (96, 96), "segmentation": (96, 96)}
_FIXED = ("vit", "maxvit", "inception", "alexnet", "vgg", "swin")
PLAN = [
    {"remove-dead": {"dropout": True}},
    "open-attention",
    "fold-batchnorm",
    "fuse-activations",
    "insert-observers",
    {"calibrate": {"num_batches": 1}},
    "fold-quantization",
    "lower",
]


def inputs(name: str, seed: int = 0) -> tuple[Any, ...]:
    """Small inputs where the architecture allows them, so that the sweep takes minutes."""
    size = None if name.startswith(_FIXED) else _SMALL.get(models.kind_of(name))
    return models.example_inputs(name, size=size, seed=seed)


def build(name: str) -> Any:
    """The model, detectors that resize their input with a small size."""
    resizes = models.kind_of(name) == "detection" and not name.startswith("ssd")
    options: dict[str, Any] = {"min_size": 160, "max_size": 240} if resizes else {}
    return models.build(name, **options)


def examine(name: str) -> dict[str, Any]:
    """One row: how the model was captured, whether the graph equals eager bit for bit, what int8 does to it."""
    model, call = build(name), inputs(name)
    started = time.perf_counter()
    traced = trace(model, call)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        expected, found = model(*call), traced(*call)
    manager = PassManager(PLAN, progress=False)
    batch = call if len(call) == 1 else {"image1": call[0], "image2": call[1]}
    quantized = manager.run(model, call, [batch])
    with torch.no_grad():
        result = quantized(*call)
    report = coverage(quantized)
    return {
        "model": name,
        "nodes": sum(len(region.graph.nodes) for region in _regions(traced)),
        "trace s": round(seconds, 2),
        "eager": "equal" if output_snr(expected, found) == float("inf") else f"{output_snr(expected, found):.0f} dB",
        "rungs": "; ".join(f"{r.module or 'top'}: {r.rung}" for r in traced.meta["rungs"] if r.rung != "note"),
        "int8 MACs": f"{report.mac_share:.1%}",
        "int8 nodes": f"{report.integer_nodes}/{report.total_nodes}",
        "boundaries": report.boundaries,
        "finite": all(bool(t.isfinite().all()) for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)),
    }


def _regions(model: Any) -> list[Any]:
    from fxcompress.graph import regions

    return list(regions(model).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--sample", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    options = parser.parse_args()
    chosen = options.models or models.names()
    if options.sample:
        chosen = sorted(random.Random(options.seed).sample(chosen, options.sample))
    rows = []
    for name in chosen:
        try:
            rows.append(examine(name))
        except Exception as error:  # a failure is a row of the table
            rows.append({"model": name, "eager": f"FAILED {type(error).__name__}: {str(error)[:300]}"})
        print(tabulate([rows[-1]], tablefmt="plain"), flush=True)
    print(tabulate(rows, headers="keys"))
    failed = [row["model"] for row in rows if "FAILED" in row["eager"]]
    print(f"{len(rows) - len(failed)} of {len(rows)} models; failed: {', '.join(failed) or 'none'}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
