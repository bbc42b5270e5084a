"""The fifty corner cases of channel pruning, each with the tests that hold it; and those that no other page has.

``CASES`` names tests of every case by page and name, or a part of it; a name that its page has no more fails here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxcompress.errors import ConfigError, FxCompressError, PassError
from fxcompress.pruning import StructuredPruner
from tests.channel_cases import c3, error, image, lived_in, net, prune, remarks, shapes, silenced

TESTS = Path(__file__).parent

CASES: dict[int, list[str]] = {
    1: ["topology: conv, bn, relu, conv", "topology: flatten to linear takes blocks"],
    2: ["topology: conv1d", "topology: view to a number"],
    3: ["topology: channels last, strides interleaved"],
    4: ["topology: three residuals", "topology: the identity is the model's input"],
    5: ["topology: cat of one tensor twice", "topology: a group that spans the parts of a cat"],
    6: ["topology: U-Net", "topology: feature pyramid"],
    7: ["topology: a feature map among the outputs stays"],
    8: ["topology: one layer called on two inputs", "topology: embedding and head are one tensor"],
    9: [
        "topology: CBAM",
        "topology: test_of_an_outer_product_that_is_flattened_one_factor_loses_channels_and_the_other_says_why_not",
    ],
    10: ["topology: GLU by chunk", "topology: SwiGLU of one layer"],
    11: ["topology: C2f", "topology: CSP"],
    12: ["movement: a front part", "movement: roll back, of two dimensions"],
    13: ["movement: padded by channels", "movement: joined with zeros"],
    14: ["movement: nn.ChannelShuffle", "movement: ShuffleNet"],
    15: ["movement: pixel_shuffle", "movement: space to depth by slices"],
    16: ["movement: stacked and summed", "movement: unbound"],
    17: ["movement: a slice is assigned", "movement: in place"],
    18: ["movement: a branch without gradients", "movement: no parameter wants gradients"],
    19: ["movement: buffers, and statistics of the input"],
    20: ["movement: parameters of no layer", "movement: class token and positions"],
    21: ["movement: weight_norm", "movement: masked by torch.nn.utils.prune"],
    22: ["movement: zeros and ones with a written number", "movement: arange over channels"],
    23: ["layers: groups within a residual", "layers: depthwise with multiplier 2"],
    24: ["layers: SyncBatchNorm", "layers: test_the_count_of_batches"],
    25: ["layers: GroupNorm of one group", "layers: RMSNorm by hand"],
    26: ["layers: PReLU of a slope for every channel", "layers: softmax over channels"],
    27: ["layers: Bilinear", "layers: test_a_lazy_layer_must_be_materialised_first"],
    28: ["layers: LSTM with a projection", "layers: test_a_packed_sequence_is_left_alone"],
    29: ["transformers: a mask for every head", "attention: test_the_scale_of_the_dense_head"],
    30: ["attention: grouped queries by expand", "attention: rotary positions in pairs"],
    31: ["attention: MLP-Mixer", "attention: einsum attention"],
    32: ["attention: test_small_instances_of_torchvision_families", "zoo: test_"],
    33: ["budgets: test_nothing_asked_is_nothing_done", "budgets: test_almost_everything_asked"],
    34: ["budgets: test_what_is_left_is_a_multiple", "budgets: test_multiples_hold_in_groups"],
    35: ["budgets: test_a_share_is_met_exactly"],
    36: ["corners: test_layers_are_chosen", "budgets: test_excluding_one_member"],
    37: ["criteria: test_", "budgets: test_equal_scores_go_by_position"],
    38: ["budgets: test_half_and_half_again", "random: test_one_cut_after_another"],
    39: ["pruning_scheduler: test_schedules_are_monotone", "pruning_scheduler: test_a_schedule_resumes"],
    40: ["magnitude_pruner: test_", "mask_sites: test_"],
    41: ["accelerate_sparsity: test_"],
    42: ["corners: test_a_half_precision_model", "engineering: test_channels_last_stays"],
    43: ["pruning_recipe: test_an_optimizer_keeps_the_state"],
    44: ["pruning_recipe: test_a_recipe_does_it_again", "engineering: test_a_pruned_model_is_saved"],
    45: ["engineering: test_pruning_comes_before_quantization"],
    46: ["corners: test_a_model_in_a_distributed_wrapper"],
    47: ["engineering: test_keywords_optional_and_nested", "engineering: test_control_flow"],
    48: ["engineering: test_a_pruned_model_trains"],
    49: ["engineering: test_an_operator_without_a_rule"],
    50: ["engineering: test_nothing_to_remove_is_loud"],
}


def test_every_corner_case_has_tests_that_exist() -> None:
    assert sorted(CASES) == list(range(1, 51))
    for case, tests in CASES.items():
        assert tests, case
        for page, _, name in (test.partition(": ") for test in tests):
            found = next(path for stem in (page, f"channel_{page}") if (path := TESTS / f"test_{stem}.py").exists())
            assert name in found.read_text(), f"{case}: {page} has no {name!r}"


X = (image(),)


def network() -> Any:
    trunk = nn.Sequential(c3(8, 8), nn.ReLU(), nn.ConvTranspose2d(8, 8, 1), nn.ReLU(), c3(8, 8))
    parts = {"stem": c3(3, 8), "trunk": trunk, "head": c3(8, 2)}
    return lived_in(net(lambda self, x: self.head(self.trunk(torch.relu(self.stem(x)))), **parts))


@pytest.mark.parametrize(
    ("excluded", "left"),
    [
        (("stem",), {"stem": 8, "trunk.0": 4, "trunk.2": 4, "trunk.4": 4}),
        (("trunk.0",), {"stem": 4, "trunk.0": 8, "trunk.2": 4, "trunk.4": 4}),
        (("trunk.[02]",), {"stem": 4, "trunk.0": 8, "trunk.2": 8, "trunk.4": 4}),
        (("*.4",), {"stem": 4, "trunk.0": 4, "trunk.2": 4, "trunk.4": 8}),
        (("trunk",), {"stem": 4, "trunk.0": 8, "trunk.2": 8, "trunk.4": 8}),
        (("head", "stem"), {"stem": 8, "trunk.0": 4, "trunk.2": 4, "trunk.4": 4}),
    ],
)
def test_layers_are_chosen_by_name_by_what_is_above_them_and_by_pattern(excluded: Any, left: dict[str, int]) -> None:
    small, pruner = prune(network(), X, exclude_layers=excluded)  # a layer keeps what it makes, and follows what it reads
    made = {name: small.get_submodule(name).out_channels for name in left}
    assert made == left
    assert f"layer {excluded[-1]!r} is excluded by name" in remarks(pruner)


def test_where_input_channels_are_pruned_a_layer_keeps_those_it_reads() -> None:
    small, _ = prune(network(), X, exclude_layers=["trunk.2"], pruning_dim=1)
    made = {name: small.get_submodule(name).out_channels for name in ("stem", "trunk.0", "trunk.2", "trunk.4")}
    assert made == {"stem": 4, "trunk.0": 8, "trunk.2": 4, "trunk.4": 4}


def test_layers_are_chosen_one_by_one_with_shares_of_their_own() -> None:
    small, _ = prune(network(), X, sparsity=0.0, layers={"trunk.0": 0.25, "st*": 0.5})
    assert [small.get_submodule(name).out_channels for name in ("stem", "trunk.0", "trunk.2")] == [4, 6, 8]
    with pytest.raises(PassError, match=r"layer '\*' is excluded by name"):
        prune(network(), X, exclude_layers=["*"])
    with pytest.raises(ConfigError, match=r"(?s)trunk\.1x.*trunk"):
        prune(network(), X, exclude_layers=["trunk.1x"])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_loses_what_its_double_would(kind: torch.dtype) -> None:
    model = network()
    small, _ = prune(model.to(kind), (X[0].to(kind),), criterion="random")
    assert {tensor.dtype for tensor in small.parameters()} == {kind}
    expected = silenced(model, small)(X[0].to(kind))
    assert error(expected.double(), small(X[0].to(kind)).double()) <= 0.05
    whole, _ = prune(network(), X, criterion="random")
    assert shapes(small) == shapes(whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_model_on_a_gpu_is_pruned_there() -> None:
    model = network().to("cuda")
    small, _ = prune(model, (X[0].to("cuda"),), criterion="random")
    assert {tensor.device.type for tensor in small.parameters()} == {"cuda"}
    assert error(silenced(model, small)(X[0].to("cuda")).cpu(), small(X[0].to("cuda")).cpu()) <= 1e-10


def test_a_model_without_values_is_refused_by_name() -> None:
    with torch.device("meta"):
        model = nn.Sequential(c3(3, 8), nn.ReLU(), c3(8, 2))
    with pytest.raises(FxCompressError, match="meta"):
        prune(model, (image().float(),))


def test_a_model_in_a_distributed_wrapper_is_pruned_without_it() -> None:
    class DistributedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.module(x)

    small, _ = prune(nn.DataParallel(network()).eval(), X)
    assert small.get_submodule("stem").out_channels == 4
    # a wrapper of the user's own that happens to have that name is a module like any other
    small, _ = prune(DistributedDataParallel(network()).eval(), X)
    assert small.get_submodule("module.stem").out_channels == 4


BAD: list[tuple[dict[str, Any], str]] = [
    ({"sparsity": 1.0}, "sparsity"),
    ({"sparsity": -0.1}, "sparsity"),
    ({"sparsity": float("nan")}, "sparsity"),
    ({"exclude_layers": ["stam"]}, "stem"),
    ({"criterion": "l3_norm"}, "l"),
    ({"criterion": "hrank"}, "data"),
    ({"criterion": "taylor"}, "data"),
    ({"target": {"macs": 0.0}}, "target"),
    ({"layers": {"nowhere": 0.5}}, "nowhere"),
    ({"round_to": 0}, "round_to"),
]


@pytest.mark.parametrize(("options", "said"), BAD, ids=[f"{options}" for options, _ in BAD])
def test_what_cannot_be_meant_is_refused_and_the_model_stays(options: dict[str, Any], said: str) -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FxCompressError, match=said):
        prune(model, X, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_plan_of_another_model_is_refused_with_each_mismatch() -> None:
    pruner = StructuredPruner(round_to=1, progress=False)
    plan = pruner.get_pruning_plan(network(), example_inputs=X)
    other = lived_in(nn.Sequential(c3(3, 6), nn.ReLU(), c3(6, 2)))
    with pytest.raises(FxCompressError, match=r"(?s)stem.*trunk\.0"):
        pruner.prune(other, plan, example_inputs=X)
