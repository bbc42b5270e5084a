"""Training, alone or under torchrun: FOLDER. Rank 0 writes losses and what was shared to FOLDER/result-WORLD.json."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fxcompress.quantization import PTQQuantizer, build_calibrator
from fxcompress.training import Callback, Recipe, Trainer, gather, is_main, merge, rank, spread, train, world


class StoppedError(Exception):
    pass


class Stop(Callback):
    def after_step(self, trainer: Trainer, step: int) -> None:
        if step == 8:
            raise StoppedError


def statistics_and_resuming(folder: Path, dataset: TensorDataset) -> dict[str, object]:
    """Whether all processes end with the same buffers, and a run that was stopped where one that was not does."""
    states = []
    for name, callbacks in (("whole", []), ("cut", [Stop()]), ("cut", [])):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 2))
        with contextlib.suppress(StoppedError):
            train(
                model,
                DataLoader(dataset, batch_size=12, shuffle=True),
                Recipe(epochs=3, seed=2, checkpoint_every=1),
                loss="cross_entropy",
                checkpoint=folder / f"{name}-batchnorm-{world()}.pt",
                resume=True,
                callbacks=callbacks,
            )
        states.append(dict(model.state_dict()))
    everyone = gather(states[0])
    return {
        "buffers alike": all(torch.equal(other[name], states[0][name]) for other in everyone for name in states[0]),
        "resumed alike": all(torch.equal(states[2][name], states[0][name]) for name in states[0]),
        "stopped": not torch.equal(states[1]["0.weight"], states[0]["0.weight"]),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(60, 6, generator=generator)
    labels = (images.sum(1) > 0).long()
    dataset = TensorDataset(images, labels)
    results: dict[str, object] = {}
    sources: dict[str, Any] = {
        "loader": DataLoader(dataset, batch_size=12, shuffle=True),
        "list": list(zip(images.split(12), labels.split(12), strict=True)),
    }
    for name, data in sources.items():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 2))
        history = train(
            model,
            data,
            Recipe(epochs=3, lr=0.05, optimizer="sgd", accumulate=2, seed=2, clip_norm=1.0, ema=0.5),
            loss="cross_entropy",
            checkpoint=folder / f"{name}-{world()}.pt",
            evaluate=lambda model: {"mine": float(rank())},
        )
        results[name] = {key: history[key] for key in ("loss", "gradient/loss", "mine")}
        results[f"{name} weights"] = [p.flatten().tolist() for p in model.parameters()]
        for weights in gather([p.detach() for p in model.parameters()]):
            assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    results |= statistics_and_resuming(folder, dataset)
    calibrators = [build_calibrator("histogram"), build_calibrator("minmax")]
    for calibrator in calibrators:
        calibrator.collect(images[rank() :: world()])
    merge(calibrators)
    quantized = PTQQuantizer(num_calibration_batches=5, progress=False).quantize(model.eval(), list(images.split(12)))
    results["quantized"] = quantized(images).flatten().tolist()
    results["ranges"] = [[float(bound) for bound in c.compute_range()] for c in calibrators]
    results["spread"] = spread(range(5), lambda item: item * item)
    results["ranks"] = sorted(set(spread(range(4), lambda item: rank())))
    if is_main():
        (folder / f"result-{world()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
