"""What distillation brings: students of a tenth of their teacher's size, with one handwritten digit in twelve to learn from.

The teacher has seen all training digits. Students see 120 of them, the same for all: alone with their labels, with a
distiller with what the teacher says of them as well. Everybody trains for 150 epochs, long enough for the student alone to
have been done for fifty; soft targets take longer to fit than labels, so that a short schedule measures how far they came,
not what they bring. Weights of losses were chosen on seeds 0 to 4, which are not among those shown.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.digits import digits
from benchmarks.figure import Figure
from benchmarks.run import Run
from fxcompress.distillation import BaseDistiller, make_distiller

EPOCHS, SHARE, WIDTH = 150, 12, 9
"""Students see one digit in so many; the channels of their first layer."""
ALONE = "student alone"
STAGES = ["stage1", "stage2"]
RECIPES: dict[str, dict[str, Any]] = {
    "LogitDistiller": {"alpha": 1.0, "beta": 0.1},
    "DKDDistiller": {},
    "DISTDistiller": {"temperature": 4.0, "distill_weight": 2.0},
    "FeatureDistiller": {"teacher_layers": STAGES},
    "FitNetDistiller": {"teacher_layers": ["stage2"]},
    "ATDistiller": {"teacher_layers": ["stage2"], "distill_weight": 30.0},
    "FSPDistiller": {"teacher_layers": STAGES, "distill_weight": 50.0},
    "OFDDistiller": {"distill_weight": 0.1},
    "ReviewKDDistiller": {"teacher_layers": STAGES},
    "RelationDistiller": {"relation_type": "similarity", "distill_weight": 300.0},
    "RKDDistiller": {"distill_weight": 0.2},
    "CRDDistiller": {"num_negatives": 64, "temperature": 0.3, "distill_weight": 0.3},
    "CRDDistiller, in the batch": {"mode": "batch", "temperature": 0.2, "distill_weight": 0.3},
    "PKTDistiller": {"distill_weight": 3000.0},
    "CCDistiller": {"distill_weight": 200.0},
}
NOT_BELOW = (
    "LogitDistiller",
    "DKDDistiller",
    "DISTDistiller",
    "FeatureDistiller",
    "ATDistiller",
    "RKDDistiller",
    "CRDDistiller",
)
"""Whose students must not be below the one that learns alone."""


class Small(nn.Module):
    """Two convolutions and a classifier: 1×8×8 in, 10 classes out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.stage2 = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU()
        )
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stage2(self.stage1(x)).mean((2, 3)))


def fit(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int) -> None:
    """Train a classifier, or a distiller, in place."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(labels) // 32))
    model.train()
    for epoch in range(epochs):
        if isinstance(model, BaseDistiller):
            model.set_epoch(epoch)
        for batch in torch.randperm(len(labels)).split(32):
            if isinstance(model, BaseDistiller):
                loss = torch.stack(list(model(images[batch], labels[batch], batch)[1].values())).sum()
            else:
                loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float(100 * (model.eval()(images).argmax(1) == labels).double().mean())


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def student(name: str, teacher: nn.Module, images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """The student that one distiller (or nobody) trained from the weights that the seed gives."""
    torch.manual_seed(seed)
    start = Small(WIDTH)
    if name == ALONE:
        fit(start, images, labels, EPOCHS, seed)
        return start
    config = {"type": name.partition(",")[0], "seed": seed, "cache_teacher": "memory", **RECIPES[name]}
    if name == "CRDDistiller":
        config["samples"] = len(labels)
    distiller = make_distiller(config, teacher=teacher, student=start, example_inputs=images[:2])
    fit(distiller, images, labels, EPOCHS, seed)
    return distiller.student


def measure(run: Run) -> Iterator[Figure]:
    """Mean and standard deviation over seeds of the last epoch's accuracy on digits that nobody was trained on."""
    images, labels, test_images, test_labels = digits()
    torch.manual_seed(0)
    teacher = Small(32)
    fit(teacher, images, labels, 20, seed=0)
    few = torch.arange(len(labels)) % SHARE == 0
    images, labels = images[few], labels[few]
    yield Figure("teacher: test accuracy", accuracy(teacher, test_images, test_labels), "%", at_least=98.0)
    yield Figure("parameters of the student / of the teacher", size(Small(WIDTH)) / size(teacher), "", at_most=0.12)
    found: dict[str, list[float]] = {name: [] for name in (ALONE, *run.pick(tuple(RECIPES), NOT_BELOW))}
    for seed in range(100, 100 + run.pick(5, 2)):
        run.tell(f"seed {seed}")
        for name, values in found.items():
            values.append(accuracy(student(name, teacher, images, labels, seed), test_images, test_labels))
    yield from gains(found, f"{len(labels)} digits, {EPOCHS} epochs")


def gains(found: dict[str, list[float]], setting: str) -> Iterator[Figure]:
    """How far every distiller's students are above those that learned alone, on average."""
    means = {name: statistics.mean(values) for name, values in found.items()}
    spread = {name: f"{means[name]:.2f} ± {statistics.stdev(values):.2f} %" for name, values in found.items()}
    bare = means.pop(ALONE)
    yield Figure(f"{ALONE}: test accuracy", bare, "%", note=f"{spread[ALONE]}, {setting}")
    for name, mean in means.items():
        better = sum(a > b for a, b in zip(found[name], found[ALONE], strict=True))
        note = f"{spread[name]}, above on {better} of {len(found[name])} seeds"
        bound = 0.0 if name in NOT_BELOW else None
        yield Figure(f"{name}: points above the student alone", mean - bare, "points", at_least=bound, note=note)
    best = max(means, key=lambda name: means[name])
    yield Figure("the best distiller: points above the student alone", means[best] - bare, "points", at_least=2.0, note=best)
