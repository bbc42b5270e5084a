"""What distillation brings and what it costs.

python benchmarks/distillation.py [digits] [pairs] [cost] [memory] [--quick] [--seeds N] [--rounds N]

digits  a student of a tenth of its teacher's size on a small labelled share of handwritten digits: alone, and with every
        distiller; mean ± standard deviation of the last epoch's test accuracy
pairs   ResNet-50 → ResNet-18 at 64×64 and a segmentation pair: forward and backward with every applicable distiller
cost    a step beside one written by hand with the same losses, a tapped forward beside a plain one, an epoch with a cached
        teacher beside one of the bare student, a CRD step with a large bank beside one with a small bank; in turns
memory  peak memory of a step beside one written by hand, each in a process of its own
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress.distillation import BaseDistiller, make_distiller
from fxcompress.graph import features, taps, trace

# digits


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
        return self.fc(self.stage2(self.stage1(x)).mean((2, 3)))  # type: ignore[no-any-return]


STAGES = ["stage1", "stage2"]
"""Weights bring what the teacher says to the scale of the labels' loss, found on other seeds than are shown."""
RECIPES: dict[str, Any] = {
    "LogitDistiller": {"alpha": 1.0, "beta": 0.1},
    "DKDDistiller": {},
    "DISTDistiller": {"temperature": 4.0, "distill_weight": 2.0},
    "FeatureDistiller": {"teacher_layers": STAGES},
    "FitNetDistiller": {"teacher_layers": ["stage2"]},
    "ATDistiller": {"teacher_layers": STAGES, "distill_weight": 10.0},
    "FSPDistiller": {"teacher_layers": STAGES},
    "OFDDistiller": {"distill_weight": 0.1},
    "ReviewKDDistiller": {"teacher_layers": STAGES},
    "RelationDistiller": {"relation_type": "similarity", "distill_weight": 300.0},
    "RKDDistiller": {"distill_weight": 0.1},
    "CRDDistiller": {"num_negatives": 64, "temperature": 0.3, "distill_weight": 0.3},
    "CRDDistiller, in the batch": {"mode": "batch", "temperature": 0.2, "distill_weight": 0.3},
    "PKTDistiller": {"distill_weight": 3000.0},
    "CCDistiller": {"distill_weight": 10.0},
}


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels (every fifth digit)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    test = torch.arange(len(labels)) % 5 == 0
    return images[~test], labels[~test], images[test], labels[test]


def fit(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int, lr: float = 1e-2) -> None:
    """Train a classifier, or a distiller, in place."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    steps = epochs * -(-len(labels) // 32)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
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


def learn_digits(seeds: int, epochs: int, share: int, width: int) -> None:
    """The teacher sees all training digits; students see one label in ``share``."""
    images, labels, test_images, test_labels = digits()
    torch.manual_seed(0)
    teacher = Small(32)
    fit(teacher, images, labels, 20, seed=0)
    few = torch.arange(len(labels)) % share == 0
    images, labels = images[few], labels[few]
    student = Small(width)
    print(
        f"teacher {accuracy(teacher, test_images, test_labels):.2f} %, {size(teacher):,} parameters; "
        f"student {size(student):,} parameters, {len(labels)} labelled digits, {epochs} epochs, {seeds} seeds"
    )
    found: dict[str, list[float]] = {"student alone": []}
    for seed in range(100, 100 + seeds):
        torch.manual_seed(seed)
        start = Small(width)
        alone = copy.deepcopy(start)
        fit(alone, images, labels, epochs, seed)
        found["student alone"].append(accuracy(alone, test_images, test_labels))
        for name, options in RECIPES.items():
            config = {"type": name.partition(",")[0], "seed": seed, **options}
            if name == "CRDDistiller":
                config["samples"] = len(labels)
            distiller = make_distiller(config, teacher=teacher, student=start, example_inputs=images[:2])
            fit(distiller, images, labels, epochs, seed)
            found.setdefault(name, []).append(accuracy(distiller.student, test_images, test_labels))
    bare = statistics.mean(found["student alone"])
    rows = [
        (name, f"{statistics.mean(v):.2f} ± {statistics.stdev(v):.2f}", f"{statistics.mean(v) - bare:+.2f}")
        for name, v in found.items()
    ]
    print(tabulate(rows, ("trained", "test accuracy %", "gain"), disable_numparse=True))


# pairs


def build(name: str) -> nn.Module:
    import torchvision

    options: dict[str, Any] = {"weights_backbone": None, "num_classes": 21} if name in _SEGMENTATION else {}
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, **options)  # type: ignore[no-any-return]


_SEGMENTATION = ("deeplabv3_resnet50", "lraspp_mobilenet_v3_large")
LAYERS = ["layer1", "layer2", "layer3", "layer4"]
PAIRS: dict[str, Any] = {
    "resnet50 → resnet18": (
        {"teacher_layers": LAYERS},
        {"teacher_layer": None},
        {"CRDDistiller": {"samples": 1000, "num_negatives": 256}},
    ),
    "deeplabv3_resnet50 → lraspp_mobilenet_v3_large": (
        {"teacher_layers": ["backbone.layer2", "backbone.layer4"], "student_layers": ["backbone.6", "backbone.16"]},
        {"teacher_layer": "backbone.layer4", "student_layer": "backbone.16"},
        {
            "OFDDistiller": {"teacher_layers": ["backbone.layer2"], "student_layers": ["backbone.4:output"]},
            "CRDDistiller": {"mode": "batch"},
        },
    ),
}
_BY_LAYERS = ("FeatureDistiller", "FitNetDistiller", "ATDistiller", "FSPDistiller", "OFDDistiller", "ReviewKDDistiller")
_BY_EMBEDDING = ("RelationDistiller", "RKDDistiller", "CRDDistiller", "PKTDistiller", "CCDistiller")


def run_pairs() -> None:
    """Forward and backward with every distiller: losses and gradients are finite."""
    for pair, (by_layers, by_embedding, special) in PAIRS.items():
        teacher, student = (build(name) for name in pair.split(" → "))
        images, rows = torch.randn(4, 3, 64, 64), []
        dense = "deeplab" in pair
        targets = torch.randint(21, (4, 64, 64)) if dense else torch.randint(1000, (4,))
        for name in (name for name in RECIPES if "," not in name):
            options = by_layers if name in _BY_LAYERS else by_embedding if name in _BY_EMBEDDING else {}
            config = {"type": name, **options, **special.get(name, {})}
            distiller = make_distiller(config, teacher=teacher, student=student, example_inputs=images)
            _, losses = distiller(images, targets, torch.arange(4))
            torch.stack(list(losses.values())).sum().backward()
            gradients = [p.grad for p in distiller.student.parameters() if p.grad is not None]
            finite = all(bool(g.isfinite().all()) for g in gradients)
            values = ", ".join(f"{key} {float(value.detach()):.3g}" for key, value in losses.items())
            rows.append((name, values, "finite" if finite else "NOT FINITE"))
        print(tabulate(rows, (pair, "losses", "gradients"), disable_numparse=True))


# cost


class ByHand(nn.Module):
    """ResNet-50 teaches ResNet-18 with hooks: cross entropy, KD and the features of four stages."""

    def __init__(self) -> None:
        super().__init__()
        self.student = build("resnet18")
        widths = ((64, 256), (128, 512), (256, 1024), (512, 2048))
        self.projectors = nn.ModuleList(nn.Conv2d(i, o, 1, bias=False) for i, o in widths)
        self.held = [build("resnet50").eval().requires_grad_(False)]
        self.seen: dict[str, Tensor] = {}
        for who, model in (("s", self.student), ("t", self.held[0])):
            for layer in LAYERS:
                model.get_submodule(layer).register_forward_hook(self._keep(who + layer))

    def _keep(self, key: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.seen[key] = output

        return hook

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        output = self.student(images)
        with torch.no_grad():
            teacher = self.held[0](images)
        soft = F.kl_div(F.log_softmax(output / 4, 1), F.softmax(teacher / 4, 1), reduction="batchmean") * 16
        pairs = zip(self.projectors, LAYERS, strict=True)
        hints = [F.mse_loss(project(self.seen[f"s{layer}"]), self.seen[f"t{layer}"]) for project, layer in pairs]
        return output, {"task": F.cross_entropy(output, targets), "feature": torch.stack(hints).sum(), "kd": 0.5 * soft}


def ours() -> BaseDistiller:
    config = {"type": "FeatureDistiller", "teacher_layers": LAYERS, "logit_distill": {"alpha": 0.5}}
    return make_distiller(config, teacher=build("resnet50"), student=build("resnet18"))


def stepping(model: nn.Module, *batch: Tensor) -> Callable[[], None]:
    """A training step as a function without arguments."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-4, momentum=0.9)
    model.train()

    def step() -> None:
        output = model(*batch)
        loss = torch.stack(list(output[1].values())).sum() if isinstance(output, tuple) else output.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median time of each, measured in turns after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if number >= 2:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def cost(rounds: int, bank: int) -> None:
    images, targets = torch.randn(16, 3, 64, 64), torch.randint(1000, (16,))
    rows = []

    def compare(label: str, limit: str, calls: Mapping[str, Callable[[], object]], times: int = rounds) -> None:
        medians = list(in_turns(calls, times).values())
        rows.append((label, f"{medians[0] * 1e3:.1f}", f"{medians[1] * 1e3:.1f}", f"{medians[1] / medians[0]:.3f}", limit))

    compare(
        "distillation step, by hand / ours",
        "1.03",
        {"hand": stepping(ByHand(), images, targets), "ours": stepping(ours(), images, targets)},
    )
    plain = trace(build("resnet18").eval(), images)
    tapped = copy.deepcopy(plain)
    taps.insert(tapped, LAYERS)
    view = features(tapped)
    with torch.no_grad():
        compare(
            "forward, plain / tapped", "1.02", {"plain": lambda: plain(images), "tapped": lambda: view(images)}, 4 * rounds
        )
    index = torch.arange(16)
    cached = make_distiller(
        {"type": "LogitDistiller", "cache_teacher": "memory"}, teacher=build("resnet50"), student=build("resnet18")
    )
    alone = BaseDistiller(build("resnet18"), build("resnet18"), cache_teacher="memory")
    compare(
        "step, student alone / teacher cached",
        "1.10",
        {"alone": stepping(alone, images, targets, index), "cached": stepping(cached, images, targets, index)},
    )
    banks = {}
    for samples in (bank // 100, bank):
        config = {"type": "CRDDistiller", "samples": samples}
        distiller = make_distiller(config, teacher=build("resnet18"), student=build("resnet18"))
        where = torch.randint(samples, (16,), generator=torch.Generator().manual_seed(0))
        banks[str(samples)] = stepping(distiller, images, targets, where)
        memory = distiller.get_submodule("memory")
        held = sum(buffer.numel() * buffer.element_size() for buffer in memory.buffers())
        print(
            f"a bank of {samples:,} samples holds {held / 1e6:.1f} MB, "
            f"{samples * 128 * 8 / 1e6:.1f} MB of it the two embeddings"
        )
    compare(f"CRD step, bank of {bank // 100:,} / {bank:,}", "does not grow", banks)
    print(tabulate(rows, ("milliseconds", "first", "second", "ratio", "limit"), disable_numparse=True))


def peak(which: str) -> None:
    """Print this process's peak memory after three steps, in MB."""
    images, targets = torch.randn(16, 3, 64, 64), torch.randint(1000, (16,))
    step = stepping(ByHand() if which == "hand" else ours(), images, targets)
    for _ in range(3):
        step()
    status = Path("/proc/self/status").read_text()  # getrusage would report the parent's peak where that is higher
    print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)


def memory() -> None:
    found = {}
    for which in ("hand", "ours"):
        command = [sys.executable, __file__, "--peak", which]
        found[which] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(
        f"peak memory: by hand {found['hand']:.0f} MB, ours {found['ours']:.0f} MB, "
        f"ratio {found['ours'] / found['hand']:.3f} (limit 1.05)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["digits", "pairs", "cost", "memory"])
    parser.add_argument("--quick", action="store_true", help="fewer seeds, epochs and rounds, a smaller bank")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--share", type=int, default=12, help="students see one label in so many")
    parser.add_argument("--width", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peak", choices=("hand", "ours"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        peak(options.peak)
        return
    print(f"torch {torch.__version__}, one thread")
    parts: dict[str, Callable[[], None]] = {
        "digits": lambda: learn_digits(
            2 if options.quick else options.seeds, 50 if options.quick else options.epochs, options.share, options.width
        ),
        "pairs": run_pairs,
        "cost": lambda: cost(5 if options.quick else options.rounds, 100_000 if options.quick else 1_000_000),
        "memory": memory,
    }
    for part in options.parts:
        if part not in parts:
            parser.error(f"there is no part {part!r}; known: {', '.join(parts)}")
        parts[part]()


if __name__ == "__main__":
    main()
