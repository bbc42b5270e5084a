"""Tracing: every rung of the ladder, signatures, sharing, in-place code, side effects."""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress import PassManager, trace
from fxcompress.errors import DataError, TraceError
from fxcompress.graph import kind, regions
from fxcompress.graph.results import largest_difference, same_structure
from fxcompress.graph.shapes import shape_of


def rungs(module: Any) -> set[tuple[str, str]]:
    return {(rung.module, rung.rung) for rung in module.meta["rungs"] if rung.rung != "note"}


class Looping(nn.Module):
    """Defeats symbolic tracing: asks how a tensor lies in memory; iterates over a list it is given, and asks for a size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        return [self.conv(image) if image.is_contiguous() and image.shape[-1] > 4 else image for image in images]


class AroundLooping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.loop, self.tail = nn.Conv2d(3, 3, 1), Looping(), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.loop([self.stem(x), x])
        return self.tail(first + second)


class DataDependent(nn.Module):
    """Defeats torch.export too."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        if y.mean() > 1000:
            return y
        return self.head(y[:, :, y.argmax() % y.shape[2]].mean(-1))


class AroundDataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 3, 1), DataDependent()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.stem(x)).softmax(-1)


def assert_same(model: nn.Module, traced: nn.Module, *args: Any, **kwargs: Any) -> None:
    with torch.no_grad():
        expected, found = model(*args, **kwargs), traced(*args, **kwargs)
    assert same_structure(expected, found)
    assert largest_difference(expected, found) == 0.0


def test_the_smallest_defeating_module_is_exported_and_keeps_names() -> None:
    model, x = AroundLooping().eval(), torch.randn(2, 3, 6, 6)
    traced = trace(model, x)
    assert rungs(traced) == {("loop", "exported")}
    assert set(dict(traced.named_parameters())) == set(dict(model.named_parameters()))
    assert "conv2d" in {kind(node) for node in traced.graph.nodes}
    assert_same(model, traced, x)
    assert_same(model, traced, torch.randn(5, 3, 9, 7))


class Padding(nn.Module):
    """Pads what is odd, so that what it does depends on the sizes; the batch may vary."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_contiguous() and x.shape[3] % 2:
            x = nn.functional.pad(x, (0, 1))
        return self.conv(x).unflatten(3, (-1, 2))


def test_an_exported_part_says_which_sizes_its_code_decides_by() -> None:
    model, x = nn.Sequential(Padding().eval(), nn.ReLU()).eval(), torch.randn(2, 3, 6, 6)
    traced = trace(model, x)
    (rung,) = traced.meta["rungs"]
    assert rung.module == "0" and rung.reason.endswith("what it does for others is not kept: dimension 3 of x")
    assert_same(model, traced, torch.randn(5, 3, 9, 8))
    whole = trace(AroundLooping().eval(), x)
    assert "decides by sizes" not in whole.meta["rungs"][0].reason


def test_sizes_that_one_part_decides_by_are_fixed_for_others_of_its_class_and_said() -> None:
    model = nn.Sequential(Padding(), nn.Flatten(3), nn.Conv2d(4, 3, 1), Padding()).eval()
    traced = trace(model, torch.randn(2, 3, 6, 6))
    first, second = traced.meta["rungs"]
    assert first.reason.endswith("dimension 3 of x") and "such code decides: dimensions [3]" in second.reason
    assert_same(model, traced, torch.randn(5, 3, 9, 6))
    assert_same(model, traced, torch.randn(1, 3, 4, 6))


def test_without_example_inputs_the_defeating_module_stays_an_island() -> None:
    model = AroundLooping().eval()
    traced = trace(model)
    assert rungs(traced) == {("loop", "island")}
    assert_same(model, traced, torch.randn(2, 3, 6, 6))


def test_what_export_refuses_is_an_island_with_compiled_children() -> None:
    model, x = AroundDataDependent().eval(), torch.randn(2, 3, 6, 6)
    traced = trace(model, x)
    assert ("inner", "island") in rungs(traced)
    assert {"", "inner.features", "inner.head"} <= set(regions(traced))
    assert_same(model, traced, x)
    assert set(traced.state_dict()) == set(model.state_dict())


def test_a_top_that_is_an_island_keeps_names_and_compiles_children() -> None:
    model, x = DataDependent().eval(), torch.randn(2, 3, 6, 6)
    traced: Any = trace(model, x)
    assert ("", "island") in rungs(traced)
    assert set(regions(traced)) == {"features", "head"}
    assert set(traced.state_dict()) == set(model.state_dict())
    assert_same(model, traced, x)
    traced.train()
    assert traced.features.training and not model.training


class Point(NamedTuple):
    x: Tensor
    y: Tensor


class Outputs(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None, *, flag: bool = False, scale: float = 2.0) -> Any:
        if mask is not None:
            x = x * mask
        if flag:
            x = -x
        ordered = collections.OrderedDict(a=x, b=[x * scale])
        return {"point": Point(x, x + 1), "ordered": ordered, "tuple": (x, [x])}


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("flag", [False, True])
def test_optional_and_keyword_inputs_and_nested_outputs_survive(mask: bool, flag: bool) -> None:
    x = torch.randn(2, 3)
    call: dict[str, Any] = {"x": x, **({"mask": torch.ones(2, 3)} if mask else {}), **({"flag": True} if flag else {})}
    traced = trace(Outputs(), call)
    assert_same(Outputs(), traced, **call)
    notes = {rung.reason for rung in traced.meta["rungs"]}
    assert any("flag" in note for note in notes)


class NestedInput(nn.Module):
    def forward(self, pair: dict[str, Tensor], items: list[Tensor]) -> Tensor:
        total = pair["a"] - pair["b"]
        for item in items:
            total = total + item
        return total


def test_nested_inputs_keep_their_structure() -> None:
    call = ({"a": torch.randn(2), "b": torch.randn(2)}, [torch.randn(2), torch.randn(2)])
    assert_same(NestedInput(), trace(NestedInput(), call), *call)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True)
        self.alias = self.conv
        self.head = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(x)) + self.alias(x)
        y = x.mean((2, 3))
        return self.tied(self.relu(self.head(y)) + y)


def test_shared_modules_and_tied_weights_stay_shared() -> None:
    model: Any = Shared().eval()
    x = torch.randn(1, 3, 4, 4)
    traced: Any = trace(model, x)
    assert traced.head.weight is traced.tied.weight
    assert_same(model, traced, x)
    assert traced.head.weight is not model.head.weight


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a = x * 2
        view = a[:, :2]
        F.relu(a, inplace=True)
        b = x + 1
        b += a
        c = x - 1
        kept = c.chunk(2, 1)[0]
        c.mul_(3)
        return a, view, b, c, kept


def test_in_place_code_computes_what_it_computed() -> None:
    x = torch.randn(2, 4)
    expected = InPlace()(x)
    found = trace(InPlace(), x)(x)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@torch.fx.wrap
def writes(x: Tensor, flag: int) -> Tensor:
    if x.shape[0] > 100:
        return x
    x += flag
    return x


class Wrapped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        writes(y, 3)
        return y


def test_a_wrapped_function_is_opened_and_its_side_effect_kept() -> None:
    x = torch.randn(2, 4)
    traced = trace(Wrapped(), x)
    assert all(node.op != "call_function" or kind(node) != "unknown" for node in traced.graph.nodes)
    assert_same(Wrapped(), traced, x)
    assert_same(Wrapped(), trace(Wrapped()), x)


def test_shapes_are_known_without_running_the_model() -> None:
    class Counting(nn.Module):
        ran = 0

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)

    traced = trace(nn.Sequential(nn.Conv2d(3, 5, 3), Counting(), nn.Linear(5 * 16, 2)), torch.randn(4, 3, 6, 6))
    assert [tuple(shape_of(node) or ()) for node in traced.graph.nodes][-2] == (4, 2)


def test_dropout_and_training_flags_survive() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.BatchNorm1d(2)).train()
    model[2].eval()
    traced = trace(model, torch.randn(4, 2))
    assert [traced.get_submodule(str(i)).training for i in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    ("call", "message"),
    [((torch.randn(1, 3, 4, 4), 1, 2), "do not fit"), ({"picture": torch.randn(1)}, "do not fit"), (7, "give a tensor")],
)
def test_example_inputs_that_do_not_fit_the_signature_are_refused(call: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        trace(nn.Conv2d(3, 3, 1), call)


def test_a_shape_that_does_not_fit_is_refused_with_the_node() -> None:
    with pytest.raises(DataError, match="do not run through the model"):
        trace(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Linear(9, 1)), torch.randn(1, 4, 4, 4))


def test_only_modules_are_traced() -> None:
    with pytest.raises(TraceError, match=r"takes an nn\.Module"):
        trace(torch.relu)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_what_torch_jit_compiled_is_refused_by_name() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    with pytest.raises(TraceError, match=r"1 is compiled by torch\.jit"):
        trace(nn.Sequential(nn.Linear(4, 4), scripted), torch.randn(2, 4))
    with pytest.raises(TraceError, match=r"the model is compiled by torch\.jit"):
        trace(scripted, torch.randn(2, 4))


def test_a_traced_model_takes_inputs_of_another_size() -> None:
    small = PassManager(["fold-batchnorm"]).run(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(2, 3, 8, 8))
    again = PassManager(["fuse-activations"]).run(small, torch.randn(5, 3, 12, 12))
    (conv,) = (node for node in again.graph.nodes if node.op == "call_module")
    assert conv.meta["tensor_meta"].shape == (5, 4, 10, 10)
