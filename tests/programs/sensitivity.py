"""Run under torchrun: analyse on several processes and write what every one of them found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from fxcompress.distributed import rank, world
from fxcompress.pruning import SensitivityAnalyzer


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(64, 6)
    folder = Path(sys.argv[1])
    analyzer = SensitivityAnalyzer(num_steps=3, pruning_type="unstructured", cache=folder / "cache.json", progress=False)
    curves = analyzer.analyze(model, [(x, model(x).argmax(1))])
    own = folder / ("cache.json" if rank() == 0 else f"cache.json.rank{rank()}")
    found = {"curves": curves, "baseline": analyzer.baseline, "world": world(), "wrote": own.is_file()}
    (folder / f"{rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
