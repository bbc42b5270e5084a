"""What the training loop costs beside one written by hand: processor seconds, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.figure import Figure
from benchmarks.run import Run
from benchmarks.turns import in_turns, stopwatch
from fxcompress.bench import models
from fxcompress.training import Recipe, train

Loader = DataLoader[tuple[Tensor, ...]]


class Distilling(nn.Module):
    """ResNet-50 teaches ResNet-18, by hand: cross-entropy and KD."""

    def __init__(self) -> None:
        super().__init__()
        self.student = models.build("resnet18")
        self.__dict__["teacher"] = models.build("resnet50")

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        output = self.student(images)
        with torch.no_grad():
            teacher = self.__dict__["teacher"](images)
        soft = F.kl_div((output / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="batchmean") * 16
        return output, {"task": F.cross_entropy(output, targets), "kd": soft}


def supervised(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(images), targets)


def distilled(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    _, losses = model(images, targets)
    return torch.stack(list(losses.values())).sum()


def by_hand(model: nn.Module, loader: Loader, loss: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
    """The loop everybody writes, with the check for NaN that everybody should."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for images, targets in loader:
        value = loss(model, images, targets)
        if not torch.isfinite(value):
            raise RuntimeError("the loss is not finite")
        value.backward()
        optimizer.step()
        optimizer.zero_grad()


def by_us(model: nn.Module, loader: Loader, recipe: Recipe, loss: str | None) -> None:
    train(model, loader, recipe, loss=loss, progress=False)


def measure(run: Run) -> Iterator[Figure]:
    """Three models; gradient norms off."""
    steps = run.pick(24, 4)
    torch.manual_seed(0)
    recipe = Recipe(epochs=1, lr=1e-3, optimizer="sgd", optimizer_options={"momentum": 0.9}, gradient_norms=False)
    cases: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], str | None]] = [
        (
            "small MLP, batch 64",
            lambda: nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)),
            (64, 64),
            "cross_entropy",
        ),
        ("ResNet-18, 16 × 64²", lambda: models.build("resnet18"), (16, 3, 64, 64), "cross_entropy"),
        ("ResNet-50 → ResNet-18, 16 × 64²", Distilling, (16, 3, 64, 64), None),
    ]
    for title, build, shape, loss in cases:
        count = steps if len(shape) == 4 else steps * 20
        data = TensorDataset(torch.randn(shape[0] * count, *shape[1:]), torch.randint(0, 10, (shape[0] * count,)))
        loader: Loader = DataLoader(data, batch_size=shape[0])
        model = build()
        candidates = {
            "hand": lambda: by_hand(model, loader, supervised if loss else distilled),  # noqa: B023 - called in this turn
            "ours": lambda: by_us(model, loader, recipe, loss),  # noqa: B023
        }
        timers = {name: stopwatch(work, time.process_time) for name, work in candidates.items()}
        turns = in_turns(timers, run.pick(5, 1))
        milliseconds = [1e3 * turns.median(name) / count for name in ("ours", "hand")]
        note = "{:.2f} / {:.2f} ms a step".format(*milliseconds)
        yield Figure(f"{title}: train() / a loop by hand", turns.ratio("ours", "hand"), "x", note=note)
