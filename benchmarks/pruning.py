"""Channel pruning as a program: how long it takes beside Torch-Pruning, what its proof costs, how it grows, what it gains.

python -m benchmarks.pruning [--quick] [--json FILE]

Everything is one thread, batch 1, in one process, in turns; medians and ratios. Torch-Pruning is compared where it is
installed (``pip install torch-pruning``); its run is its dependency graph, its groups and its step, with the same share,
criterion and rounding.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from fxcompress import PassManager, trace
from fxcompress.bench import models
from fxcompress.graph.channels import analyse

MODELS = ("resnet50", "mobilenet_v2", "vit_b_16", "inception_v3", "densenet121", "shufflenet_v2_x1_0", "swin_t")
PEERLESS = ("shufflenet_v2_x1_0", "swin_t")
OPTIONS = {"sparsity": 0.5, "round_to": 8, "criterion": "l1_norm"}


def ours(model: nn.Module, call: tuple[Any, ...], prove: bool = False) -> nn.Module:
    """From the eager model to the smaller one."""
    plan = ["open-attention", {"prune-channels": {**OPTIONS, "prove": prove}}]
    return PassManager(plan, verify=False, progress=False).run(model, call)


def torch_pruning(model: nn.Module, call: tuple[Any, ...]) -> None:
    """The same by Torch-Pruning, on a copy as it changes the model it is given."""
    import torch_pruning as tp

    model = copy.deepcopy(model)
    classifiers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    heads = {m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    importance = tp.importance.MagnitudeImportance(p=1)
    options = {"pruning_ratio": 0.5, "ignored_layers": classifiers, "round_to": 8, "num_heads": heads}
    tp.pruner.MagnitudePruner(model, call[0], importance=importance, **options).step()


def medians(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, run in turns after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in seconds.items()}


def has_peer() -> bool:
    try:
        import torch_pruning  # noqa: F401
    except ImportError:
        return False
    return True


def speed(names: tuple[str, ...], rounds: int) -> list[dict[str, Any]]:
    """Seconds of whole runs, in forward passes and beside the peer."""
    rows = []
    for name in names:
        model, call = models.build(name), models.example_inputs(name)[:1]
        call = tuple(t[:1] for t in call)

        def forward(model: nn.Module = model, call: tuple[Any, ...] = call) -> None:
            with torch.no_grad():
                model(*call)

        runs: dict[str, Callable[[], object]] = {
            "forward": forward,
            "ours": lambda model=model, call=call: ours(model, call),  # type: ignore[misc]
            "with proof": lambda model=model, call=call: ours(model, call, prove=True),  # type: ignore[misc]
        }
        if has_peer() and name not in PEERLESS:
            runs["peer"] = lambda model=model, call=call: torch_pruning(model, call)  # type: ignore[misc]
        found = medians(runs, rounds)
        rows.append(
            {
                "model": name,
                "forward s": round(found["forward"], 3),
                "ours s": round(found["ours"], 3),
                "ours / forward": round(found["ours"] / found["forward"], 1),
                "proof / forward": round((found["with proof"] - found["ours"]) / found["forward"], 1),
                "Torch-Pruning s": round(found["peer"], 3) if "peer" in found else None,
                "Torch-Pruning / ours": round(found["peer"] / found["ours"], 2) if "peer" in found else None,
            }
        )
        print(tabulate(rows[-1:], headers="keys"), flush=True)
    return rows


def growth(quick: bool) -> list[dict[str, Any]]:
    """Analysis time per unit against depth and width."""
    rows = []
    for depth in (100, 1000) if quick else (100, 1000, 10_000):
        chain = nn.Sequential(*(nn.Conv2d(16, 16, 1, bias=False) for _ in range(depth)))
        rows.append({"what": f"{depth} convolutions of 16", **_per_unit(chain, 16, depth * 16)})
    for width in (64, 512) if quick else (64, 512, 4096):
        chain = nn.Sequential(*(nn.Conv2d(width, width, 1, bias=False) for _ in range(8)))
        rows.append({"what": f"8 convolutions of {width}", **_per_unit(chain, width, 8 * width)})
    return rows


def _per_unit(model: nn.Module, width: int, units: int) -> dict[str, Any]:
    traced = trace(model.eval(), torch.randn(1, width, 2, 2))
    seconds = medians({"analysis": lambda: analyse(traced)}, 3)["analysis"]
    return {"analysis ms": round(seconds * 1e3, 1), "us per unit": round(seconds * 1e6 / units, 2)}


def gain() -> dict[str, Any]:
    """ResNet-50 without half of its channels: latency, predicted and counted costs."""
    model, call = models.build("resnet50"), (torch.randn(1, 3, 224, 224),)
    manager = PassManager([{"prune-channels": OPTIONS}], progress=False)
    small = manager.run(model, call)
    before, after = manager.ledger.rows[0], manager.ledger.rows[-1]
    with torch.no_grad():
        found = medians({"dense": lambda: model(*call), "small": lambda: small(*call)}, 9)
    return {
        "dense / pruned latency": round(found["dense"] / found["small"], 2),
        "parameters": f"{after.parameters / before.parameters:.1%}",
        "MACs": f"{after.macs / before.macs:.1%}",
        "counted": sum(p.numel() for p in small.parameters()) == after.parameters,
    }


def memory() -> dict[str, Any]:
    """Peak extra memory of a run, over the model's size (grows with the process, so it is measured last)."""
    model, call = models.build("vit_b_16"), (torch.randn(1, 3, 224, 224),)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    ours(model, call)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"model MB": round(size / 1e6), "growth of the peak / model": round((after - before) / size, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"memory": memory()}
    print(tabulate([results["memory"]], headers="keys"), flush=True)
    results["speed"] = speed(tuple(options.models), 1 if options.quick else 5)
    print(tabulate(results["speed"], headers="keys"))
    results["growth"] = growth(options.quick)
    print(tabulate(results["growth"], headers="keys"))
    results["gain"] = gain()
    print(tabulate([results["gain"]], headers="keys"))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
