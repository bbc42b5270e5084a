"""revert-slow: parts are cut where integers end, measured apart, and put back with their trained weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress import PassManager, PTQQuantizer, coverage
from fxcompress.graph import ops, qdq
from fxcompress.graph.results import output_snr
from fxcompress.passes import revert_slow
from fxcompress.quantization.components import components, extract
from fxcompress.timing import Timing


class Gated(nn.Module):
    """Two integer parts around SiLU, which stays in float; the second reads the first part's input too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.third, self.head = nn.Conv2d(8, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.second(F.relu(self.first(x))))
        return self.head(F.relu(self.third(y)).mean((2, 3)))


def example() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 8, 8)


PREPARE: list[Any] = [
    "fuse-activations",
    {"insert-observers": {"calibrator": "minmax"}},
    "calibrate",
    "fold-quantization",
]


def quantized(model: nn.Module, *more: Any) -> tuple[Any, PassManager]:
    manager = PassManager([*PREPARE, *more], reproducer=False, progress=False)
    return manager.run(model, example(), [example()]), manager


def pretend(monkeypatch: pytest.MonkeyPatch, slow: set[str]) -> list[str]:
    """Let the parts with these first layers measure slower in integers; returns the parts that were measured."""
    seen: list[str] = []

    def timed(turns: Any, **options: Any) -> dict[str, Timing]:
        for turn in turns.values():
            turn()
        kinds = [ops.kind(n) for n in turns["float"].func.graph.nodes if n.op.startswith("call")]
        assert "unknown" not in kinds
        seen.append(turns["int8"].func.code.split("self.")[1].split("(")[0])
        int8 = 2.0 if any(name in seen[-1] for name in slow) else 0.5
        return {"int8": Timing(int8, int8, int8, 1), "float": Timing(1.0, 1.0, 1.0, 1)}

    monkeypatch.setattr(revert_slow, "interleaved", timed)
    return seen


def model() -> nn.Module:
    torch.manual_seed(0)
    return Gated().eval()


def test_a_part_computes_alone_what_it_computes_in_the_graph() -> None:
    reference, _ = quantized(model())
    parts = components(reference)
    assert [len(part.operators) for part in parts] == [2, 3]
    values: dict[str, Tensor] = {}

    class Keep(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            values[n.name] = super().run_node(n)
            return values[n.name]

    Keep(reference).run(example())
    for part in parts:
        alone = extract(reference, part)(*(values[node.name] for node in part.inputs))
        for found, node in zip(alone, part.outputs, strict=True):
            assert torch.equal(found, values[node.name])


def test_only_the_slower_part_goes_back_and_the_ledger_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = model()
    seen = pretend(monkeypatch, {"third"})
    result, manager = quantized(subject, "revert-slow")
    assert len(seen) == 2
    floats = {row.kind: row.reason for row in coverage(result).floats}
    assert floats.keys() == {"silu", "conv2d", "linear", "mean"}
    assert floats["linear"] == "int8 took 2000.000 ms and float 1000.000 ms"
    remarks = [remark.reason for remark in manager.ledger.rows[-1].remarks]
    assert remarks == ["int8 took 2000.000 ms and float 1000.000 ms: put back to float, 3 operator(s) in all"]
    assert torch.equal(result.get_parameter("third.weight"), subject.get_parameter("third.weight"))
    assert result.get_buffer("first.weight").dtype == torch.int8


def test_when_all_is_slower_the_model_is_the_trained_one_again(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = model()
    pretend(monkeypatch, {"first", "third"})
    result, _ = quantized(subject, "revert-slow", "lower")
    assert not any(node.target in (qdq.quantize, qdq.dequantize) for node in result.graph.nodes)
    torch.testing.assert_close(result(example()), subject(example()))
    assert coverage(result).integer_nodes == 0


def test_what_is_faster_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, set())
    kept, _ = quantized(model(), "revert-slow", "lower")
    plain, _ = quantized(model(), "lower")
    assert torch.equal(kept(example()), plain(example()))


def test_a_backend_that_takes_the_whole_graph_is_measured_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    subject = model()
    seen = pretend(monkeypatch, {"engine"})
    quantizer = PTQQuantizer("onnxruntime", never_slower=True, num_calibration_batches=1, progress=False)
    result = quantizer.quantize(subject, [example()])
    assert seen == ["engine"]
    assert output_snr(subject(example()), result(example())) > 80
    assert coverage(result).integer_nodes == 0


def test_it_runs_with_the_clock_too() -> None:
    subject = model()
    result = PTQQuantizer(never_slower=True, num_calibration_batches=1, progress=False).quantize(subject, [example()])
    assert output_snr(subject(example()), result(example())) > 20
