"""prune-layers and LayerPruner: what can go, what goes, and what is left computes as if it had never been there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress import PassManager, load, save
from fxcompress.errors import ConfigError, DataError, PlanError
from fxcompress.pruning import LayerPlan, LayerPruner

X = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0))
DATA = [(X, torch.tensor([0, 1, 2, 3])), (X + 1, torch.tensor([3, 2, 1, 0]))]


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, norm: bool = True) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norm = nn.BatchNorm2d(outputs) if norm else nn.Identity()
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv2(F.relu(self.conv1(x)))) + self.shortcut(x))


class Network(nn.Module):
    def __init__(self, *, norm: bool = True) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Residual(i, o, norm=norm) for i, o in ((8, 8), (8, 8), (8, 12), (12, 12))))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


def network(**options: Any) -> Network:
    torch.manual_seed(0)
    model = Network(**options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
    return model.eval()


def without(model: Network, *positions: int) -> Network:
    """The reference: those blocks are a ReLU, the one after the addition."""
    smaller = copy.deepcopy(model)
    for position in positions:
        smaller.blocks[position] = nn.ReLU()
    return smaller


def test_identity_blocks_can_go_and_a_computed_shortcut_is_named() -> None:
    pruner = LayerPruner(example_inputs=X)
    assert list(pruner.compute_importance(network())) == ["blocks.0", "blocks.1", "blocks.3"]
    pruner.prune(network())
    reasons = {remark.node: remark.reason for remark in pruner.ledger.remarks("prune-layers")}
    assert any("its shortcut is computed too" in reason for reason in reasons.values())


@pytest.mark.parametrize(("sparsity", "count"), [(0.0, 0), (0.3, 1), (0.5, 2), (0.67, 2), (0.99, 3)])
def test_what_is_left_computes_as_if_the_blocks_had_never_been_there(sparsity: float, count: int) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    pruner = LayerPruner(sparsity, example_inputs=X)
    plan = pruner.get_pruning_plan(model)
    gone = plan.removed
    assert len(gone) == count
    result = pruner.prune(model)
    reference = without(model, *(int(name.removeprefix("blocks.")) for name in gone))
    assert torch.equal(result(X), reference(X))
    assert not any(key.startswith(f"{name}.") for key in result.state_dict() for name in gone)
    assert set(result.state_dict()) == set(reference.state_dict())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    said = [remark.node for remark in pruner.ledger.remarks("prune-layers") if remark.reason == "left out"]
    assert said == gone


def exact_scores(model: Network, criterion: str) -> list[float]:
    """The formulas of the criteria in float64, for blocks 0, 1 and 3."""
    found = []
    double = copy.deepcopy(model).double()
    if criterion == "taylor":
        for x, y in DATA:
            F.cross_entropy(double(x.double()), y).backward()
    for position in (0, 1, 3):
        block: Any = double.blocks[position]
        weights = [block.conv1.weight, block.conv2.weight]
        flat = torch.cat([w.detach().flatten() for w in weights])
        if criterion == "l1_norm":
            found.append(flat.abs().mean())
        elif criterion == "l2_norm":
            found.append(flat.square().mean().sqrt())
        elif criterion == "bn_scale":
            found.append(block.norm.weight.detach().abs().mean())
        elif criterion == "taylor":
            found.append(sum((w.detach() * w.grad).sum() for w in weights).abs())  # type: ignore[union-attr]
        else:
            gaps = []
            for x, _ in DATA:
                entering = double.blocks[:position](x.double())
                added = block.norm(block.conv2(F.relu(block.conv1(entering)))) + entering
                a, b = entering.detach().flatten(1), added.detach().flatten(1)
                gaps.append(1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)))
            found.append(torch.cat(gaps).mean())
    return [float(value) for value in found]


@pytest.mark.parametrize("criterion", ["l1_norm", "l2_norm", "bn_scale", "taylor", "cosine"])
def test_scores_are_the_formulas_and_the_least_go(criterion: str) -> None:
    model = network()
    pruner = LayerPruner(0.34, criterion)
    scores = pruner.compute_importance(model, data=DATA)
    expected = exact_scores(model, criterion)
    assert list(scores.values()) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert pruner.get_pruning_plan(model, data=DATA).removed == [list(scores)[expected.index(min(expected))]]
    assert all(p.grad is None for p in model.parameters())


def test_random_is_reproducible_by_seed() -> None:
    def drawn(seed: int) -> dict[str, float]:
        return LayerPruner(criterion="random", seed=seed, example_inputs=X).compute_importance(network())

    assert drawn(1) == drawn(1) != drawn(2)


def test_bn_scale_without_batch_normalisation_falls_back_by_name() -> None:
    pruner = LayerPruner(criterion="bn_scale", example_inputs=X)
    assert pruner.compute_importance(network(norm=False)) == LayerPruner(example_inputs=X).compute_importance(
        network(norm=False)
    )
    pruner.prune(network(norm=False))
    assert any("l1_norm ranks all parts" in remark.reason for remark in pruner.ledger.remarks("prune-layers"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a word", "it is a mapping with 'parts'"),
        ("parts: {layer1.0: {remove: 1}}", "needs remove: true or false"),
        ("parts: {layer1.0: {remove: true, score: high}}", "score is 'high'; it is a number"),
        (f"parts: {{layer1.0: {{remove: true, score: {'9' * 400}}}}}", "it is a number"),
        ("parts: {layer1.0: {remove: true, scores: 1.0}}", "Did you mean 'score'"),
        ("parts: {}\nunit: blocks", "Did you mean 'units'"),
        ("parts: {}\nunits: rows", "units is 'rows'; it is auto, blocks or layers"),
    ],
)
def test_a_plan_of_layers_that_cannot_be_meant_is_refused_by_file_and_key(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "layers.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        LayerPlan.load(file)
    assert "layers.yaml" in str(caught.value) and message in str(caught.value)


def test_a_plan_prints_saves_is_vetoed_and_applies_to_a_fresh_copy(tmp_path: Path) -> None:
    pruner = LayerPruner(0.67, example_inputs=X)
    plan = pruner.get_pruning_plan(network())
    assert "goes" in str(plan) and "blocks.3" in str(plan)
    plan.save(tmp_path / "plan.yaml")
    assert LayerPlan.load(tmp_path / "plan.yaml") == plan
    kept, gone = plan.removed
    plan.veto(kept)
    model = network()
    assert torch.equal(pruner.prune(model, plan)(X), without(model, int(gone[-1]))(X))
    assert torch.equal(pruner.prune(network(), tmp_path / "plan.yaml")(X), without(model, int(kept[-1]), int(gone[-1]))(X))
    with pytest.raises(ConfigError, match=r"no part 'blocks.9'.*blocks"):
        plan.veto("blocks.9")
    with pytest.raises(ConfigError, match=r"no removable part 'blocks.1'"):
        pruner.prune(nn.Sequential(Residual(8, 8)), LayerPlan.load(tmp_path / "plan.yaml"))
    (tmp_path / "plan.yaml").write_text("parts: {a: 3}")
    with pytest.raises(ConfigError, match="needs remove"):
        LayerPlan.load(tmp_path / "plan.yaml")
    with pytest.raises(ConfigError, match="not a plan of layers"):
        LayerPlan.load(tmp_path / "none.yaml")


def test_chosen_and_excluded_parts() -> None:
    assert list(LayerPruner(example_inputs=X, exclude_layers=["blocks.1"]).compute_importance(network())) == [
        "blocks.0",
        "blocks.3",
    ]
    assert list(LayerPruner(example_inputs=X, include_layers=["blocks.[01]"]).compute_importance(network())) == [
        "blocks.0",
        "blocks.1",
    ]


class Chain(nn.Module):
    """No residual blocks: layers of one shape, one of another, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 16, 3, padding=1)
        self.second = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.third = nn.Conv2d(16, 16, 1)
        self.a, self.b = nn.Linear(16, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.third(self.second(F.relu(self.first(x)))).mean((2, 3))))


def test_without_blocks_layers_of_one_shape_can_go_with_their_norm_and_activation() -> None:
    torch.manual_seed(0)
    model = Chain().eval()
    pruner = LayerPruner(0.5, example_inputs=X)
    assert list(pruner.compute_importance(model)) == ["second.0", "third"]
    plan = pruner.get_pruning_plan(model)
    reference = copy.deepcopy(model)
    setattr(reference, plan.removed[0].split(".")[0], nn.Identity())
    assert torch.equal(pruner.prune(model)(X), reference(X))
    pruner.prune(model)
    reasons = {remark.node: remark.reason for remark in pruner.ledger.remarks("prune-layers")}
    assert reasons["b"] == "it makes the model's output"
    assert "its input has shape" in reasons["first"]


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.tail = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.outer(x)
        return self.tail(x + (y + self.inner(y)))


def test_of_blocks_inside_one_another_the_inner_one_counts() -> None:
    pruner = LayerPruner(0.99, example_inputs=X)
    assert list(pruner.compute_importance(Nested().eval())) == ["inner"]


class SharedBranch(nn.Module):
    """A branch that is returned too, and an addition that broadcasts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        branch = self.conv(x)
        pooled = x.mean((2, 3), keepdim=True)
        return x + branch, self.gate(branch) + pooled


def test_what_others_read_stays_and_nothing_removable_is_an_error_with_reasons() -> None:
    with pytest.raises(ConfigError, match=r"no block of the model can be left out.*used elsewhere"):
        LayerPruner(units="blocks", example_inputs=X).prune(SharedBranch().eval())
    with pytest.raises(ConfigError, match=r"no part of the model can be left out.*has no weighted layers"):
        LayerPruner(example_inputs=X).prune(nn.ReLU())
    with pytest.raises(ConfigError, match="it makes the model's output"):
        LayerPruner(example_inputs=torch.randn(2, 4)).prune(nn.Linear(4, 4))


def real_networks() -> dict[str, tuple[Any, int, int]]:
    """Name → builder, image size, how many parts can go."""
    models = pytest.importorskip("torchvision.models")
    return {
        "resnet18": (models.resnet18, 64, 5),
        "vit": (lambda: models.VisionTransformer(32, 16, 2, 2, 64, 128), 32, 4),
        "convnext": (models.convnext_tiny, 32, 18),
        "swin": (lambda: models.SwinTransformer([4, 4], 16, [1, 2], [2, 4], [4, 4]), 32, 6),
    }


@pytest.mark.parametrize("name", ["resnet18", "vit", "convnext", "swin"])
def test_real_networks_lose_blocks_and_run(name: str) -> None:
    build, size, parts = real_networks()[name]
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(1, 3, size, size)
    pruner = LayerPruner(0.5, example_inputs=x)
    plan = pruner.get_pruning_plan(model)
    assert len(plan.parts) == parts and len(plan.removed) == round(0.5 * parts)
    assert pruner.prune(model, plan)(x).shape == (1, 1000)


def test_a_pruned_network_saves_exports_and_trains(tmp_path: Path) -> None:
    pruner = LayerPruner(0.5, example_inputs=X)
    result = pruner.prune(network())
    save(result, tmp_path / "model")
    assert torch.equal(load(tmp_path / "model")(X), result(X))
    program: Any = torch.export.export(result, (X,)).module()
    assert torch.allclose(program(X), result(X), atol=1e-5)
    history = pruner.finetune_after_prune(result, DATA, epochs=2, lr=1e-3)
    assert len(history.rows) == 2


def test_missing_data_inputs_and_wrong_words_are_refused() -> None:
    with pytest.raises(DataError, match="'cosine' needs data"):
        LayerPruner(criterion="cosine", example_inputs=X).prune(network())
    with pytest.raises(DataError, match="has no target"):
        LayerPruner(criterion="taylor").prune(network(), data=[X])
    with pytest.raises(PlanError, match="needs inputs"):
        PassManager(["prune-layers"]).run(nn.Bilinear(2, 3, 4))
    with pytest.raises(ConfigError, match="the plan is a int"):
        LayerPruner().prune(network(), 3)  # type: ignore[arg-type]
    for options in ({"criterion": "l3"}, {"sparsity": 1.0}, {"units": "heads"}):
        with pytest.raises(PlanError):
            LayerPruner(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no layer is called"):
        LayerPruner(example_inputs=X, exclude_layers=["layer9"]).prune(network())
