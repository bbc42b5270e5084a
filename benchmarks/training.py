"""What the training loop costs beside one written by hand: processor seconds per step, in turns.

python benchmarks/training.py [--quick] [--rounds N]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps per round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one round of few steps")
    options = parser.parse_args()
    rounds, steps = (1, 4) if options.quick else (options.rounds, options.steps)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    recipe = Recipe(epochs=1, lr=1e-3, optimizer="sgd", optimizer_options={"momentum": 0.9}, gradient_norms=False)
    rows = []
    cases: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], str | None]] = [
        (
            "small MLP, 64",
            lambda: nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)),
            (64, 64),
            "cross_entropy",
        ),
        ("ResNet-18, 16 × 64²", lambda: models.build("resnet18"), (16, 3, 64, 64), "cross_entropy"),
        ("ResNet-50 → 18, 16 × 64²", Distilling, (16, 3, 64, 64), None),
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
        taken: dict[str, list[float]] = {name: [] for name in candidates}
        for round_ in range(rounds + 1):
            for name, candidate in candidates.items():
                started = time.process_time()
                candidate()
                if round_:
                    taken[name].append((time.process_time() - started) / count)
        hand, ours = (statistics.median(times) for times in taken.values())
        pairs = sorted(b / a for a, b in zip(*taken.values(), strict=True))
        row = (
            f"{hand * 1e3:.3f}",
            f"{ours * 1e3:.3f}",
            f"{statistics.median(pairs):.3f}",
            f"{pairs[0]:.3f}–{pairs[-1]:.3f}",
        )
        rows.append((title, *row))
    print(f"torch {torch.__version__}, {options.threads} thread(s), {rounds} rounds in turns, gradient norms off")
    print(tabulate(rows, ("step", "by hand, CPU ms", "train(), CPU ms", "ratio", "range"), disable_numparse=True))


if __name__ == "__main__":
    main()
