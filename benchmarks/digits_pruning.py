"""The digits network pruned and fine-tuned: by magnitude, 2:4, by channels and by layers, beside pruning at random."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.digits import accuracy, digits, trained
from benchmarks.figure import Figure
from benchmarks.run import Run
from fxcompress.graph.cost import cost
from fxcompress.manager import PassManager
from fxcompress.pruning import AGPScheduler, MagnitudePruner, RandomPruner, StructuredPruner
from fxcompress.training import OnEpoch, Recipe, train

Prune = Callable[[nn.Module, int, int], nn.Module]


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    images, labels, _, _ = digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return [(images[part], labels[part]) for part in order.split(64)]


def finetune(model: nn.Module, epochs: int, seed: int, callbacks: Any = ()) -> nn.Module:
    """``model`` trained on for a few epochs, in eval mode."""
    recipe = Recipe(epochs=epochs, lr=3e-3, scheduler="cosine", seed=seed)
    train(model.train(), batches(), recipe, loss="cross_entropy", callbacks=callbacks, progress=False)
    return model.eval()


def gradual(pruner: MagnitudePruner, sparsity: float) -> Prune:
    """Masks raised by AGP over the first half of the epochs, then baked."""

    def run(model: nn.Module, epochs: int, seed: int) -> nn.Module:
        schedule = AGPScheduler(0.0, sparsity, 0, max(1, epochs // 2), pruner=pruner, model=model)
        finetune(model, epochs, seed, [OnEpoch(schedule.step)])
        pruner.remove_mask(model)
        return model

    return run


def at_once(pruner: MagnitudePruner) -> Prune:
    """Masks at once, then training under them."""

    def run(model: nn.Module, epochs: int, seed: int) -> nn.Module:
        pruner.apply_mask(model)
        finetune(model, epochs, seed)
        pruner.remove_mask(model)
        return model

    return run


def channels(criterion: str) -> Prune:
    """Half of the channels go, then training."""

    def run(model: nn.Module, epochs: int, seed: int) -> nn.Module:
        images = digits()[0]
        pruner = StructuredPruner(0.5, criterion=criterion, round_to=1, seed=seed)
        return finetune(pruner.prune(model, example_inputs=images[:2]), epochs, seed)

    return run


WAYS: dict[str, tuple[Prune, float | None]] = {
    "70 % of weights, AGP": (gradual(MagnitudePruner(), 0.7), 1.0),
    "70 % of weights at random, AGP": (gradual(RandomPruner(), 0.7), None),
    "90 % of weights, AGP": (gradual(MagnitudePruner(), 0.9), None),
    "90 % of weights at random, AGP": (gradual(RandomPruner(), 0.9), None),
    "2:4": (at_once(MagnitudePruner(pruning_type="semi_structured")), 0.5),
    "2:4 at random": (at_once(MagnitudePruner(pruning_type="semi_structured", criterion="random")), None),
    "50 % of channels, l1_norm": (channels("l1_norm"), 1.0),
    "50 % of channels at random": (channels("random"), None),
}
"""What is done → how, and the points of accuracy it may lose."""


def measure(run: Run) -> Iterator[Figure]:
    """Loss of accuracy, seed by seed and in the mean, eight epochs of training with or after pruning."""
    seeds, epochs = range(run.seed, run.seed + run.pick(3, 1)), run.pick(8, 2)
    image = digits()[0][:2]
    dense = {seed: trained(seed) for seed in seeds}
    tops = {seed: accuracy(model) for seed, model in dense.items()}
    base = cost(PassManager([]).run(dense[run.seed], image))
    rows = [{"model": "dense", "test accuracy %": statistics.mean(tops.values()), "parameters": base.parameters}]
    rows[0]["MACs"] = base.macs
    for name, (prune, allowed) in WAYS.items():
        run.tell(name)
        reached, gaps, model = [], [], nn.Module()
        for seed in seeds:
            model = prune(copy.deepcopy(dense[seed]), epochs, seed)
            reached.append(accuracy(model))
            gaps.append(tops[seed] - reached[-1])
        left = cost(PassManager([]).run(model, image))
        weights = sum(int(p.count_nonzero()) for p in model.parameters())
        rows.append(
            {
                "model": name,
                "test accuracy %": statistics.mean(reached),
                **{f"lost, seed {seed}": gap for seed, gap in zip(seeds, gaps, strict=True)},
                "worst": max(gaps),
                "parameters": left.parameters,
                "MACs": left.macs,
                "not zero": weights,
            }
        )
        note = f"worst {max(gaps):+.2f} of seeds " + ", ".join(
            f"{seed}: {gap:+.2f}" for seed, gap in zip(seeds, gaps, strict=True)
        )
        yield Figure(f"{name}: points lost", statistics.mean(gaps), "points", at_most=allowed, note=note)
    run.table("digits, pruned and fine-tuned", rows)
