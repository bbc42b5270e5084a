"""What a step of quantization-aware training costs, beside the same step in float and torch's own FX QAT, in turns.

python benchmarks/qat.py [--batch N] [--size N] [--threads N] [--model NAME] [--quick]
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress import LSQQuantizer, QATQuantizer
from fxcompress.bench import interleaved, models


def torch_fx_qat(model: nn.Module, images: Tensor) -> nn.Module:
    """torch's own, with the qconfig it gives for x86."""
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared: nn.Module = prepare_qat_fx(model, get_default_qat_qconfig_mapping("x86"), (images,))
    return prepared


def candidates(model: nn.Module, images: Tensor) -> dict[str, nn.Module]:
    """The model in float, and every way of preparing it; a peer that is not installed is named and left out."""
    found = {"fp32": copy.deepcopy(model)}
    found["QATQuantizer()"] = QATQuantizer(progress=False).prepare(model, images)
    found["QATQuantizer(observer='minmax')"] = QATQuantizer(observer="minmax", progress=False).prepare(model, images)
    found["QATQuantizer(per_channel=False)"] = QATQuantizer(per_channel=False, progress=False).prepare(model, images)
    found["LSQQuantizer()"] = LSQQuantizer(progress=False).prepare(model, images)
    try:
        found["torch.ao prepare_qat_fx"] = torch_fx_qat(copy.deepcopy(model), images)
    except ImportError as error:
        print(f"torch's FX QAT is not here: {error}")
    return found


def step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """One SGD step, forward and backward."""
    optimizer = torch.optim.SGD(model.train().parameters(), 1e-4, momentum=0.9)

    def run() -> None:
        with torch.enable_grad():
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    images = torch.randn(options.batch, 3, options.size, options.size)
    labels = torch.randint(1000, (options.batch,))
    prepared = candidates(models.build(options.model).train(), images)
    rounds = {"runs": 5, "warmup": 1, "seconds": 60} if options.quick else {"runs": 20, "warmup": 2, "seconds": 240}
    found = interleaved({name: step(model, images, labels) for name, model in prepared.items()}, **rounds)  # type: ignore[arg-type]
    base = found["fp32"]
    rows = [
        (name, f"{1e3 * t.median:.0f}", f"{t.median / base.median:.2f}", f"{t.minimum / base.minimum:.2f}", t.runs)
        for name, t in found.items()
    ]
    print(f"{options.model}, batch {options.batch}, {options.size}×{options.size}, {options.threads} thread(s)")
    print(tabulate(rows, ("step", "median ms", "median / fp32", "fastest / fp32", "runs"), disable_numparse=True))


if __name__ == "__main__":
    main()
