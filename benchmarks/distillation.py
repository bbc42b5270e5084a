"""What distillation costs.

pairs   ResNet-50 → ResNet-18 at 64×64 and a segmentation pair: forward and backward with every applicable distiller
cost    a step beside one written by hand with the same losses, a tapped forward beside a plain one, an epoch with a cached
        teacher beside one of the bare student, a CRD step with a large bank beside one with a small bank; in turns
memory  peak memory of a step beside one written by hand, each in a process of its own
"""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import memory
from benchmarks.distilled_digits import RECIPES
from benchmarks.figure import Figure
from benchmarks.run import Run
from benchmarks.turns import Turns, in_turns, stopwatch
from fxcompress.distillation import BaseDistiller, make_distiller
from fxcompress.graph import features, taps, trace

# pairs


def build(name: str) -> nn.Module:
    import torchvision

    options: dict[str, Any] = {"weights_backbone": None, "num_classes": 21} if name in _SEGMENTATION else {}
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, **options)


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


def run_pairs(run: Run) -> Iterator[Figure]:
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
            total = torch.stack(list(losses.values())).sum()
            total.backward()
            gradients = [p.grad for p in distiller.student.parameters() if p.grad is not None]
            finite = bool(total.isfinite()) and bool(gradients) and all(bool(g.isfinite().all()) for g in gradients)
            values = ", ".join(f"{key} {float(value.detach()):.3g}" for key, value in losses.items())
            rows.append({"distiller": name, "losses": values, "finite": finite})
        run.table(pair, rows)
        bad = [str(row["distiller"]) for row in rows if not row["finite"]]
        yield Figure(f"{pair}: distillers run", len(rows), at_least=14)
        yield Figure(f"{pair}: distillers whose loss or gradients are not finite", len(bad), at_most=0, note=", ".join(bad))


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


class Alone(nn.Module):
    """ResNet-18 with nobody to teach it."""

    def __init__(self) -> None:
        super().__init__()
        self.student = build("resnet18")

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        output = self.student(images)
        return output, {"task": F.cross_entropy(output, targets)}


def ours() -> BaseDistiller:
    config = {"type": "FeatureDistiller", "teacher_layers": LAYERS, "logit_distill": {"alpha": 0.5}}
    return make_distiller(config, teacher=build("resnet50"), student=build("resnet18"))


def stepping(model: nn.Module, *batch: Tensor) -> Callable[[], object]:
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


def against(rounds: int, first: Callable[[], object], second: Callable[[], object]) -> Turns:
    """Both in turns, under the names "first" and "second": processor seconds of this one thread."""
    clock = time.process_time
    return in_turns({"first": stopwatch(first, clock), "second": stopwatch(second, clock)}, rounds, warmup=2)


def ratio(name: str, turns: Turns, at_most: float) -> Figure:
    """The second's seconds in the first's."""
    least, most = min(ratios := turns.ratios("second", "first")), max(ratios)
    note = f"{1e3 * turns.median('second'):.1f} / {1e3 * turns.median('first'):.1f} ms, rounds {least:.2f} to {most:.2f}"
    return Figure(name, turns.ratio("second", "first"), "x", at_most=at_most, note=note)


def cost(run: Run) -> Iterator[Figure]:
    """A step, a tapped forward, a cached teacher, a large bank: each beside what it is held against."""
    rounds = run.pick(21, 3)
    images, targets, index = torch.randn(16, 3, 64, 64), torch.randint(1000, (16,)), torch.arange(16)
    hand = stepping(ByHand(), images, targets)
    yield ratio("distillation step / by hand", against(rounds, hand, stepping(ours(), images, targets)), 1.03)
    plain = trace(build("resnet18").eval(), images)
    tapped = copy.deepcopy(plain)
    taps.insert(tapped, LAYERS)
    view = features(tapped)
    with torch.no_grad():
        turns = against(3 * rounds, lambda: plain(images), lambda: view(images))
    yield ratio("forward with taps / plain", turns, 1.02)
    cached = make_distiller(
        {"type": "LogitDistiller", "cache_teacher": "memory"}, teacher=build("resnet50"), student=build("resnet18")
    )
    turns = against(rounds, stepping(Alone(), images, targets), stepping(cached, images, targets, index))
    yield ratio("step with a cached teacher / of the student alone, by hand", turns, 1.10)
    yield from banks(run.pick(1_000_000, 100_000), rounds, images, targets)


def banks(samples: int, rounds: int, images: Tensor, targets: Tensor) -> Iterator[Figure]:
    """CRD with 16,384 negatives over a large bank, and over one of a hundredth."""
    steps = []
    for count in (samples // 100, samples):
        config = {"type": "CRDDistiller", "samples": count}
        distiller = make_distiller(config, teacher=build("resnet18"), student=build("resnet18"))
        where = torch.randint(count, (16,), generator=torch.Generator().manual_seed(0))
        steps.append(stepping(distiller, images, targets, where))
        held = sum(buffer.numel() * buffer.element_size() for buffer in distiller.get_submodule("memory").buffers())
        two = 2 * count * 128 * 4
        yield Figure(
            f"CRD, {count:,} samples: bytes / of the two banks", held / two, "x", at_most=1.1, note=f"{held / 1e6:.1f} MB"
        )
    turns = against(rounds, steps[0], steps[1])
    yield ratio(f"CRD step, bank of {samples:,} / of {samples // 100:,}", turns, 1.10)


# memory


def print_peak(which: str) -> None:
    """Print this process's peak memory after three steps, in MB."""
    torch.set_num_threads(1)
    images, targets = torch.randn(16, 3, 64, 64), torch.randint(1000, (16,))
    step = stepping(ByHand() if which == "hand" else ours(), images, targets)
    for _ in range(3):
        step()
    print(memory.peak() / 2**20)


def peaks(run: Run) -> Iterator[Figure]:
    """Peak memory of a step beside one written by hand, each in a process of its own."""
    found = {}
    for which in ("hand", "ours"):
        command = [sys.executable, "-c", f"from benchmarks.distillation import print_peak; print_peak({which!r})"]
        place = Path(__file__).parent.parent
        found[which] = float(subprocess.run(command, check=True, capture_output=True, text=True, cwd=place).stdout)
    note = f"{found['ours']:.0f} / {found['hand']:.0f} MB"
    yield Figure("peak memory of a step / by hand", found["ours"] / found["hand"], "x", at_most=1.05, note=note)
