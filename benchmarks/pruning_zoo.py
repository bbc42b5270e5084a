"""Every torchvision model without half of its channels: run at other sizes, held against the dense model.

Weights are random, with statistics and scales drawn so that every layer matters; everything runs in float64 where the model
can.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from benchmarks.figure import Figure
from benchmarks.run import Run
from benchmarks.zoo import build, inputs
from fxcompress import PassManager
from fxcompress.bench import models

LARGE = 200_000_000
"""Models of more parameters run in float32."""


def lived_in(model: nn.Module, seed: int = 0) -> nn.Module:
    """Parameters as training leaves them: no zeros, no ones, statistics of their own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var") or (tensor.dim() == 1 and name.endswith("weight")):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif name.endswith("running_mean") or (tensor.dim() == 1 and name.endswith("bias")):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
            elif "layer_scale" in name or not tensor.any():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model


def examine(name: str) -> dict[str, Any]:
    """One row."""
    model, call = _precise(lived_in(build(name)), inputs(name))
    started = time.perf_counter()
    manager = PassManager(["open-attention", {"prune-channels": {"sparsity": 0.5, "round_to": 8}}], progress=False)
    small = manager.run(model, call)
    seconds = time.perf_counter() - started
    notes = manager.ledger.remarks("prune-channels")
    before, after = manager.ledger.rows[0], manager.ledger.rows[-1]
    return {
        "model": name,
        "parameters": f"{after.parameters / before.parameters:.1%}",
        "MACs": f"{after.macs / before.macs:.1%}" if before.macs else "",
        "units": " + ".join(n.reason.split(" units")[0] for n in notes if "units removed (" in n.reason),
        "proof": "; ".join(n.reason.removeprefix("proved: ") for n in notes if n.reason.startswith("proved")),
        "worst": max((float(e) for n in notes if n.reason.startswith("proved") for e in _errors(n.reason)), default=None),
        "stays": "; ".join(sorted({f"{n.node}: {n.reason}" for n in notes if _stays(n.reason)})),
        "sizes": _other_sizes(model, small, call),
        "precision": "float64" if next(model.parameters()).dtype == torch.float64 else "float32",
        "seconds": round(seconds, 1),
        "failed": "",
    }


def _precise(model: nn.Module, call: tuple[Any, ...]) -> tuple[nn.Module, tuple[Any, ...]]:
    """Both in float64, where the model's own code runs in it and memory allows."""
    if sum(p.numel() for p in model.parameters()) > LARGE:
        return model, call
    double = tuple(pytree.tree_map_only(torch.Tensor, lambda t: t.double(), call))
    try:
        with torch.no_grad():
            model.double()(*double)
    except RuntimeError:  # it makes float32 tensors of its own
        return model.float(), call
    return model, double


def _errors(reason: str) -> list[str]:
    return [part.rsplit(" ", 1)[1] for part in reason.split(", ")]


def _stays(reason: str) -> bool:
    quiet = ("proved", "it is an output of the model", "changes the", "what it leaves behind")
    return not reason.startswith(quiet) and "units" not in reason and "symbolic" not in reason


def _other_sizes(model: nn.Module, small: Any, call: tuple[Any, ...]) -> str:
    """Which other batch and image sizes both models take, and whether the shapes agree."""
    done = []
    rungs: Any = small.meta["rungs"]
    for batch, scale in ((3, 1.0), (2, 1.25)):
        other = pytree.tree_map_only(torch.Tensor, functools.partial(_resized, batch=batch, scale=scale), call)
        with torch.no_grad():
            try:
                expected = model(*other)
            except (RuntimeError, AssertionError, ValueError, TypeError):
                continue
            try:
                found = small(*other)
            except RuntimeError:
                if not any(rung.rung in ("sized", "exported") for rung in rungs):
                    raise
                done.append("image size fixed by tracing")
                continue
        same = [tuple(a.shape) == tuple(b.shape) for a, b in zip(*map(_tensors, (expected, found)), strict=False)]
        done.append(f"batch {batch}" if scale == 1.0 else "image" if all(same) or _is_detection(expected) else "WRONG SHAPE")
    return ", ".join(done)


def _is_detection(result: Any) -> bool:
    return isinstance(result, list)


def _tensors(result: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]


def _resized(tensor: torch.Tensor, batch: int, scale: float) -> torch.Tensor:
    size = [int(s * scale) // 8 * 8 if scale != 1.0 else s for s in tensor.shape[-2:]]
    shape = (batch, *tensor.shape[1:-2], *size) if tensor.dim() > 3 else (*tensor.shape[:-2], *size)
    return torch.randn(shape, dtype=tensor.dtype)


def _is_wrong(row: dict[str, Any]) -> bool:
    tolerance = 1e-3 if row.get("precision") == "float32" else 1e-10
    return (row.get("worst") or 0.0) > tolerance or "WRONG" in row.get("sizes", "")


def measure(run: Run) -> Iterator[Figure]:
    """The whole zoo at 50 %."""
    rows = run.sweep(examine, models.names())
    run.table("models without half of their channels", rows)
    failed = [row["model"] for row in rows if row["failed"]]
    done = [row for row in rows if not row["failed"]]
    wrong = [row["model"] for row in done if _is_wrong(row)]
    whole = [row["model"] for row in done if row["parameters"] == "100.0%"]
    yield Figure("models tried", len(rows))
    yield Figure("models that fail", len(failed), at_most=0, note=", ".join(failed))
    yield Figure("models pruned wrong", len(wrong), at_most=0, note=", ".join(wrong))
    yield Figure("models that lose nothing", len(whole), note=", ".join(whole))
    yield Figure("largest relative error of the proofs", max((row["worst"] or 0.0 for row in done), default=None))
