"""The verifier notices what it must, and runs a graph no more often than that takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxcompress import PassManager
from fxcompress.errors import PromiseError, VerificationError
from fxcompress.graph.recorder import Recorder
from fxcompress.quantization.observer import ActivationObserver

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
QUANTIZE: list[Any] = [
    "remove-dead",
    "fold-batchnorm",
    "fuse-activations",
    {"insert-observers": {"calibrator": "minmax"}},
    {"calibrate": {"num_batches": 1}},
    "fold-quantization",
    "lower",
]


class TwoFaced(nn.Module):
    """Computes something else while it is traced."""

    def __init__(self, changed: Callable[[Any], Any]) -> None:
        super().__init__()
        self.conv, self.norm, self.changed = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), changed

    def forward(self, x: Any) -> Any:
        y = self.norm(self.conv(x))
        return torch.relu(self.changed(y) if isinstance(x, fx.Proxy) else y)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()


def manager(*steps: Any) -> PassManager:
    return PassManager(list(steps), reproducer=False, progress=False)


@pytest.mark.parametrize("steps", [[], ["remove-dead"], ["fold-batchnorm"], ["fuse-activations"], [{"cast-half": {}}]])
def test_a_graph_that_computes_something_else_than_the_model_is_refused_whatever_comes_first(steps: list[Any]) -> None:
    torch.manual_seed(0)
    with pytest.raises(VerificationError, match="does not compute what the model computes"):
        manager(*steps).run(TwoFaced(lambda y: 1.001 * y).eval(), X)


def test_roundings_of_the_trace_are_not_held_against_an_exact_pass() -> None:
    torch.manual_seed(0)
    m = manager("fuse-activations")
    m.run(TwoFaced(lambda y: y + 1e-6).eval(), X)
    assert m.ledger.rows[-1].snr is not None and 80 < m.ledger.rows[-1].snr < 150


def test_an_observer_that_does_not_hand_on_what_it_is_given_breaks_the_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ActivationObserver, "forward", lambda self, input: 1.001 * input)
    with pytest.raises(PromiseError, match="'insert-observers' promised outputs exact"):
        manager("insert-observers").run(model(), X)


def test_a_graph_runs_once_for_each_pass_that_changes_what_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    record = Recorder.record

    def counted(self: Recorder, call: Any) -> Any:
        runs.append(type(self).__name__)
        return record(self, call)

    monkeypatch.setattr(Recorder, "record", counted)
    m = manager(*QUANTIZE)
    m.run(model(), X, [X])
    kernels = ["_Kernels"]
    assert [name for name in runs if name not in kernels] == 4 * ["Values"]  # folded, fused, quantized, lowered
    assert runs.count(*kernels) == 1
    runs.clear()
    manager(*QUANTIZE).run(model(), torch.cat([X, X]), [X])  # kernels are held against the graph on two samples
    assert runs.count("Values") == 5


def test_kernels_are_judged_alike_with_and_without_verification() -> None:
    remarks = []
    for verify in (True, False):
        m = PassManager(QUANTIZE, verify=verify, progress=False)
        m.run(model(), X, [X])
        remarks.append(m.ledger.rows[-1].remarks)
    assert remarks[0] == remarks[1] and any("kernels" in remark.reason for remark in remarks[0])
