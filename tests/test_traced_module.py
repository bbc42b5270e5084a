"""A traced module generates its code when somebody runs it or looks at it, and is freed when nobody holds it."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxcompress import PassManager, QATQuantizer, trace
from fxcompress.graph import edit
from fxcompress.graph.module import signature

X = torch.randn(2, 3)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor, scale: float = 2.0, *, shift: Tensor | None = None) -> Tensor:
        found = self.layer(x) * scale
        return found if shift is None else found + shift


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x) + 1


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


USES = {
    "run": lambda module: module(X),
    "copied": lambda module: copy.deepcopy(module)(X),
    "called inside another": lambda module: Around(module)(X) - 1,
    "compiled": lambda module: torch.compile(module, backend="eager", fullgraph=True)(X),
    "compiled inside another": lambda module: torch.compile(Around(module), backend="eager", fullgraph=True)(X) - 1,
    "exported": lambda module: torch.export.export(Around(module), (X,)).module()(X) - 1,
    "traced again": lambda module: fx.symbolic_trace(Around(module))(X) - 1,
    "printed": lambda module: module(X) if "def forward" in str(module) else None,
    "its code": lambda module: module(X) if "self.layer" not in module.code else None,
}


@pytest.mark.parametrize("use", sorted(USES))
def test_what_was_never_run_can_be_used_in_every_way(use: str) -> None:
    model = layers()
    assert torch.allclose(USES[use](trace(model, X)), model(X), atol=1e-6)


def test_code_follows_the_graph() -> None:
    module = trace(layers(), X)
    assert torch.equal(module(X), layers()(X))
    relu = next(node for node in module.graph.nodes if node.target == "1")
    edit.replace(relu, edit.insert_before(relu, torch.neg, (relu.args[0],)))
    edit.finish(module)
    first: Any = module.get_submodule("0")
    last: Any = module.get_submodule("2")
    assert "neg" in str(module) and "neg" in module.code and torch.allclose(module(X), last(-first(X)))


def test_the_signature_of_a_graph_is_that_of_its_code() -> None:
    module = trace(Scaled(), {"x": X, "scale": 3.0, "shift": torch.ones(4)})
    before = signature(module)
    assert str(before) == str(inspect.signature(module.forward)) and list(before.parameters) == ["x", "scale", "shift"]


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_whose_tensors_the_graph_reads_itself_still_prints(bias: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 16, bias=bias))
    prepared = QATQuantizer().prepare(model, torch.randn(2, 3, 4, 4))
    assert "Linear(in_features=32" in str(prepared) and "Conv2d(3, 8" in repr(prepared)
    assert set(model.state_dict()) <= set(prepared.state_dict())


def test_a_module_that_nobody_holds_is_freed() -> None:
    found = PassManager(["remove-dead"], progress=False).run(layers(), X)
    found(X)
    held = weakref.ref(found)
    del found
    gc.collect()
    assert held() is None
