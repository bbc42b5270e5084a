"""Layers are chosen by name, glob, regular expression or type, in the same words wherever layers are chosen."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress import (
    DynamicQuantizer,
    FilterPruner,
    L1UnstructuredPruner,
    LayerPruner,
    MagnitudePruner,
    PassManager,
    PTQQuantizer,
    QATQuantizer,
    StructuredPruner,
    build_pruner,
    trace,
)
from fxcompress.errors import ConfigError, PlanError
from fxcompress.graph.select import Selection, matches
from fxcompress.schema import schema


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(torch.relu(self.norm(self.conv1(x))))


class Own(nn.Conv2d):
    """A convolution of somebody's own."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = Own(3, 8, 3, padding=1)
        self.layer1, self.layer2 = Block(8), Block(8)
        self.fc1, self.fc2 = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CONVOLUTIONS = {"stem", "layer1.conv1", "layer1.conv2", "layer2.conv1", "layer2.conv2"}
LINEAR = {"fc1", "fc2"}


def layers(model: nn.Module, pattern: str) -> set[str]:
    """The layers with weights that a pattern chooses."""
    chosen = Selection((pattern,)).on(model)
    return {name for name in CONVOLUTIONS | LINEAR if name in chosen}


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layer1", {"layer1.conv1", "layer1.conv2"}),
        ("layer*.conv1", {"layer1.conv1", "layer2.conv1"}),
        ("re:layer[12]", CONVOLUTIONS - {"stem"}),
        (r"re:.*\.conv[^1]", {"layer1.conv2", "layer2.conv2"}),
        (r"re:fc\d", LINEAR),
        ("re:(?!layer).*", {"stem"} | LINEAR),
        ("type:Conv2d", CONVOLUTIONS),
        ("type:Own", {"stem"}),
        ("type:Block", CONVOLUTIONS - {"stem"}),
        ("type:Lin*", LINEAR),
    ],
)
def test_a_pattern_chooses_these(pattern: str, expected: set[str], traced: bool) -> None:
    model: nn.Module = trace(Net(), X) if traced else Net()
    assert layers(model, pattern) == expected


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("layer3", "no layer is called 'layer3'. Did you mean 'layer"),
        ("re:conv", "no layer has a name that fits 're:conv'"),
        ("re:layer1.(", "'re:layer1.(' is no regular expression"),
        ("type:Conv2D", "no layer has the type of 'type:Conv2D'. Did you mean 'type:Conv2d' or"),
        ("type:conv1", "no layer has the type of 'type:conv1'"),
    ],
)
def test_a_pattern_that_chooses_nothing_is_refused_by_all(pattern: str, hint: str) -> None:
    components: list[Any] = [
        lambda: StructuredPruner(exclude_layers=[pattern]).prune(Net(), example_inputs=X),
        lambda: MagnitudePruner(include_layers=[pattern]).prune(Net()),
        lambda: MagnitudePruner(exclude_layers=[pattern]).apply_mask(Net()),
        lambda: LayerPruner(exclude_layers=[pattern]).prune(Net(), example_inputs=X),
        lambda: PTQQuantizer(exclude_layers=[pattern]).prepare(Net(), X),
        lambda: PTQQuantizer(overrides={pattern: {"bits": 6}}).prepare(Net(), X),
        lambda: DynamicQuantizer(include_layers=[pattern]).quantize(Net()),
    ]
    for component in components:
        with pytest.raises((ConfigError, PlanError)) as refusal:
            component()
        assert hint in str(refusal.value)


def test_a_type_that_nobody_looked_up_is_no_silent_mismatch() -> None:
    with pytest.raises(ConfigError, match="nobody said of which model"):
        matches("type:Conv2d", "stem")


def test_channels_of_a_type_stay() -> None:
    pruner = StructuredPruner(sparsity=0.5, round_to=1, exclude_layers=["type:Conv2d"])
    small: Any = pruner.prune(Net(), example_inputs=X)
    assert small.stem.weight.shape[0] == 8
    assert small.layer1.conv1.weight.shape[0] == 8
    assert small.fc1.weight.shape == (3, 8)
    assert "layer 'type:Conv2d' is excluded by name" in str(pruner.ledger)


def test_groups_take_their_share_by_expression_and_by_type() -> None:
    by_group = {"type:Linear": 0.5, r"re:layer2\.conv1": 0.25}
    pruner = StructuredPruner(round_to=1)
    plan = pruner.get_pruning_plan(Net(), by_group, example_inputs=X)
    asked = {name: len(group.remove) for name, group in plan.groups.items()}
    assert {name: gone for name, gone in asked.items() if gone} == {"fc1": 3, "layer2.conv1": 2}
    small: Any = FilterPruner(round_to=1, sparsity=0.0, layers=by_group).prune(Net(), example_inputs=X)
    assert (small.fc1.weight.shape[0], small.layer2.conv1.weight.shape[0], small.stem.weight.shape[0]) == (3, 6, 8)


def zeros(model: nn.Module) -> set[str]:
    """Layers some of whose weights are zero, once masks are made permanent."""
    MagnitudePruner().remove_mask(model)
    weights: dict[str, Any] = {name: model.get_submodule(name).weight for name in CONVOLUTIONS | LINEAR}
    return {name for name, weight in weights.items() if bool((weight == 0).any())}


def test_weights_of_a_type_are_masked_in_a_copy_and_in_place() -> None:
    pruner = L1UnstructuredPruner(sparsity=0.5, include_layers=["type:Linear"])
    assert zeros(pruner.prune(Net())) == LINEAR
    model = Net()
    pruner.apply_mask(model)
    assert pruner.get_sparsity(model) == 0.5
    assert zeros(model) == LINEAR
    model = Net()
    L1UnstructuredPruner().apply_mask(model, {"type:Block": 0.5, "re:fc.": 0.5})
    assert zeros(model) == (CONVOLUTIONS | LINEAR) - {"stem"}


def test_layers_of_a_type_go_or_stay_whole() -> None:
    assert LayerPruner(include_layers=["type:Block"]).compute_importance(Net(), X).keys() == {"layer1", "layer2"}
    assert LayerPruner(exclude_layers=["re:.*1"]).compute_importance(Net(), X).keys() == {"layer2"}


@pytest.mark.parametrize("build", [PTQQuantizer, QATQuantizer])
def test_layers_of_a_type_stay_in_float(build: Any) -> None:
    prepared = build(exclude_layers=["type:Block"]).prepare(Net(), X)
    floats = {str(node.target) for node in prepared.graph.nodes if "float" in node.meta and node.op == "call_module"}
    assert {name for name in floats if name.endswith(("conv1", "conv2"))} == CONVOLUTIONS - {"stem"}
    prepared = build(overrides={"type:Linear": {"float": True}}).prepare(Net(), X)
    floats = {str(node.target) for node in prepared.graph.nodes if "float" in node.meta and node.op == "call_module"}
    assert floats == LINEAR


def test_attention_that_was_opened_is_still_of_its_type() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Any:
            return self.out(self.attention(x, x, x)[0])

    quantized = DynamicQuantizer(exclude_layers=["type:MultiheadAttention"]).quantize(
        Attending().eval(), example_inputs=torch.randn(2, 5, 8)
    )
    packed = [name for name, _ in quantized.named_modules() if name.startswith("attention")]
    assert packed
    floats = {name for name, part in quantized.named_modules() if isinstance(part, nn.Linear)}
    assert floats and all(name.startswith("attention") for name in floats)


def test_a_saved_model_knows_the_types_that_it_had(tmp_path: Any) -> None:
    fxcompress.save(PassManager(["remove-dead"]).run(Net(), X), tmp_path / "net")
    assert layers(fxcompress.load(tmp_path / "net"), "type:Block") == CONVOLUTIONS - {"stem"}


def test_configurations_choose_by_type_and_plans_keep_the_words() -> None:
    config = {"type": "StructuredPruner", "sparsity": 0.5, "round_to": 1, "exclude_layers": ["type:Conv2d", "re:layer2"]}
    pruner: Any = build_pruner(config)
    assert "type:Conv2d" in str(pruner.plan())
    assert pruner.prune(Net(), example_inputs=X).stem.weight.shape[0] == 8
    with pytest.raises(ConfigError, match="no regular expression"):
        build_pruner({**config, "exclude_layers": ["re:("]})
    assert "type:Conv2d" in json.dumps(schema()["$defs"]["StructuredPruner"]["properties"]["exclude_layers"])
