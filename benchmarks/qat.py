"""What a step of quantization-aware training costs, beside the same step in float and torch's own FX QAT, in turns."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.figure import Figure
from benchmarks.run import Run
from benchmarks.turns import in_turns, stopwatch
from fxcompress import LSQQuantizer, QATQuantizer
from fxcompress.bench import models

PEER = "torch.ao prepare_qat_fx"


def torch_fx_qat(model: nn.Module, images: Tensor) -> nn.Module:
    """torch's own, with the qconfig it gives for x86."""
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared: nn.Module = prepare_qat_fx(model, get_default_qat_qconfig_mapping("x86"), (images,))
    return prepared


def candidates(model: nn.Module, images: Tensor, run: Run) -> dict[str, nn.Module]:
    """The model in float, and every way of preparing it; a peer that is not installed is named and left out."""
    found = {"fp32": copy.deepcopy(model)}
    found["QATQuantizer()"] = QATQuantizer(progress=False).prepare(model, images)
    found["QATQuantizer(observer='minmax')"] = QATQuantizer(observer="minmax", progress=False).prepare(model, images)
    found["QATQuantizer(per_channel=False)"] = QATQuantizer(per_channel=False, progress=False).prepare(model, images)
    found["LSQQuantizer()"] = LSQQuantizer(progress=False).prepare(model, images)
    try:
        found[PEER] = torch_fx_qat(copy.deepcopy(model), images)
    except ImportError as error:
        run.tell(f"torch's FX QAT is not here: {error}")
    return found


def step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], float]:
    """The seconds of one SGD step, forward and backward."""
    optimizer = torch.optim.SGD(model.train().parameters(), 1e-4, momentum=0.9)

    def once() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return stopwatch(once)


def measure(run: Run) -> Iterator[Figure]:
    """ResNet-18, batch 8, 224×224."""
    batch, size = run.pick((8, 224), (2, 64))
    name = run.chosen(("resnet18",), ("resnet18",))[0]
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))
    prepared = candidates(models.build(name).train(), images, run)
    turns = in_turns({what: step(model, images, labels) for what, model in prepared.items()}, run.pick(20, 2), warmup=2)
    for what in turns.taken:
        if what == "fp32":
            yield Figure(f"{name}: step in fp32", 1e3 * turns.median(what), "ms")
            continue
        bound = None if what == PEER else 1.6
        yield Figure(f"{name}: step of {what} / fp32", turns.ratio(what, "fp32"), "x", at_most=bound)
