"""Layers one by one: grouped and transposed convolutions, normalisation, activations, tables, recurrences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress.errors import TraceError
from tests.channel_cases import Case, c3, check, error, image, lived_in, net, prune, remarks, silenced, tokens

conv, linear = nn.Conv2d, nn.Linear


def row(*layers: Any) -> Callable[[], Any]:
    """conv to 8 channels, the layers, conv from what they leave; fresh with every call."""
    return lambda: nn.Sequential(c3(3, 8), *(layer() for layer in layers))


HALF = {"0.weight": (4, 3, 3, 3)}


def grouped_residual(self: Any, x: Tensor) -> Tensor:
    x = self.stem(x)
    return self.head(x + self.b(torch.relu(self.a(x))))


def mixed_kernels(self: Any, x: Tensor) -> Tensor:
    x = self.stem(x).relu()
    batch, channels, height, width = x.shape
    kernels = torch.einsum("be,eoikl->boikl", self.route(x.mean((2, 3))).sigmoid(), self.kernels).reshape(
        batch * 12, 8, 3, 3
    )
    x = F.conv2d(x.reshape(1, batch * channels, height, width), kernels, padding=1, groups=batch)
    return self.head(x.reshape(batch, 12, height, width))


GROUPED = {
    "a group for each sample, its kernel mixed from learned ones": Case(
        lambda: net(
            mixed_kernels,
            stem=c3(3, 8),
            route=linear(8, 4),
            kernels=nn.Parameter(torch.randn(4, 12, 8, 3, 3)),
            head=c3(12, 2),
        ),
        {"stem.weight": (4, 3, 3, 3), "route.weight": (2, 4), "kernels": (2, 6, 4, 3, 3), "head.weight": (2, 6, 3, 3)},
    ),
    "2 groups": Case(
        row(lambda: c3(8, 12, groups=2), nn.ReLU, lambda: c3(12, 2)),
        {**HALF, "1.weight": (6, 2, 3, 3), "3.weight": (2, 6, 3, 3)},
    ),
    "2 groups, then 4": Case(
        row(lambda: c3(8, 16, groups=2), nn.ReLU, lambda: c3(16, 8, groups=4), lambda: c3(8, 2)),
        {**HALF, "1.weight": (8, 2, 3, 3), "3.weight": (4, 2, 3, 3), "4.weight": (2, 4, 3, 3)},
    ),
    "4 groups, then 2": Case(
        row(lambda: c3(8, 16, groups=4), nn.ReLU, lambda: c3(16, 8, groups=2), lambda: c3(8, 2)),
        {**HALF, "1.weight": (8, 1, 3, 3), "3.weight": (4, 4, 3, 3), "4.weight": (2, 4, 3, 3)},
    ),
    "groups within a residual": Case(
        lambda: net(grouped_residual, stem=c3(3, 8), a=c3(8, 8, groups=2), b=c3(8, 8, groups=2), head=c3(8, 2)),
        {"stem.weight": (4, 3, 3, 3), "a.weight": (4, 2, 3, 3), "b.weight": (4, 2, 3, 3), "head.weight": (2, 4, 3, 3)},
    ),
    "depthwise": Case(
        row(lambda: c3(8, 8, groups=8), nn.ReLU, lambda: c3(8, 2)),
        {**HALF, "1.weight": (4, 1, 3, 3), "3.weight": (2, 4, 3, 3)},
    ),
    "depthwise with multiplier 2": Case(
        row(lambda: c3(8, 16, groups=8), nn.ReLU, lambda: c3(16, 2)),
        {**HALF, "1.weight": (8, 1, 3, 3), "3.weight": (2, 8, 3, 3)},
    ),
    "depthwise on the model's input stays": Case(
        lambda: nn.Sequential(c3(3, 3, groups=3), c3(3, 8), nn.ReLU(), c3(8, 2)),
        {"0.weight": (3, 1, 3, 3), "1.weight": (4, 3, 3, 3)},
        frozen={"0": "fixed size"},
    ),
    "several outputs of every channel of the model's input": Case(
        lambda: nn.Sequential(c3(3, 12, groups=3), nn.ReLU(), c3(12, 8), nn.ReLU(), c3(8, 2)),
        {"0.weight": (6, 1, 3, 3), "2.weight": (4, 6, 3, 3)},
    ),
    "groups on the model's input": Case(
        lambda: nn.Sequential(c3(4, 8, groups=2), nn.ReLU(), c3(8, 2)),
        {"0.weight": (4, 2, 3, 3), "2.weight": (2, 4, 3, 3)},
        (image(4),),
        [(image(4, size=7),)],
    ),
    "one channel in from every group, several out": Case(
        row(lambda: c3(8, 4, groups=4), nn.ReLU, lambda: c3(4, 2)),
        {**HALF, "1.weight": (2, 2, 3, 3), "3.weight": (2, 2, 3, 3)},
    ),
    "groups that a shuffle ties into one": Case(
        lambda: nn.Sequential(c3(3, 2), c3(2, 8, groups=2), nn.ChannelShuffle(2), c3(8, 2, groups=2), nn.ReLU(), c3(2, 2)),
        {"0.weight": (2, 3, 3, 3), "1.weight": (4, 1, 3, 3), "3.weight": (2, 2, 3, 3)},
        frozen={"0": "fixed size", "3": "the only one of its group"},
    ),
    "transposed": Case(
        row(lambda: nn.ConvTranspose2d(8, 6, 2, stride=2), nn.ReLU, lambda: c3(6, 2)),
        {**HALF, "1.weight": (4, 3, 2, 2), "1.bias": (3,), "3.weight": (2, 3, 3, 3)},
    ),
    "transposed in groups": Case(
        row(lambda: nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2), nn.ReLU, lambda: c3(12, 2)),
        {**HALF, "1.weight": (4, 3, 2, 2), "1.bias": (6,), "3.weight": (2, 6, 3, 3)},
    ),
    "transposed depthwise": Case(
        row(lambda: nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8), lambda: c3(8, 2)),
        {**HALF, "1.weight": (4, 1, 2, 2), "1.bias": (4,), "2.weight": (2, 4, 3, 3)},
    ),
    "transposed in 1 and 3 dimensions": Case(
        lambda: nn.Sequential(
            nn.ConvTranspose1d(6, 8, 3),
            nn.Unflatten(2, (3, 1, 3)),
            nn.ConvTranspose3d(8, 6, 2),
            nn.ReLU(),
            nn.Conv3d(6, 2, 2),
        ),
        {"0.weight": (6, 4, 3), "2.weight": (4, 3, 2, 2, 2), "4.weight": (2, 3, 2, 2, 2)},
        (tokens(7, 6),),
        [(tokens(7, 6, 3),)],
    ),
}


class Frozen(nn.Module):
    """Batch normalisation whose statistics are all buffers, as detectors write it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(size) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()  # type: ignore[operator]
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)  # type: ignore[operator]


def layer_norm_2d(self: Any, x: Tensor) -> Tensor:
    x = self.conv(x).permute(0, 2, 3, 1)
    return self.head(F.layer_norm(x, self.norm.normalized_shape, self.norm.weight, self.norm.bias, 1e-6).permute(0, 3, 1, 2))


def rms_by_hand(self: Any, x: Tensor) -> Tensor:
    x = self.embed(x)
    return self.head(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale)


def norm_row(layer: Callable[[], Any]) -> Callable[[], Any]:
    return row(layer, lambda: c3(8, 2))


NORMS = {
    "BatchNorm1d after flatten": Case(
        row(lambda: nn.AdaptiveAvgPool2d(2), nn.Flatten, lambda: nn.BatchNorm1d(32), nn.ReLU, lambda: linear(32, 5)),
        {**HALF, "3.weight": (16,), "3.running_mean": (16,), "5.weight": (5, 16)},
    ),
    "BatchNorm without scale": Case(
        norm_row(lambda: nn.BatchNorm2d(8, affine=False)), {**HALF, "1.running_mean": (4,), "2.weight": (2, 4, 3, 3)}
    ),
    "SyncBatchNorm": Case(norm_row(lambda: nn.SyncBatchNorm(8)), {**HALF, "1.weight": (4,), "2.weight": (2, 4, 3, 3)}),
    "frozen BatchNorm of buffers": Case(
        norm_row(lambda: Frozen(8)), {**HALF, "1.weight": (4,), "1.running_var": (4,), "2.weight": (2, 4, 3, 3)}
    ),
    "InstanceNorm": Case(
        norm_row(lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
        {**HALF, "1.weight": (4,), "1.running_mean": (4,), "2.weight": (2, 4, 3, 3)},
    ),
    "InstanceNorm without statistics": Case(norm_row(lambda: nn.InstanceNorm2d(8)), {**HALF, "2.weight": (2, 4, 3, 3)}),
    "GroupNorm": Case(norm_row(lambda: nn.GroupNorm(4, 8)), {**HALF, "1.weight": (4,), "2.weight": (2, 4, 3, 3)}),
    "GroupNorm of one group": Case(
        norm_row(lambda: nn.GroupNorm(1, 8)), {**HALF, "1.weight": (4,), "2.weight": (2, 4, 3, 3)}
    ),
    "GroupNorm without scale": Case(norm_row(lambda: nn.GroupNorm(2, 8, affine=False)), {**HALF, "2.weight": (2, 4, 3, 3)}),
    "GroupNorm of one channel each": Case(
        norm_row(lambda: nn.GroupNorm(8, 8)), {**HALF, "1.weight": (4,), "2.weight": (2, 4, 3, 3)}
    ),
    "LayerNorm over channels": Case(
        lambda: nn.Sequential(linear(6, 8), nn.LayerNorm(8), nn.GELU(), linear(8, 3)),
        {"0.weight": (4, 6), "1.weight": (4,), "3.weight": (3, 4)},
        (tokens(),),
        [(tokens(length=3),)],
    ),
    "LayerNorm over channels and space": Case(
        lambda: nn.Sequential(c3(3, 8), nn.LayerNorm((8, 5, 5)), c3(8, 2)),
        {**HALF, "1.weight": (4, 5, 5), "2.weight": (2, 4, 3, 3)},
        (image(size=5),),
        [(image(size=5, batch=4),)],
    ),
    "LayerNorm2d by permutation": Case(
        lambda: net(layer_norm_2d, conv=c3(3, 8), norm=nn.LayerNorm(8), head=c3(8, 2)),
        {"conv.weight": (4, 3, 3, 3), "norm.weight": (4,), "head.weight": (2, 4, 3, 3)},
    ),
    "RMSNorm": Case(
        lambda: nn.Sequential(linear(6, 8), nn.RMSNorm(8), linear(8, 3)),
        {"0.weight": (4, 6), "1.weight": (4,), "2.weight": (3, 4)},
        (tokens(),),
        [(tokens(length=3),)],
    ),
    "RMSNorm by hand": Case(
        lambda: net(rms_by_hand, embed=linear(6, 8), scale=nn.Parameter(torch.rand(8)), head=linear(8, 3)),
        {"embed.weight": (4, 6), "scale": (4,), "head.weight": (3, 4)},
        (tokens(),),
        [(tokens(length=3),)],
    ),
    "LocalResponseNorm keeps its channels": Case(
        row(lambda: nn.LocalResponseNorm(3), lambda: c3(8, 6), nn.ReLU, lambda: c3(6, 2)),
        {"0.weight": (8, 3, 3, 3), "2.weight": (3, 8, 3, 3)},
        frozen={"0": "neighbouring channels"},
    ),
}


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x * torch.bernoulli(torch.full((x.shape[0], 1, 1, 1), 0.9, dtype=x.dtype)) / 0.9
        return x


ACTIVATIONS = {
    "PReLU of one slope": Case(norm_row(lambda: nn.PReLU()), {**HALF, "1.weight": (1,), "2.weight": (2, 4, 3, 3)}),
    "PReLU of a slope for every channel": Case(
        norm_row(lambda: nn.PReLU(8)), {**HALF, "1.weight": (4,), "2.weight": (2, 4, 3, 3)}
    ),
    "LayerScale": Case(
        lambda: net(
            lambda self, x: self.head(self.drop(self.a(x)) + self.gamma * self.b(self.a(x))),
            a=c3(3, 8),
            b=c3(8, 8),
            gamma=nn.Parameter(torch.rand(8, 1, 1)),
            drop=DropPath(),
            head=c3(8, 2),
        ),
        {"a.weight": (4, 3, 3, 3), "gamma": (4, 1, 1), "head.weight": (2, 4, 3, 3)},
    ),
    "Dropout2d": Case(norm_row(nn.Dropout2d), {**HALF, "2.weight": (2, 4, 3, 3)}),
    "GELU": Case(norm_row(nn.GELU), {**HALF, "2.weight": (2, 4, 3, 3)}),
    "Hardswish": Case(norm_row(nn.Hardswish), {**HALF, "2.weight": (2, 4, 3, 3)}),
    "Sigmoid, which is not zero at zero": Case(norm_row(nn.Sigmoid), {**HALF, "2.weight": (2, 4, 3, 3)}),
    "softmax over channels": Case(norm_row(lambda: nn.Softmax(1)), {**HALF, "2.weight": (2, 4, 3, 3)}),
}


def looked_up(self: Any, x: Tensor) -> Tensor:
    return self.head(torch.relu(self.mid(self.table(x))))


def bilinear(self: Any, x: Tensor) -> Tensor:
    return self.head(self.pair(torch.relu(self.a(x)), torch.tanh(self.b(x))))


WORDS = torch.arange(14).reshape(2, 7) % 11

LINEAR = {
    "three dimensions": Case(
        lambda: nn.Sequential(linear(6, 8), nn.ReLU(), linear(8, 3, bias=False)),
        {"0.weight": (4, 6), "2.weight": (3, 4)},
        (tokens(),),
        [(tokens(length=3),)],
    ),
    "four dimensions, channels last": Case(
        lambda: net(
            lambda self, x: self.b(F.gelu(self.a(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2), a=linear(3, 8), b=linear(8, 3)
        ),
        {"a.weight": (4, 3), "b.weight": (3, 4)},
    ),
    "no bias": Case(
        lambda: nn.Sequential(linear(6, 8, bias=False), nn.ReLU(), linear(8, 3, bias=False)),
        {"0.weight": (4, 6), "2.weight": (3, 4)},
        (tokens()[:, 0],),
        [(tokens(batch=5)[:, 0],)],
    ),
    "Bilinear": Case(
        lambda: net(bilinear, a=linear(6, 8), b=linear(6, 10), pair=nn.Bilinear(8, 10, 4), head=linear(4, 3)),
        {"a.weight": (4, 6), "b.weight": (5, 6), "pair.weight": (2, 4, 5), "head.weight": (3, 2)},
        (tokens()[:, 0],),
        [(tokens(batch=5)[:, 0],)],
    ),
    "Embedding": Case(
        lambda: net(looked_up, table=nn.Embedding(11, 8), mid=linear(8, 6), head=linear(6, 3)),
        {"table.weight": (11, 4), "mid.weight": (3, 4), "head.weight": (3, 3)},
        (WORDS,),
        [(WORDS[:, :2],)],
    ),
    "EmbeddingBag": Case(
        lambda: net(looked_up, table=nn.EmbeddingBag(11, 8, mode="sum"), mid=linear(8, 6), head=linear(6, 3)),
        {"table.weight": (11, 4), "mid.weight": (3, 4), "head.weight": (3, 3)},
        (WORDS,),
        [(WORDS[:1],)],
    ),
}


def recurrent(kind: Any, **options: Any) -> Callable[[], Any]:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.core(self.embed(x))[0])

    def build() -> Any:
        core = kind(8, 6, **options)
        width = (options.get("proj_size") or 6) * (2 if options.get("bidirectional") else 1)
        return net(forward, embed=linear(6, 8), core=core, head=linear(width, 3))

    return build


def state_only(self: Any, x: Tensor) -> Tensor:
    return self.head(self.core(self.embed(x))[1][0][-1])


EMBED = {"embed.weight": (4, 6)}
RECURRENT = {
    "LSTM": Case(
        recurrent(nn.LSTM), {**EMBED, "core.weight_ih_l0": (12, 4), "core.weight_hh_l0": (12, 3), "head.weight": (3, 3)}
    ),
    "GRU, batch first": Case(
        recurrent(nn.GRU, batch_first=True),
        {**EMBED, "core.weight_ih_l0": (9, 4), "core.bias_hh_l0": (9,), "head.weight": (3, 3)},
    ),
    "RNN": Case(recurrent(nn.RNN), {**EMBED, "core.weight_hh_l0": (3, 3), "head.weight": (3, 3)}),
    "LSTM of three layers": Case(
        recurrent(nn.LSTM, num_layers=3), {"core.weight_ih_l2": (12, 3), "core.weight_hh_l1": (12, 3), "head.weight": (3, 3)}
    ),
    "LSTM in both directions": Case(
        recurrent(nn.LSTM, bidirectional=True, batch_first=True),
        {**EMBED, "core.weight_ih_l0_reverse": (12, 4), "head.weight": (3, 6)},
    ),
    "GRU of two layers in both directions": Case(
        recurrent(nn.GRU, bidirectional=True, num_layers=2),
        {"core.weight_ih_l1": (9, 6), "core.weight_hh_l1_reverse": (9, 3), "head.weight": (3, 6)},
    ),
    "LSTM with a projection": Case(
        recurrent(nn.LSTM, proj_size=4), {"core.weight_hr_l0": (2, 3), "core.weight_hh_l0": (12, 2), "head.weight": (3, 2)}
    ),
    "LSTM with a projection in both directions": Case(
        recurrent(nn.LSTM, proj_size=4, bidirectional=True, num_layers=2),
        {"core.weight_hr_l0": (2, 3), "core.weight_ih_l1_reverse": (12, 4), "head.weight": (3, 4)},
    ),
    "LSTM without bias": Case(
        recurrent(nn.LSTM, bias=False), {**EMBED, "core.weight_ih_l0": (12, 4), "head.weight": (3, 3)}
    ),
    "the last state": Case(
        lambda: net(state_only, embed=linear(6, 8), core=nn.LSTM(8, 6, num_layers=2), head=linear(6, 3)),
        {"core.weight_ih_l1": (12, 3), "head.weight": (3, 3)},
    ),
}
for _name, _case in RECURRENT.items():
    RECURRENT[_name] = Case(_case.build, _case.shapes, (tokens(),), [(tokens(length=4, batch=3),)])

CASES = {
    f"{page}: {name}": case
    for page, cases in [
        ("groups", GROUPED),
        ("norm", NORMS),
        ("activation", ACTIVATIONS),
        ("linear", LINEAR),
        ("recurrent", RECURRENT),
    ]
    for name, case in cases.items()
}


@pytest.mark.parametrize("criterion", ["random", "l1_norm"])
@pytest.mark.parametrize("name", CASES)
def test_half_of_the_channels_go_and_the_rest_compute_what_they_did(name: str, criterion: str) -> None:
    check(CASES[name], criterion)


def deformed(self: Any, x: Tensor) -> Tensor:
    x = self.stem(x).relu()
    return self.head(self.bn(self.body(x, self.offset(x), self.mask(x).sigmoid())).relu())


@pytest.mark.parametrize(
    ("groups", "places", "left"),
    [
        (1, 1, {"stem.weight": (4, 3, 3, 3), "offset.weight": (18, 4, 3, 3), "body.weight": (8, 4, 3, 3)}),
        (2, 1, {"stem.weight": (4, 3, 3, 3), "mask.weight": (9, 4, 3, 3), "body.weight": (8, 2, 3, 3)}),
        (1, 2, {"stem.weight": (8, 3, 3, 3), "offset.weight": (36, 8, 3, 3), "body.weight": (8, 8, 3, 3)}),
    ],
)
def test_a_deformable_convolution_loses_channels_and_keeps_where_it_reads(groups: int, places: int, left: Any) -> None:
    layers = pytest.importorskip("torchvision.ops")
    parts = {"stem": c3(3, 8), "offset": c3(8, 18 * places), "mask": c3(8, 9 * places)}
    body = {"body": lambda: layers.DeformConv2d(8, 16, 3, padding=1, groups=groups), "bn": lambda: nn.BatchNorm2d(16)}
    build = lambda: net(deformed, **parts, **{name: make() for name, make in body.items()}, head=c3(16, 2))  # noqa: E731
    check(Case(build, {**left, "head.weight": (2, 8, 3, 3)}, frozen={"offset": "says where a kernel reads"}))


def test_modules_say_their_new_sizes() -> None:
    _, small, _ = check(CASES["groups: depthwise with multiplier 2"])
    part: Any = small.get_submodule("1")
    assert (part.in_channels, part.out_channels, part.groups) == (4, 8, 4)
    _, small, _ = check(CASES["groups: transposed in groups"])
    part = small.get_submodule("1")
    assert (part.in_channels, part.out_channels, part.groups) == (4, 6, 2)
    _, small, _ = check(CASES["recurrent: LSTM with a projection"])
    part = small.get_submodule("core")
    assert (part.input_size, part.hidden_size, part.proj_size) == (4, 3, 2)


def test_the_count_of_batches_a_batchnorm_has_seen_stays() -> None:
    model = lived_in(nn.Sequential(c3(3, 8), nn.BatchNorm2d(8), c3(8, 2)))
    model[1].num_batches_tracked.fill_(41)
    small, _ = prune(model, (image(),))
    assert int(small.get_buffer("1.num_batches_tracked")) == 41


@pytest.mark.parametrize("channels", [8, 12])
@pytest.mark.parametrize("groups", [2, 4])
def test_the_groups_of_a_groupnorm_divide_what_is_left(groups: int, channels: int) -> None:
    model = lived_in(nn.Sequential(c3(3, channels), nn.GroupNorm(groups, channels), c3(channels, 2)))
    for share in (0.25, 0.5, 0.7):
        small, _ = prune(model, (image(),), sparsity=share)
        part: Any = small.get_submodule("1")
        assert part.num_channels == part.weight.shape[0] and part.num_channels % part.num_groups == 0


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(8), lambda: nn.RMSNorm(8), lambda: nn.Softmax(-1)])
def test_the_exact_policy_leaves_alone_what_changes_statistics(norm: Callable[[], Any]) -> None:
    model = lived_in(nn.Sequential(linear(6, 8), norm(), linear(8, 10), nn.ReLU(), linear(10, 3)))
    small, pruner = prune(model, (tokens(),), policy="exact")
    assert small.get_parameter("0.weight").shape == (8, 6)
    assert small.get_parameter("2.weight").shape == (5, 8)
    assert "removing it would not be exact" in remarks(pruner)


def test_a_whole_group_goes_from_a_groupnorm_exactly() -> None:
    model = lived_in(nn.Sequential(c3(3, 8), nn.GroupNorm(4, 8), c3(8, 2)))
    small, _ = prune(model, (image(),), policy="exact")
    part: Any = small.get_submodule("1")
    assert (part.num_groups, part.num_channels) == (2, 4)


def test_a_lazy_layer_must_be_materialised_first() -> None:
    model = nn.Sequential(c3(3, 8), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(4)).double().eval()
    with pytest.raises(TraceError, match=r"3\.weight has no shape yet"):
        prune(model, (image(),))
    model(image())
    small, _ = prune(model, (image(),))
    assert small.get_parameter("3.weight").shape == (4, 16)


def test_a_packed_sequence_is_left_alone_and_the_rest_is_pruned() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(x), torch.tensor([7, 5]), batch_first=True)
        return self.tail(self.core(packed)[1][0][-1])

    tail = nn.Sequential(linear(6, 8), nn.ReLU(), linear(8, 3))
    model = lived_in(net(forward, embed=linear(6, 8), core=nn.LSTM(8, 6, batch_first=True), tail=tail))
    small, _ = prune(model, (tokens(),))
    assert small.get_parameter("core.weight_ih_l0").shape == (24, 8)
    assert small.get_parameter("tail.0.weight").shape == (4, 6)
    assert error(silenced(model, small)(tokens()), small(tokens())) <= 1e-10
