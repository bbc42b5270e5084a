"""Cross-layer equalization: nothing changes but the ranges, which end where the paper says."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress import PassManager, PTQQuantizer
from fxcompress.graph.results import output_snr
from tests.imbalanced import imbalanced, mobile


def uneven(model: nn.Module, octaves: float = 6.0) -> nn.Module:
    """Scale output channels of every layer apart by up to ``2^octaves``."""
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            spread = torch.exp2((torch.rand(module.weight.shape[0]) - 0.5) * octaves)
            with torch.no_grad():
                module.weight.mul_(spread.reshape(-1, *[1] * (module.weight.dim() - 1)))
                if module.bias is not None:
                    module.bias.mul_(spread)
    return model.eval()


CHAINS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "convolutions": lambda: (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3, bias=False)), (2, 3, 9, 9)),
    "depthwise": lambda: (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)),
        (2, 3, 9, 9),
    ),
    "grouped": lambda: (nn.Sequential(nn.Conv2d(4, 8, 1, groups=2), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2)), (2, 4, 9, 9)),
    "transposed": lambda: (
        nn.Sequential(nn.ConvTranspose2d(3, 6, 2), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2), nn.Conv2d(4, 3, 1)),
        (2, 3, 5, 5),
    ),
    "pooling and flatten": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 5), nn.ReLU(), nn.Linear(5, 4)
        ),
        (2, 3, 8, 8),
    ),
    "volumes": lambda: (nn.Sequential(nn.Conv3d(2, 4, 1), nn.LeakyReLU(0.1), nn.Conv3d(4, 3, 1)), (1, 2, 4, 4, 4)),
}


def run(model: nn.Module, x: Tensor, *plan: Any) -> Any:
    return PassManager(list(plan), reproducer=False, progress=False).run(model, x, [x])


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", CHAINS)
def test_outputs_stay_and_both_ranges_become_their_geometric_mean(name: str, fuse: bool) -> None:
    model, shape = CHAINS[name]()
    uneven(model)
    x = torch.randn(shape)
    result = run(model, x, *(["fuse-activations"] if fuse else []), {"equalize-layers": {"sweeps": 200}})
    with torch.no_grad():
        assert output_snr(model(x), result(x)) > 100
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))]
    for (first, _), (second, _) in itertools.pairwise(layers):
        upper = out_ranges(result.get_submodule(first))
        lower = in_ranges(result.get_submodule(second), len(upper))
        assert torch.allclose(upper, lower, rtol=2e-3)


def out_ranges(layer: Any) -> Tensor:
    axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    return torch.stack([w.abs().max() for w in layer.weight.detach().unbind(axis)])


def in_ranges(layer: Any, channels: int) -> Tensor:
    """The largest weight that reads each input channel, found one channel at a time."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.Linear):
        return torch.stack([part.abs().max() for part in weight.chunk(channels, 1)])
    if isinstance(layer, nn.ConvTranspose2d):
        return torch.stack([w.abs().max() for w in weight])
    per_group, outputs = channels // layer.groups, weight.shape[0] // layer.groups
    found = []
    for channel in range(channels):
        group = channel // per_group
        found.append(weight[group * outputs : (group + 1) * outputs, channel % per_group].abs().max())
    return torch.stack(found)


def test_one_sweep_over_one_pair_is_the_formula_of_the_paper() -> None:
    """s = √(r¹/r²): W¹/s, b¹/s, W²·s, in float64."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    uneven(model)
    first, second = model[0].weight.detach().double(), model[2].weight.detach().double()  # type: ignore[operator]
    s = (first.abs().amax(1) / second.abs().amax(0)).sqrt()
    result = run(model, torch.randn(4, 6), {"equalize-layers": {"sweeps": 1}})
    expected = {"0.weight": first / s[:, None], "0.bias": model[0].bias.detach().double() / s, "2.weight": second * s}  # type: ignore[operator]
    for name, value in expected.items():
        assert torch.allclose(result.get_parameter(name), value.float(), rtol=1e-6, atol=0)


def test_it_mends_what_one_scale_per_weight_breaks() -> None:
    model = imbalanced(mobile())
    x = [torch.randn(8, 3, 16, 16) for _ in range(4)]
    quantizer = PTQQuantizer(per_channel=False, calibration_method="minmax", num_calibration_batches=4)
    plain = quantizer.quantize(model, x)
    mended = quantizer.quantize(run(model, x[0], "equalize-layers"), x)
    with torch.no_grad():
        before, after = (output_snr(model(x[0]), m(x[0])) for m in (plain, mended))
    assert before < 20 and after > before + 20


def test_relu6_becomes_relu_or_keeps_its_layers_alone_where_that_is_asked_for() -> None:
    model, x = imbalanced(mobile(nn.ReLU6)), torch.randn(2, 3, 8, 8)
    manager = PassManager(["fuse-activations", {"equalize-layers": {"relu6": "replace"}}], reproducer=False)
    result = manager.run(model, x)
    assert [r.reason for r in manager.ledger.remarks("equalize-layers")].count("ReLU6 became ReLU") == 6
    assert result.get_submodule("2.expand").activation == "relu"
    assert result.get_submodule("0").activation == "relu6"  # its result goes several ways
    kept = run(model, x, {"equalize-layers": {"relu6": "keep"}})
    assert torch.equal(kept(x), model(x))


@pytest.mark.parametrize("fuse", [False, True])
def test_layers_around_relu6_are_scaled_only_as_far_as_no_value_of_the_data_moves(fuse: bool) -> None:
    """Channels that reach 6 stay; the others grow at most until they would reach it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU6(), nn.Conv2d(12, 12, 3, groups=12), nn.ReLU6(), nn.Conv2d(12, 4, 1))
    uneven(model, octaves=10)
    x = torch.randn(4, 3, 9, 9)
    result = run(model, x, *(["fuse-activations"] if fuse else []), "equalize-layers")
    with torch.no_grad():
        assert output_snr(model(x), result(x)) > 100
    value, after = x, x
    for place in (0, 2):
        first: Any = model[place]
        now = result.get_submodule(str(place))
        with torch.no_grad():
            value = F.conv2d(value, first.weight, first.bias, groups=first.groups)
            after = F.conv2d(after, now.weight, now.bias, groups=now.groups)
        largest, scaled = (v.movedim(1, 0).flatten(1).amax(1) for v in (value, after))
        clips = largest >= 6
        assert clips.any() and not clips.all()
        assert torch.allclose(first.weight[clips], now.weight[clips])
        assert not torch.allclose(first.weight[~clips], now.weight[~clips], rtol=0.1)
        assert bool((scaled[~clips] <= 6 + 1e-4).all())
        value, after = value.clamp(0, 6), after.clamp(0, 6)


def test_without_data_nobody_knows_what_relu6_clips() -> None:
    manager = PassManager(["equalize-layers"], reproducer=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 1)).eval()
    result = manager.run(model)
    assert any("no data tells" in r.reason for r in manager.ledger.remarks("equalize-layers"))
    assert torch.equal(result.get_parameter("0.weight"), model[0].weight)  # type: ignore[arg-type]


def test_on_a_calibrated_graph_only_chains_that_gain_are_equalized() -> None:
    """One chain whose channels were rescaled against each other, and one whose ranges are equal as they are."""
    torch.manual_seed(1)
    bad, good = (nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 1)) for _ in range(2))
    with torch.no_grad():
        scales = torch.exp2(torch.linspace(-5, 5, 6))
        bad[0].weight.mul_(scales[:, None, None, None])  # type: ignore[operator]
        bad[0].bias.mul_(scales)  # type: ignore[operator]
        bad[2].weight.div_(scales[None, :, None, None])  # type: ignore[operator]
        for conv in (good[0], good[2]):
            conv.weight.sign_().mul_(0.5)  # type: ignore[operator]  # every weight exactly on the grid
    model = nn.ModuleDict({"bad": bad, "good": good})

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.parts["bad"](x), self.parts["good"](x)

    x = [torch.randn(8, 6, 5, 5) for _ in range(3)]
    observe = {"insert-observers": {"calibrator": "minmax", "per_channel": False, "overrides": {"*": {"weight_bits": 4}}}}
    plan = ["fuse-activations", observe, "calibrate", "equalize-layers", "fold-quantization"]
    manager = PassManager(plan, reproducer=False, progress=False)
    both = Both().eval()
    result = manager.run(both, x[0], x)
    plain = PassManager([*plan[:3], *plan[4:]], reproducer=False, progress=False).run(both, x[0], x)
    left = [r.node for r in manager.ledger.remarks("equalize-layers") if "brings nothing" in r.reason]
    assert left == ["parts.good.0"]
    with torch.no_grad():
        exact, before, after = (m(x[0]) for m in (both, plain, result))
    assert output_snr(exact[0], after[0]) > output_snr(exact[0], before[0]) + 10
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize(
    ("between", "shape"),
    [
        ([nn.MaxPool1d(2)], (2, 6, 8)),
        ([nn.Flatten()], (2, 6, 8)),
        ([nn.AdaptiveAvgPool1d(4)], (2, 6, 8)),
    ],
)
def test_what_works_along_the_channels_of_a_linear_layer_ends_a_chain(
    between: list[nn.Module], shape: tuple[int, ...]
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), *between)
    x = torch.randn(shape)
    model.append(nn.Linear(model(x).shape[-1], 3))
    uneven(model)
    assert torch.equal(run(model, x, "equalize-layers")(x), model(x))


def test_a_linear_layer_along_another_axis_than_the_channels_ends_a_chain() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 3, 8, 8)
    uneven(model)
    assert torch.equal(run(model, x, "equalize-layers")(x), model(x))


def test_residual_boundaries_tied_and_shared_layers_are_left_alone() -> None:
    class Awkward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 1) for _ in range(4))
            self.d.weight = self.c.weight

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y = y + self.b(y)
            y = self.b(F.relu(y))
            return self.d(self.c(y))

    model, x = Awkward(), torch.randn(2, 4, 5, 5)
    uneven(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = run(model, x, "equalize-layers")
    assert all(torch.equal(value, result.state_dict()[name]) for name, value in before.items())


def test_channels_of_zeros_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        model[0].weight[1], model[2].weight[:, 2] = 0.0, 0.0  # type: ignore[operator]
    x = torch.randn(2, 3, 4, 4)
    result = run(model, x, "equalize-layers")
    assert torch.allclose(result(x), model(x), atol=1e-6)
    assert bool(result.get_parameter("0.weight").isfinite().all())
