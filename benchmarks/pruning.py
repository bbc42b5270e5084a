"""Channel pruning as a program: how long it takes beside Torch-Pruning, what its proof costs, how it grows, what it gains.

Everything is one thread, batch 1, in turns. Torch-Pruning's run is its dependency graph, its groups and its step, with the
same share, criterion and rounding, in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from benchmarks.figure import Figure
from benchmarks.memory import peak_growth
from benchmarks.peer_process import PeerError
from benchmarks.run import Run
from benchmarks.turns import in_turns, stopwatch
from fxcompress import PassManager, trace
from fxcompress.bench import models
from fxcompress.graph.channels import analyse, predict
from fxcompress.graph.channels.kept import Kept
from fxcompress.graph.cost import macs
from fxcompress.pruning.selection import removed_classes

MODELS = ("resnet50", "mobilenet_v2", "vit_b_16", "inception_v3", "densenet121", "shufflenet_v2_x1_0", "swin_t")
PEERLESS = ("shufflenet_v2_x1_0", "swin_t")
"""What Torch-Pruning cannot do; held against forward passes instead."""
FASTER = {"resnet50": 1.5, "mobilenet_v2": 1.5, "vit_b_16": 1.5, "inception_v3": 1.5, "densenet121": 5.0}
"""How many times faster than Torch-Pruning."""
OPTIONS = {"sparsity": 0.5, "round_to": 8, "criterion": "l1_norm"}


@torch.no_grad()
def forward(model: nn.Module, call: tuple[Any, ...]) -> None:
    """A plain forward pass."""
    model(*call)


def ours(model: nn.Module, call: tuple[Any, ...], prove: bool = False) -> nn.Module:
    """From the eager model to the smaller one."""
    plan = ["open-attention", {"prune-channels": {**OPTIONS, "prove": prove}}]
    return PassManager(plan, verify=False, progress=False).run(model, call)


def speed(run: Run) -> Iterator[Figure]:
    """Seconds of whole runs, in forward passes and beside the peer."""
    with run.peer_process() as peers:
        for name in run.chosen(MODELS, ("mobilenet_v2", "shufflenet_v2_x1_0")):
            model, call = models.build(name), tuple(t[:1] for t in models.example_inputs(name)[:1])

            candidates: dict[str, Callable[[], float]] = {
                "forward": stopwatch(partial(forward, model, call)),
                "ours": stopwatch(partial(ours, model, call)),
                "proved": stopwatch(partial(ours, model, call, prove=True)),
            }
            missing = "cannot prune it" if name in PEERLESS else ""
            if not missing:
                try:
                    peers.ask("prune", name)
                    candidates["peer"] = lambda name=name: peers.seconds("prune", name)  # type: ignore[misc]
                except PeerError as error:
                    missing = str(error)
            turns = in_turns(candidates, run.pick(5, 1))
            forwards = turns.ratio("ours", "forward")
            note = f"{turns.median('ours'):.2f} s"
            bound = 20.0 if name in PEERLESS else None
            yield Figure(f"{name}: a run in forward passes", forwards, "forwards", at_most=bound, note=note)
            proof = turns.ratio("proved", "forward") - forwards
            yield Figure(f"{name}: the proof in forward passes", proof, "forwards", at_most=10.0)
            faster = None if missing else turns.ratio("peer", "ours")
            label = f"{name}: seconds of Torch-Pruning / ours"
            yield Figure(label, faster, "x", at_least=FASTER.get(name), note=missing or f"{turns.median('peer'):.2f} s")


def growth(run: Run) -> Iterator[Figure]:
    """Analysis time per unit against depth (channels fixed) and width (layers fixed); each grows by about ten."""
    chains = {
        "depth": [(depth, 16) for depth in run.pick((100, 1000, 10_000), (100, 1000))],
        "width": [(8, width) for width in run.pick((64, 640, 4096), (64, 640))],
    }
    for what, shapes in chains.items():
        costs = [per_unit(layers, width) for layers, width in shapes]
        for (before, after), (small, large) in zip(pairwise(shapes), pairwise(costs), strict=True):
            label = f"{what}: microseconds a unit, {after[0]:,} layers of {after[1]:,} / {before[0]:,} of {before[1]:,}"
            yield Figure(label, large / small, "x", at_most=1.3, note=f"{large:.2f} / {small:.2f}")


def per_unit(layers: int, width: int) -> float:
    """Microseconds the analysis of a chain of 1×1 convolutions takes for every channel."""
    chain = nn.Sequential(*(nn.Conv2d(width, width, 1, bias=False) for _ in range(layers)))
    traced = trace(chain.eval(), torch.randn(1, width, 2, 2))
    turns = in_turns({"analysis": stopwatch(lambda: analyse(traced))}, 3)
    return turns.median("analysis") * 1e6 / (layers * width)


def gain(run: Run) -> Iterator[Figure]:
    """ResNet-50 without half of its channels: latency, predicted and counted costs."""
    model, call = models.build("resnet50"), (torch.randn(1, 3, 224, 224),)
    channels = analyse(trace(model, call))
    manager = PassManager([{"prune-channels": OPTIONS}], progress=False)
    small = manager.run(model, call)
    with torch.no_grad():
        turns = in_turns(
            {"dense": stopwatch(lambda: model(*call)), "small": stopwatch(lambda: small(*call))}, run.pick(9, 2)
        )
    yield Figure("resnet50: latency dense / pruned", turns.ratio("dense", "small"), "x")
    groups = small.meta["pruning"][0]["groups"]  # type: ignore[index, union-attr]
    removed = removed_classes(channels, {name: group["remove"] for name, group in groups.items()})
    kept = Kept.without(channels.root, removed)
    counted = sum(p.numel() for p in small.parameters())
    yield _same("parameters", predict.parameters(channels, kept), counted)
    counted = sum(macs(node) for node in trace(small, call).graph.nodes if node.op.startswith("call"))
    yield _same("MACs", predict.macs(channels, kept), counted)
    before, after = manager.ledger.rows[0], manager.ledger.rows[-1]
    yield Figure("resnet50: parameters left", 100 * after.parameters / before.parameters, "%")
    yield Figure("resnet50: MACs left", 100 * after.macs / before.macs, "%")


def _same(what: str, predicted: int, counted: int) -> Figure:
    label, note = f"resnet50: {what} predicted / counted", f"{predicted:,} / {counted:,}"
    return Figure(label, predicted / counted, at_least=1.0, at_most=1.0, note=note)


def memory(run: Run) -> Iterator[Figure]:
    """Peak extra memory of a run, over the model's size; a small model first brings in the code itself."""
    from torchvision.models import VisionTransformer

    options = {"image_size": 32, "patch_size": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    ours(VisionTransformer(**options).eval(), (torch.randn(1, 3, 32, 32),))
    model, call = models.build("vit_b_16"), (torch.randn(1, 3, 224, 224),)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    growth = peak_growth(lambda: ours(model, call))
    note = f"{growth / 1e6:.0f} / {size / 1e6:.0f} MB"
    yield Figure("vit_b_16: growth of the peak / size of the model", growth / size, "x", at_most=1.0, note=note)
