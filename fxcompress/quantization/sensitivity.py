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
from fxcompress.files import make_folder, read_json, write_text
from fxcompress.graph.digest import digest, state_of
from fxcompress.graph.inputs import Arguments, tensors_in
from fxcompress.quantization.confidence import share, share_at_most

__all__ = ["Judge", "Metric", "SweepFile", "Verdict", "fingerprint", "sweep"]

Metric = Literal["auto", "accuracy", "agreement", "fidelity"]


@dataclass(frozen=True)
class Verdict:
    """What a model loses against the float model: ``drop`` in points on the samples at hand, ``at_most`` on others of their
    kind with the confidence asked for, and ``noise``, the noise power over the signal power."""

    drop: float
    at_most: float
    noise: float


@dataclass
class Judge:
    """Scores a model in percent on batches; 100 is perfect.

    ``accuracy``   samples whose largest output is at the target
    ``agreement``  samples whose largest output is where the float model has it
    ``fidelity``   100·(1 − noise power / signal power) of all outputs against the float model: 99 is 20 dB, 99.9 is 30 dB
    ``auto``       accuracy where every batch has integer targets and the output is one row per sample, fidelity elsewhere

    ``confidence``  of what it says about samples it has not seen
    """

    calls: Sequence[Arguments]
    targets: Sequence[Any]
    metric: Metric = "auto"
    confidence: float = 0.95
    expected: list[Any] = field(default_factory=list)

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

    @property
    def samples(self) -> int:
        """How many samples the float model was heard on."""
        return sum(len(_powers([expected])) for expected in self.expected)

    def drop(self, model: nn.Module) -> Verdict:
        """What ``model`` loses."""
        with torch.no_grad():
            results = [call(model) for call in self.calls]
        lost, of, noise = [], [], []
        for number, (expected, found) in enumerate(zip(self.expected, results, strict=True)):
            signal = _powers([expected])
            noise += _powers([expected, found])
            of += signal
            if self.metric != "fidelity":
                lost += self._lost(number, expected, found)
        parts, wholes = (noise, of) if self.metric == "fidelity" else (lost, [1.0] * len(lost))
        return Verdict(100 * share(parts, wholes), 100 * share_at_most(parts, wholes, self.confidence), share(noise, of))

    def noise(self, model: nn.Module, enough: int) -> float:
        """The noise on the first batches that hold ``enough`` samples."""
        noise: list[float] = []
        signal: list[float] = []
        for call, expected in zip(self.calls, self.expected, strict=True):
            if len(signal) < enough:
                with torch.no_grad():
                    noise += _powers([expected, call(model)])
                signal += _powers([expected])
        return share(noise, signal)

    def _lost(self, number: int, expected: Tensor, found: Tensor) -> list[float]:
        """Sample by sample, 1 where the float model is right and the other is not, −1 where it is the other way round."""
        wanted = self.targets[number] if self.metric == "accuracy" else expected.argmax(1)
        right, now = (result.argmax(1) == wanted.to(result.device) for result in (expected, found))
        return (right.to(torch.float64) - now.to(torch.float64)).tolist()


def _powers(results: Sequence[Any]) -> list[float]:
    """The power of a result, or of the difference of two, by sample; in one where its tensors are not of as many samples."""
    pairs = list(zip(*(tensors_in(result) for result in results), strict=True))
    sizes = {first.shape[0] if first.dim() else 0 for first, *_ in pairs}
    samples = sizes.pop() if len(sizes) == 1 and 0 not in sizes else 1
    total = torch.zeros(samples, dtype=torch.float64, device="cpu")
    for first, *others in pairs:
        value = first.to(torch.float64)
        value = value - others[0].to(torch.float64) if others else value
        total += value.square().reshape(samples, -1).sum(1).cpu()
    return total.tolist()


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
                found = read_json(self.path)
                kept = found["costs"] if found["key"] == key else {}
                self.costs = {str(name): float(cost) for name, cost in kept.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"{str(self.path)!r} is not a sensitivity sweep ({error}); move it out of the way."
                ) from error
        self.resumed = len(self.costs)

    def put(self, name: str, cost: float) -> None:
        """Keep what a layer costs; a file is written at once."""
        self.costs[name] = cost
        if self.path is not None:
            make_folder(self.path.parent)
            write_text(self.path, json.dumps({"key": self.key, "costs": self.costs}, indent=1))


def fingerprint(module: fx.GraphModule, calls: Sequence[Arguments], settings: Mapping[str, Any]) -> str:
    """One word for a model, its tensors, the data and the settings."""
    data = [("", tensor) for tensor in tensors_in([tuple(call) for call in calls])]
    return digest([*state_of(module), *data], module.code, sorted(settings.items()))
