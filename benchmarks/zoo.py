"""Every torchvision model: traced, verified against eager, quantized; islands named."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from benchmarks.figure import Figure
from benchmarks.run import Run
from fxcompress import PassManager, coverage
from fxcompress.bench import models
from fxcompress.graph import regions, trace
from fxcompress.graph.results import output_snr

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
        "nodes": sum(len(region.graph.nodes) for region in regions(traced).values()),
        "trace s": round(seconds, 2),
        "eager": "equal" if output_snr(expected, found) == float("inf") else f"{output_snr(expected, found):.0f} dB",
        "rungs": "; ".join(f"{r.module or 'top'}: {r.rung}" for r in traced.meta["rungs"] if r.rung != "note"),
        "int8 MACs": f"{report.mac_share:.1%}",
        "int8 nodes": f"{report.integer_nodes}/{report.total_nodes}",
        "boundaries": report.boundaries,
        "finite": all(bool(t.isfinite().all()) for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)),
        "failed": "",
    }


def measure(run: Run) -> Iterator[Figure]:
    """The whole zoo, small inputs."""
    rows = run.sweep(examine, models.names())
    run.table("models captured and quantized", rows)
    failed = [row["model"] for row in rows if row["failed"]]
    done = [row for row in rows if not row["failed"]]
    wrong = [row["model"] for row in done if row["eager"] != "equal"]
    bad = [row["model"] for row in done if not row["finite"]]
    yield Figure("models tried", len(rows))
    yield Figure("models that fail", len(failed), at_most=0, note=", ".join(failed))
    yield Figure("captured models that differ from eager in a bit", len(wrong), at_most=0, note=", ".join(wrong))
    yield Figure("quantized models with an output that is not finite", len(bad), at_most=0, note=", ".join(bad))
    shares = sorted(float(row["int8 MACs"].rstrip("%")) for row in done)
    if shares:
        yield Figure("share of MACs in integers, median", shares[len(shares) // 2], "%")
        yield Figure("share of MACs in integers, lowest", shares[0], "%")
