"""The digits network pruned and fine-tuned: by magnitude, 2:4, by channels and by layers, beside pruning at random.

python -m benchmarks.digits_pruning [--seeds 0 1 2] [--epochs N] [--quick]
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from benchmarks.digits import accuracy, digits, trained
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8, help="epochs of training after (or while) pruning")
    parser.add_argument("--quick", action="store_true", help="one seed")
    options = parser.parse_args()
    seeds = options.seeds[:1] if options.quick else options.seeds
    image = digits()[0][:2]
    dense = {seed: trained(seed) for seed in seeds}
    tops = {seed: accuracy(model) for seed, model in dense.items()}
    base = cost(PassManager([]).run(dense[seeds[0]], image))
    rows = [
        ("dense", f"{statistics.mean(tops.values()):.2f}", "", "", "", f"{base.parameters:,}", f"{base.macs / 1e6:.2f}M")
    ]
    for name, (prune, allowed) in WAYS.items():
        reached, gaps, model = [], [], nn.Module()
        for seed in seeds:
            model = prune(copy.deepcopy(dense[seed]), options.epochs, seed)
            reached.append(accuracy(model))
            gaps.append(tops[seed] - reached[-1])
        worst, mean = max(gaps), statistics.mean(gaps)
        verdict = "" if allowed is None else f"{'holds' if mean <= allowed else 'MISSED'} (at most {allowed:g})"
        left = cost(PassManager([]).run(model, image))
        weights = sum(int(p.count_nonzero()) for p in model.parameters())
        kept = f"{weights:,} of {left.parameters:,}"
        figures = (f"{statistics.mean(reached):.2f}", f"{mean:+.2f}", f"{worst:+.2f}")
        rows.append((name, *figures, verdict, kept, f"{left.macs / 1e6:.2f}M"))
    header = ("model", "test accuracy %", "mean drop", "worst drop", "asked", "non-zero parameters", "MACs")
    print(f"digits, seeds {seeds}, {options.epochs} epochs of training with pruning")
    print(tabulate(rows, header, disable_numparse=True))


if __name__ == "__main__":
    main()
