"""Exact masks on ResNet-50 against torch.nn.utils.prune (50 % of all weights together) and ModelOpt (2:4), in turns.

python benchmarks/masks.py [--rounds N] [--quick] [--modelopt PYTHON]

PYTHON is the interpreter of an environment with torch, torchvision and nvidia-modelopt; without it 2:4 has no peer.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn


def modelopt_child() -> None:
    """Runs in the other environment: masks a fresh ResNet-50 2:4 for every line it reads, answers with the seconds."""
    from torchvision.models import resnet50

    import modelopt.torch.sparsity as mts  # type: ignore[import-not-found]  # isort: skip

    torch.set_num_threads(1)
    original = resnet50(weights=None).eval()
    print("ready", flush=True)
    for _ in sys.stdin:
        model = copy.deepcopy(original)
        started = time.perf_counter()
        model = mts.sparsify(model, "sparse_magnitude")
        taken = time.perf_counter() - started
        rows = model.get_submodule("layer3.1.conv2").weight.detach().movedim(1, -1).reshape(-1, 4)
        print(f"answer {taken} {bool((rows.count_nonzero(1) == 2).all())}", flush=True)


class Peer:
    """ModelOpt in a process of its own."""

    def __init__(self, python: Path) -> None:
        command = [str(python), "-W", "ignore", __file__, "--child"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._read("ready")

    def _read(self, word: str) -> list[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.split()
        raise SystemExit(
            "the environment given by --modelopt cannot run ModelOpt: does 'import modelopt.torch.sparsity' work?"
        )

    def seconds(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        _, taken, exact = self._read("answer")
        if exact != "True":
            print("ModelOpt's mask is not exactly 2:4")
        return float(taken)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def torch_global(model: nn.Module) -> None:
    from torch.nn.utils import prune

    from fxcompress.pruning.sites import PRUNABLE

    weights = [(module, "weight") for module in model.modules() if isinstance(module, PRUNABLE)]
    prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=0.5)


def check(model: nn.Module, share: float) -> str:
    """Zeros over elements; and whether that is exactly the share asked."""
    from fxcompress.pruning.sites import sites

    weights = [site.value() for site in sites(model).values()]
    total = sum(w.numel() for w in weights)
    zeros = total - sum(int(w.count_nonzero()) for w in weights)
    return f"{zeros:,} of {total:,}{' (exact)' if zeros == round(share * total) else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--modelopt", type=Path, help="the Python of an environment with nvidia-modelopt")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        modelopt_child()
        return
    from fxcompress.bench import models
    from fxcompress.pruning import MagnitudePruner

    torch.set_num_threads(1)
    original = models.build("resnet50")
    image = models.example_inputs("resnet50")[0]
    peer = Peer(options.modelopt) if options.modelopt else None
    whole, two_four = MagnitudePruner(0.5), MagnitudePruner(pruning_type="semi_structured")
    taken: dict[str, list[float]] = {"forward": [], "torch global": [], "global": [], "ModelOpt 2:4": [], "2:4": []}
    zeros: dict[str, str] = {}
    for _ in range(2 if options.quick else options.rounds):
        with torch.no_grad():
            taken["forward"].append(timed(lambda: original(image)))
        peer_model = copy.deepcopy(original)
        taken["torch global"].append(timed(lambda model=peer_model: torch_global(model)))  # type: ignore[misc]
        model = copy.deepcopy(original)
        taken["global"].append(timed(lambda model=model: whole.apply_mask(model)))  # type: ignore[misc]
        zeros["global"] = check(model, 0.5)
        if peer is not None:
            taken["ModelOpt 2:4"].append(peer.seconds())
        model = copy.deepcopy(original)
        taken["2:4"].append(timed(lambda model=model: two_four.apply_mask(model)))  # type: ignore[misc]
        zeros["2:4"] = check(model, 0.5)
    if peer is not None:
        peer.close()
    medians = {label: statistics.median(times) for label, times in taken.items() if times}
    rows = [
        (label, f"{seconds:.3f}", f"{seconds / medians['forward']:.2f}", zeros.get(label, ""))
        for label, seconds in medians.items()
    ]
    print(f"ResNet-50, torch {torch.__version__}, one thread, median of {len(taken['forward'])} rounds in turns")
    print(tabulate(rows, ("", "seconds", "forward passes", "zeros"), disable_numparse=True))
    print(f"global 50 %: {medians['torch global'] / medians['global']:.1f} times faster than torch.nn.utils.prune")
    if "ModelOpt 2:4" in medians:
        print(f"2:4: {medians['ModelOpt 2:4'] / medians['2:4']:.1f} times faster than ModelOpt")


if __name__ == "__main__":
    main()
