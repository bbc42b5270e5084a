"""Half precision: against fp32 on the CPU, what stays in fp32, dtypes at the border."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress import DynamicQuantizer, PassManager, PTQQuantizer, load, save, trace
from fxcompress.errors import ConfigError, DataError
from fxcompress.graph import ops
from fxcompress.graph.cost import stored_bytes
from fxcompress.graph.results import output_snr
from fxcompress.graph.shapes import dtype_of
from tests.strategies import Drawn, networks


class Mixed(nn.Module):
    """Layers, normalisation, softmax, sums, residuals, integers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        y = F.relu(self.norm(self.conv(x)) + self.conv(x))
        pooled = y.sum((2, 3)) / (y.shape[2] * y.shape[3]) + self.embed(tokens)
        return {"p": torch.softmax(self.head(pooled), -1), "top": pooled.argmax(-1), "y": torch.cat([y, y.exp()], 1)}


def mixed() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return Mixed().eval(), (torch.randn(2, 3, 6, 6), torch.tensor([1, 4]))


def test_outputs_keep_dtype_and_structure_and_are_close() -> None:
    model, call = mixed()
    expected = model(*call)
    result = PassManager(["cast-half"], reproducer=False).run(model, call)
    found = result(*call)
    assert {k: (v.dtype, v.shape) for k, v in found.items()} == {k: (v.dtype, v.shape) for k, v in expected.items()}
    assert output_snr(expected["p"], found["p"]) > 50 and output_snr(expected["y"], found["y"]) > 50
    assert stored_bytes(result) < 0.6 * stored_bytes(model)
    assert next(model.parameters()).dtype == torch.float32


def test_fragile_operators_compute_in_fp32_and_layers_in_half() -> None:
    model, call = mixed()
    result = PassManager(["cast-half"], reproducer=False).run(model, call)
    dtypes: dict[str, set[Any]] = {}
    for node in result.graph.nodes:
        dtypes.setdefault(ops.kind(node), set()).add(dtype_of(node))
    for kind in ("softmax", "group_norm", "exp", "sum"):
        assert dtypes[kind] == {torch.float32}, kind
    for kind in ("conv2d", "linear", "embedding", "add", "relu"):
        assert dtypes[kind] == {torch.float16}, kind
    assert result.get_parameter("norm.weight").dtype == torch.float32
    assert result.get_parameter("conv.weight").dtype == torch.float16


def test_a_value_is_cast_once_for_all_its_readers() -> None:
    model, call = mixed()
    result = PassManager(["cast-half"], reproducer=False).run(model, call)
    casts = [(n.args[0], n.args[1]) for n in result.graph.nodes if ops.kind(n) == "to"]
    assert len(casts) == len(set(casts))


@given(networks())
@settings(deadline=None, max_examples=25)
def test_every_drawn_network_is_close_to_itself(drawn: Drawn) -> None:
    expected = drawn.model(*drawn.call)
    result = PassManager(["cast-half"], reproducer=False).run(drawn.model, drawn.call)
    assert output_snr(expected, result(*drawn.call)) > 40


@pytest.mark.parametrize("operator", [lambda x: x * 1e6, lambda x: x + 1e-9, lambda x: x.masked_fill(x > 0, -1e9)])
def test_constants_that_half_precision_does_not_hold_stay(operator: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return operator(self.fc(x))

    model, x = Net().eval(), torch.randn(3, 4)
    result = PassManager(["cast-half"], reproducer=False).run(model, x)
    assert output_snr(model(x), result(x)) > 50


def test_what_would_overflow_stays_in_fp32_with_a_remark() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    nn.init.constant_(model[0].weight, 1e5)  # type: ignore[arg-type]
    nn.init.constant_(model[1].weight, 1e-4)  # type: ignore[arg-type]
    x = torch.rand(3, 4)
    manager = PassManager(["cast-half"], reproducer=False)
    result = manager.run(model, x)
    assert torch.isfinite(result(x)).all() and output_snr(model(x), result(x)) > 40
    assert "its values reach" in str(manager.ledger)


@pytest.mark.parametrize("quantizer", [PTQQuantizer, DynamicQuantizer])
def test_quantizers_cast_save_and_load(quantizer: Any, tmp_path: Path) -> None:
    model, call = mixed()
    made = quantizer(dtype="fp16", exclude_layers=["head"])
    result = made.quantize(model, [{"x": call[0], "tokens": call[1]}])
    assert result.get_parameter("head.weight").dtype == torch.float32
    save(result, tmp_path / "half")
    found, again = result(*call), load(tmp_path / "half")(*call)
    assert all(torch.equal(found[key], again[key]) for key in found)
    parts = made.convert(made.calibrate(made.prepare(model, call), [call[0]]))
    assert torch.equal(parts(*call)["p"], found["p"])


def test_what_cannot_be_is_refused() -> None:
    model, _ = mixed()
    with pytest.raises(DataError, match="give example_inputs"):
        PassManager(["cast-half"], reproducer=False).run(trace(model))
    with pytest.raises(ConfigError, match="can set float only"):
        PTQQuantizer(dtype="fp16", overrides={"head": {"bits": 4}})
