"""insert-taps: named values beside the output, safe from in-place operators, held through every pass."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxcompress
from fxcompress import Context, Pass, PassManager, trace
from fxcompress.errors import ConfigError, TraceError, VerificationError
from fxcompress.graph import addresses, taps
from fxcompress.graph.feature_view import features
from fxcompress.graph.results import output_snr
from tests.strategies import Drawn, networks

INT8: list[Any] = [
    "remove-dead",
    "fold-batchnorm",
    "fuse-activations",
    "insert-observers",
    {"calibrate": {"num_batches": 1}},
    "fold-quantization",
    "lower",
]


def tapped(model: nn.Module, example: Any, *layers: str) -> fx.GraphModule:
    return PassManager([{"insert-taps": {"layers": layers}}], reproducer=False).run(model, example)


def hooked(model: nn.Module, call: tuple[Tensor, ...], names: list[str]) -> dict[str, Tensor]:
    """What modules return, copied by forward hooks at once."""
    found: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, a, y, name=name: found.setdefault(name, y.clone()))  # type: ignore[misc]
        for name in names
    ]
    with torch.no_grad():
        model(*call)
    for handle in handles:
        handle.remove()
    return found


def _call(model: nn.Module, name: str, x: Tensor) -> Tensor:
    return model.get_submodule(name)(x)


class Residual(nn.Module):
    """Two convolutions with in-place activations, one of them called twice, and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + y)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(OrderedDict(block=Residual(), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten()))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(6) * 0.1
            module.running_var = torch.rand(6) + 0.5
    return model.eval()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
NAMES = ["body.block.conv1", "body.block.bn1", "body.block", "body.pool", "body", "head"]


def test_taps_are_what_the_modules_return_and_the_output_stays() -> None:
    model = net()
    graph = tapped(model, X, *NAMES)
    view = features(graph)
    with torch.no_grad():
        expected, (output, values) = hooked(model, (X,), NAMES), view(X)
        assert torch.equal(output, model(X)) and torch.equal(graph(X), output)
    assert list(values) == NAMES
    assert all(torch.equal(values[name], expected[name]) for name in NAMES if name != "body.block.bn1")
    assert {name: tuple(value.shape) for name, value in values.items()} == {
        n: tuple(s or ()) for n, s in view.shapes.items()
    }


def test_a_value_that_an_in_place_relu_would_overwrite_keeps_its_negative_part() -> None:
    model = net()
    with torch.no_grad():
        _, values = features(tapped(model, X, "body.block.bn1", "body.block:preactivation"))(X)
        expected = _call(model, "body.block.bn1", _call(model, "body.block.conv1", X))
    assert torch.equal(values["body.block.bn1"], expected)
    assert values["body.block.bn1"].min() < 0 and values["body.block:preactivation"].min() < 0
    assert torch.equal(values["body.block:preactivation"].relu(), hooked(model, (X,), ["body.block"])["body.block"])


def test_the_input_and_calls_have_addresses() -> None:
    model = net()
    with torch.no_grad():
        layers = ["head:input", "body.block.relu@0", "body.block.relu@1", "body.block:input", "body.block.conv2:input"]
        _, values = features(tapped(model, X, *layers))(X)
        assert torch.equal(values["head:input"], model.body(X))
    assert torch.equal(values["body.block:input"], X)
    assert torch.equal(values["body.block.conv2:input"], values["body.block.relu@0"])
    assert torch.equal(values["body.block.relu@1"], hooked(model, (X,), ["body.block"])["body.block"])


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        ("body.block.relu", r"called 2 times in the graph: say which call, 'body.block.relu@0' or 'body.block.relu@1'"),
        ("body.block.relu@2", "there is no call 'body.block.relu@2': 'body.block.relu' is called 2"),
        ("body.blok", "no value is called 'body.blok'. Did you mean 'body.block'"),
        ("body.block:outputs", "one of output, input, preactivation"),
        ("head:preactivation", "ends in 'linear', which is no activation"),
        ("bod*.blokk", "no layer matches"),
    ],
)
def test_an_address_that_names_no_single_value_is_an_error(layer: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        tapped(net(), X, layer)


def test_patterns_take_the_outermost_modules() -> None:
    assert addresses.expand(trace(net(), X), ["body.b*", "head", "*:input"]) == (
        "body.block",
        "head",
        "body:input",
        "head:input",
    )


def test_several_values_are_named_one_by_one() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(y)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.pair(x, x * 2)
            return a + b

    model, x = Two().eval(), torch.randn(2, 3)
    with pytest.raises(ConfigError, match=r"'pair' returns several values: tap them one by one, as 'pair\.a', 'pair\.b'"):
        tapped(model, x, "pair")
    with pytest.raises(ConfigError, match="given 2 values; tap them by their node names: 'x', 'mul'"):
        tapped(model, x, "pair:input")
    with torch.no_grad():
        _, values = features(tapped(model, x, "pair.a", "x", "mul"))(x)
    assert torch.equal(values["x"], x) and torch.equal(values["mul"], x * 2)


class Overwriting(nn.Module):
    """Writes into memory that other names see."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(4, 4), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.how == "through a view":
            y.view(-1).mul_(0.0)
        elif self.how == "under a view":
            z = y.view(-1)
            y.add_(1.0)
            return z
        elif self.how == "item":
            y[:, 0] = 7.0
        elif self.how == "method":
            y.zero_()
        return y * 2


@pytest.mark.parametrize("how", ["through a view", "under a view", "item", "method"])
def test_what_is_overwritten_under_another_name_is_tapped_as_a_copy(how: str) -> None:
    torch.manual_seed(0)
    model, x = Overwriting(how).eval(), torch.randn(3, 4)
    graph = tapped(model, x, "layer")
    with torch.no_grad():
        output, values = features(graph)(x)
        assert torch.equal(values["layer"], model.layer(x))
        assert torch.equal(output, model(x))
    taps.remove(graph)
    assert not any(node.target in (taps.tap, torch.clone) for node in graph.graph.nodes)


def test_an_input_that_is_overwritten_is_tapped_as_it_was_given() -> None:
    class Doubling(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.mul_(2.0) + y

    graph = trace(Doubling(), (torch.ones(3), torch.ones(3)))
    taps.insert(graph, ["x", "y"])
    assert [node.op for node in graph.graph.nodes][:2] == ["placeholder", "placeholder"]
    output, values = features(graph)(torch.ones(3), torch.ones(3))
    assert values["x"].tolist() == [1.0] * 3 and output.tolist() == [3.0] * 3


@pytest.mark.parametrize("plan", [INT8[1:2], INT8[:3], INT8[:6], INT8])
def test_taps_hold_through_folding_fusing_and_quantizing(plan: list[Any]) -> None:
    layers = [*NAMES[1:], "body.block:preactivation", "body.block.relu@0"]
    before = tapped(net(), X, *layers)
    manager = PassManager(plan, reproducer=False, progress=False)
    after = manager.run(before, data=[X])
    with torch.no_grad():
        expected, found = features(before)(X)[1], features(after)(X)[1]
    assert list(found) == layers
    least = 15 if "fold-quantization" in plan else 90
    for name in layers:
        assert output_snr(expected[name], found[name]) > least, name


def test_a_value_that_a_pass_would_fuse_away_is_left_and_that_is_said() -> None:
    manager = PassManager(["fuse-activations"], reproducer=False)
    manager.run(tapped(net(), X, "body.block.bn1"), X)
    remarks = {remark.node: remark.reason for remark in manager.ledger.remarks("fuse-activations")}
    assert "body.block.relu" in remarks


def test_names_that_fusing_took_are_an_error_that_says_so() -> None:
    model = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), act=nn.ReLU())).eval()
    fused = PassManager(["fuse-activations"], reproducer=False).run(model, X)
    with pytest.raises(ConfigError, match="'conv' is inside a fused region: relu was fused into it"):
        tapped(fused, X, "conv")
    with pytest.raises(ConfigError, match=r"no value is called 'act'.*insert-taps before such passes"):
        tapped(fused, X, "act")


@dataclass(frozen=True)
class Forget(Pass):
    """Lose a tap."""

    name: ClassVar[str] = "forget"

    def run(self, module: fx.GraphModule, context: Context) -> None:
        for node in list(module.graph.nodes):
            if node.target is taps.tap:
                module.graph.erase_node(node)


def test_a_pass_that_loses_a_tap_fails_loudly() -> None:
    with pytest.raises(VerificationError, match="taps_stay: the tap 'body' is gone"):
        PassManager([Forget()], reproducer=False).run(tapped(net(), X, "body"), X)
    PassManager(["remove-taps"], reproducer=False).run(tapped(net(), X, "body"), X)


def test_removing_taps_lets_everything_fuse() -> None:
    plan: list[Any] = [{"insert-taps": {"layers": ["body.block.bn1"]}}, "remove-taps", "fold-batchnorm", "fuse-activations"]
    manager = PassManager(plan, reproducer=False)
    direct = PassManager(plan[2:], reproducer=False)
    assert len(manager.run(net(), X).graph.nodes) == len(direct.run(net(), X).graph.nodes)


def test_inserting_twice_adds_nothing() -> None:
    once = tapped(net(), X, "body", "head")
    twice = tapped(once, X, "head", "body")
    assert len(once.graph.nodes) == len(twice.graph.nodes)
    assert list(taps.taps(twice)) == ["body", "head"]


class Stubborn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            return x
        return self.inner(x)


def test_values_inside_code_that_was_not_traced_are_an_error_that_says_why() -> None:
    x = torch.randn(2, 3)
    outer = nn.Sequential(OrderedDict(island=Stubborn(), head=nn.Linear(3, 2))).eval()
    with pytest.raises(TraceError, match=r"'island.inner' cannot be tapped: it is inside 'island'"):
        tapped(outer, x, "island.inner")
    with torch.no_grad():
        _, values = features(tapped(outer, x, "island"))(x)
        assert torch.equal(values["island"], _call(outer, "island", x))
    with pytest.raises(TraceError, match="'inner' cannot be tapped: Stubborn as a whole runs as its own code"):
        tapped(Stubborn().eval(), x, "inner")


class Branching(nn.Module):
    """It branches on a size, or on how a value lies in memory, which only torch.export captures."""

    def __init__(self, exported: bool) -> None:
        super().__init__()
        self.exported = exported
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if x.is_contiguous() if self.exported else x.shape[2] > 4:
            x = x * 2
        return self.act(self.conv(x))


@pytest.mark.parametrize("exported", [False, True])
def test_modules_whose_code_decides_are_tapped_by_name(exported: bool) -> None:
    model = nn.Sequential(OrderedDict(part=Branching(exported), pool=nn.AdaptiveAvgPool2d(1))).eval()
    layers = ["part.conv", "part", "part:preactivation", "part:input"]
    with torch.no_grad():
        _, values = features(tapped(model, X, *layers))(X)
        expected = hooked(model, (X,), ["part.conv", "part"])
    assert torch.equal(values["part.conv"], expected["part.conv"]) and torch.equal(values["part"], expected["part"])
    assert torch.equal(values["part:preactivation"], expected["part.conv"]) and torch.equal(values["part:input"], X)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, inputs: dict[str, Tensor], more: list[Tensor]) -> dict[str, Any]:
        total = self.layer(inputs["a"])
        for item in more:
            total = total + item
        return {"out": [total], "aux": (total, inputs["a"])}


def test_nested_inputs_and_outputs_keep_their_structure() -> None:
    model, a = Nested().eval(), torch.randn(2, 3)
    call = ({"a": a}, [a, a])
    graph = tapped(model, call, "layer")
    with torch.no_grad():
        output, values = features(graph)(*call)
        expected = model(*call)
        assert torch.equal(values["layer"], model.layer(a))
    assert set(output) == {"out", "aux"} and torch.equal(output["out"][0], expected["out"][0])


def test_the_view_shares_parameters_modes_and_devices_and_copies_and_pickles() -> None:
    graph = tapped(net(), X, "body")
    view = features(graph)
    view(X)
    assert {id(p) for p in view.parameters()} == {id(p) for p in graph.parameters()}
    for other in (copy.deepcopy(view), pickle.loads(pickle.dumps(view))):
        assert torch.equal(other(X)[1]["body"], view(X)[1]["body"])
    view.train()
    assert graph.training
    view.eval().double()
    assert view(X.double())[1]["body"].dtype == torch.float64


def test_the_view_overwrites_only_what_nothing_else_reads() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.relu = nn.Linear(3, 3), nn.Linear(3, 3), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.b(self.relu(self.a(x))))

    x = torch.randn(2, 3)
    view = features(tapped(Chain().eval(), x, "a"))
    output, values = view(x)
    assert float(values["a"].detach().min()) < 0
    assert torch.equal(output, view.model(x))
    in_place = [node for node in view.__dict__["_view"].graph.nodes if node.kwargs.get("inplace")]
    assert [node.all_input_nodes[0].name for node in in_place] == ["b"]
    output.sum().backward()


class Sums(nn.Module):
    """Additions whose first operand is free, broadcast, of another type, tapped, and read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(3, 3) for _ in range(5))
        self.one, self.relu = nn.Linear(3, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        free = self.relu(self.a(x) + x)
        wider = self.one(free) + free
        tapped = self.b(wider) + wider
        twice = self.c(tapped)
        double = self.d(twice + tapped * twice) + x.double()
        return self.relu(self.e(x) + torch.add(double, self.e(x), alpha=2.0))


def test_the_view_adds_only_into_what_nothing_else_reads_and_what_the_sum_fits() -> None:
    torch.manual_seed(0)
    model, x = Sums(), torch.randn(4, 3)
    expected = model(x)
    expected.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    view = features(tapped(model, x, "b"))
    output, values = view(x)
    with torch.no_grad():
        assert not torch.equal(values["b"], values["b"] + x)
        assert output.dtype == torch.float64 and torch.equal(output, expected)
    output.square().sum().backward()
    for name, p in view.model.named_parameters():
        assert torch.equal(p.grad, gradients[name]), name  # type: ignore[arg-type]
    peak = []
    for chosen in (view, view.model):
        with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profiler:
            chosen(x)
        peak.append(sum(e.self_cpu_memory_usage for e in profiler.events() if e.self_cpu_memory_usage > 0))
    assert peak[0] < peak[1]


def test_gradients_flow_from_taps_and_the_view_compiles_to_export() -> None:
    view = features(tapped(net(), X, "body.block"))
    view(X)[1]["body.block"].sum().backward()
    gradient = view.get_parameter("model.body.block.conv1.weight").grad
    assert gradient is not None and bool(gradient.abs().sum() > 0)
    program = torch.export.export(view, (X,), strict=False)
    exported: Any = program.module()
    assert torch.equal(exported(X)[1]["body.block"], view(X)[1]["body.block"])


def test_taps_are_saved_and_loaded(tmp_path: Path) -> None:
    graph = tapped(net(), X, "body.block.bn1", "body")
    fxcompress.save(graph, tmp_path / "model")
    loaded = fxcompress.load(tmp_path / "model")
    with torch.no_grad():
        expected, found = features(graph)(X)[1], features(loaded)(X)[1]
    assert set(expected) == set(found) and all(torch.equal(expected[name], found[name]) for name in expected)


@given(drawn=networks(), data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_value_of_any_network_can_be_tapped_and_holds_through_passes(drawn: Drawn, data: st.DataObject) -> None:
    graph = trace(drawn.model, drawn.call)
    names = [node.name for node in graph.graph.nodes if node.op != "output" and node.meta.get("tensor_meta") is not None]
    names = [name for name in names if isinstance(name, str) and not name.startswith(("chunk", "split"))]
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    before = tapped(drawn.model, drawn.call, *chosen)
    after = PassManager(INT8[:3], reproducer=False).run(before, drawn.call)
    with torch.no_grad():
        output, expected = features(before)(*drawn.call)
        _, found = features(after)(*drawn.call)
        assert output_snr(drawn.model(*drawn.call), output) > 100
    assert all(output_snr(expected[name], found[name]) > 80 for name in chosen)


def test_resnet_taps_tell_calls_and_signs_apart() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        _, values = features(tapped(model, x, "layer*", "layer1.0.bn1"))(x)
        expected = hooked(model, (x,), ["layer1", "layer2", "layer3", "layer4"])
    assert list(values) == ["layer1", "layer2", "layer3", "layer4", "layer1.0.bn1"]
    assert all(torch.equal(values[name], expected[name]) for name in expected)
    assert values["layer1.0.bn1"].min() < 0
