"""Exact masks on ResNet-50 against torch.nn.utils.prune (50 % of all weights together) and ModelOpt (2:4), in turns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks.figure import Figure
from benchmarks.peer_process import PeerError
from benchmarks.run import Run
from benchmarks.turns import in_turns, seconds, stopwatch
from fxcompress.bench import models
from fxcompress.pruning import MagnitudePruner
from fxcompress.pruning.prunable import PRUNABLE, sites


def torch_global(model: nn.Module) -> None:
    from torch.nn.utils import prune

    weights = [(module, "weight") for module in model.modules() if isinstance(module, PRUNABLE)]
    prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=0.5)


def zeros_beyond(model: nn.Module, share: float, multiple: int) -> int:
    """How many zeros there are beside ``share`` of the weights whose inputs come in multiples; 0 is exact."""
    weights = [site.value() for site in sites(model).values() if site.value().shape[1] % multiple == 0]
    total = sum(w.numel() for w in weights)
    return total - sum(int(w.count_nonzero()) for w in weights) - round(share * total)


def on_a_copy(original: nn.Module, work: Callable[[nn.Module], object]) -> Callable[[], float]:
    """The seconds ``work`` takes on a fresh copy; copying does not count."""

    def once() -> float:
        model = copy.deepcopy(original)
        return seconds(lambda: work(model))

    return once


def measure(run: Run) -> Iterator[Figure]:
    """ResNet-50, one thread."""
    original, image = models.build("resnet50"), models.example_inputs("resnet50")[0]
    whole, two_four = MagnitudePruner(0.5), MagnitudePruner(pruning_type="semi_structured")

    @torch.no_grad()
    def forward() -> None:
        original(image)

    candidates = {
        "forward": stopwatch(forward),
        "torch global": on_a_copy(original, torch_global),
        "global": on_a_copy(original, whole.apply_mask),
        "2:4": on_a_copy(original, two_four.apply_mask),
    }
    with run.peer_process() as peers:
        missing = ""
        try:
            exact = peers.ask("sparsify", "resnet50")["exact"]
            candidates["ModelOpt"] = lambda: peers.seconds("sparsify", "resnet50")
        except PeerError as error:
            missing = str(error)
        turns = in_turns(candidates, run.pick(7, 2))
    yield Figure(
        "50 % of all weights: seconds of torch.nn.utils.prune / ours",
        turns.ratio("torch global", "global"),
        "x",
        at_least=10,
    )
    note = missing or ("" if exact else "ModelOpt's mask is not exactly 2:4")
    faster = None if missing else turns.ratio("ModelOpt", "2:4")
    yield Figure("2:4: seconds of ModelOpt / ours", faster, "x", at_least=4, note=note)
    for what, pruner, multiple in (("global", whole, 1), ("2:4", two_four, 4)):
        model = copy.deepcopy(original)
        pruner.apply_mask(model)
        forwards = turns.ratio(what, "forward")
        yield Figure(f"{what}: mask in forward passes", forwards, "forwards", note=f"{turns.median(what):.3f} s")
        yield Figure(f"{what}: zeros beside half of the weights", zeros_beyond(model, 0.5, multiple), at_least=0, at_most=0)
