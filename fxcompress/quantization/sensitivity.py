"""How good a quantized model is, and which layers cost it most."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from fxcompress.errors import ConfigError
from fxcompress.files import write_text
from fxcompress.graph.digest import digest, state_of
from fxcompress.graph.inputs import Arguments, tensors_in

__all__ = ["Judge", "Metric", "SweepFile", "fingerprint", "sweep"]

Metric = Literal["auto", "accuracy", "agreement", "fidelity"]


@dataclass
class Judge:
    """Scores a model in percent on batches; 100 is perfect.

    ``accuracy``   samples whose largest output is at the target
    ``agreement``  samples whose largest output is where the float model has it
    ``fidelity``   100·(1 − noise power / signal power) of all outputs against the float model: 99 is 20 dB, 99.9 is 30 dB
    ``auto``       accuracy where every batch has integer targets and the output is one row per sample, fidelity elsewhere
    """

    calls: Sequence[Arguments]
    targets: Sequence[Any]
    metric: Metric = "auto"
    expected: list[Any] = field(default_factory=list)
    whole: float = 100.0

    def listen(self, model: nn.Module) -> None:
        """Take ``model`` as the float model everything is compared with."""
        with torch.no_grad():
            self.expected = [call(model) for call in self.calls]
        rows = all(isinstance(e, Tensor) and e.dim() == 2 for e in self.expected)
        labels = all(isinstance(t, Tensor) and t.dim() == 1 and not t.is_floating_point() for t in self.targets)
        if self.metric == "auto":
            self.metric = "accuracy" if rows and labels and self.targets else "fidelity"
        if self.metric in ("accuracy", "agreement") and not rows:
            raise ConfigError(f"metric {self.metric!r} needs a model whose output is one row per sample; use 'fidelity'.")
        if self.metric == "accuracy" and not labels:
            raise ConfigError("metric 'accuracy' needs batches (input, integer target); use 'agreement' or 'fidelity'.")
        self.whole = self._score(self.expected)

    def drop(self, model: nn.Module) -> tuple[float, float]:
        """Points lost against the float model, and the noise power over the signal power."""
        with torch.no_grad():
            results = [call(model) for call in self.calls]
        return self.whole - self._score(results), self._noise(results)

    def _score(self, results: Sequence[Any]) -> float:
        if self.metric == "fidelity":
            return 100.0 * (1.0 - self._noise(results))
        wanted = self.targets if self.metric == "accuracy" else [e.argmax(1) for e in self.expected]
        right = sum(int((r.argmax(1) == t.to(r.device)).sum()) for r, t in zip(results, wanted, strict=True))
        return 100.0 * right / sum(len(t) for t in wanted)

    def _noise(self, results: Sequence[Any]) -> float:
        signal = noise = 0.0
        for expected, found in zip(tensors_in(self.expected), tensors_in(list(results)), strict=True):
            exact = expected.to(torch.float64)
            signal += float(exact.square().sum())
            noise += float((exact - found.to(torch.float64)).square().sum())
        return noise / signal if signal else float(noise > 0)


def sweep(
    layers: Iterable[str],
    noise_of: Callable[[str], float],
    file: SweepFile,
    out_of_time: Callable[[], bool],
) -> dict[str, float]:
    """What each layer costs: ``noise_of(layer)``, the noise of a model in which it alone is quantized.

    Noise of several layers adds up where it is small; where it is large, taking one of many away would tell nothing.

    Layers found in ``file`` are not measured again; where time is up the rest stays unmeasured.
    """
    for name in layers:
        if name not in file.costs:
            if out_of_time():
                break
            file.put(name, noise_of(name))
    return file.costs


class SweepFile:
    """Costs by layer, kept in a JSON file where a path is given; written whole after every layer.

    A file of another model, other data or other settings (another ``key``) is begun anew.
    """

    def __init__(self, path: str | None, key: str) -> None:
        self.path, self.key = Path(path) if path else None, key
        self.costs: dict[str, float] = {}
        self.resumed = 0
        if self.path is not None and self.path.is_file():
            try:
                found = json.loads(self.path.read_text(encoding="utf-8"))
                kept = found["costs"] if found["key"] == key else {}
                self.costs = {str(name): float(cost) for name, cost in kept.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"{str(self.path)!r} is not a sensitivity sweep ({error}); move it out of the way."
                ) from error
        self.resumed = len(self.costs)

    def put(self, name: str, cost: float) -> None:
        self.costs[name] = cost
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps({"key": self.key, "costs": self.costs}, indent=1))


def fingerprint(module: fx.GraphModule, calls: Sequence[Arguments], settings: Mapping[str, Any]) -> str:
    """One word for a model, its tensors, the data and the settings."""
    data = [("", tensor) for tensor in tensors_in([tuple(call) for call in calls])]
    return digest([*state_of(module), *data], module.code, sorted(settings.items()))
