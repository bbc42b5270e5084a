"""Channels that are sliced, turned, repeated, padded, shuffled and written over; tensors that are not a layer's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune

from tests.channel_cases import Case, c3, check, image, net, tokens

conv, linear = nn.Conv2d, nn.Linear


def between(change: Callable[[Any, Tensor], Any], after: int, width: int = 8, **parts: Any) -> Callable[[], Any]:
    """conv → ``change`` → conv, where ``change`` makes ``after`` channels out of ``width``."""

    def build() -> Any:
        return net(
            lambda self, x: self.head(change(self, torch.relu(self.conv(x)))), conv=c3(3, width), head=c3(after, 2), **parts
        )

    return build


def unbound(self: Any, x: Tensor) -> Tensor:
    a, b = torch.unbind(x.view(x.size(0), 2, 4, *x.shape[2:]), 1)
    return a + b.sigmoid()


HALF = {"conv.weight": (4, 3, 3, 3)}
EVEN = torch.tensor([0, 2, 4, 6, 1])

MOVED = {
    "a front part": Case(between(lambda self, x: x[:, :6], 6), HALF),
    "a back part": Case(between(lambda self, x: x[:, 2:], 6), HALF),
    "both parts": Case(
        between(lambda self, x: torch.cat([x[:, 4:] * 2, x[:, :4]], 1), 8), {**HALF, "head.weight": (2, 4, 3, 3)}
    ),
    "every other channel": Case(between(lambda self, x: x[:, ::2], 4), HALF),
    "a list of channels": Case(between(lambda self, x: x[:, [5, 1, 2, 7]], 4), HALF),
    "a list that names a channel twice": Case(between(lambda self, x: x[:, [0, 1, 0, 3, 5]], 5), HALF),
    "an index buffer": Case(between(lambda self, x: x[:, self.index], 5, index=EVEN), HALF),
    "index_select": Case(between(lambda self, x: torch.index_select(x, 1, self.index), 5, index=EVEN), HALF),
    "index_select as a method": Case(between(lambda self, x: x.index_select(1, self.index), 5, index=EVEN), HALF),
    "narrow": Case(between(lambda self, x: x.narrow(1, 2, 4), 4), HALF),
    "one channel by number": Case(
        between(lambda self, x: torch.cat([x, x[:, 3].unsqueeze(1)], 1), 9), {"conv.weight": (5, 3, 3, 3)}
    ),
    "flip": Case(between(lambda self, x: torch.flip(x, [1]), 8), {**HALF, "head.weight": (2, 4, 3, 3)}),
    "flip of space too": Case(between(lambda self, x: x.flip(1, 3), 8), {**HALF, "head.weight": (2, 4, 3, 3)}),
    "roll": Case(between(lambda self, x: torch.roll(x, 3, 1), 8), {**HALF, "head.weight": (2, 4, 3, 3)}),
    "roll back, of two dimensions": Case(
        between(lambda self, x: x.roll((-3, 1), (1, 2)), 8), {**HALF, "head.weight": (2, 4, 3, 3)}
    ),
    "repeat": Case(between(lambda self, x: x.repeat(1, 2, 1, 1), 16), {**HALF, "head.weight": (2, 8, 3, 3)}),
    "tile": Case(between(lambda self, x: x.tile((1, 3, 1, 1)), 24), {**HALF, "head.weight": (2, 12, 3, 3)}),
    "repeat_interleave": Case(
        between(lambda self, x: x.repeat_interleave(2, dim=1), 16), {**HALF, "head.weight": (2, 8, 3, 3)}
    ),
    "padded by channels": Case(
        between(lambda self, x: F.pad(x, (0, 0, 0, 0, 4, 4)) + self.other(x), 16, other=c3(8, 16)),
        {"other.bias": (8,), "head.weight": (2, 8, 3, 3)},
    ),
    "padded by channels, by a constant that is read": Case(
        between(lambda self, x: F.pad(x, (0, 0, 0, 0, 2, 2)), 12), {"head.weight": (2, 6, 3, 3)}
    ),
    "joined with zeros": Case(
        between(lambda self, x: torch.cat([x, torch.zeros_like(x)], 1) + self.other(x), 16, other=c3(8, 16)),
        {"other.bias": (8,), "head.weight": (2, 8, 3, 3)},
    ),
    "shuffled by view": Case(
        between(
            lambda self, x: (
                x.view(x.size(0), 2, 4, x.size(2), x.size(3)).transpose(1, 2).reshape(x.size(0), 8, *x.shape[2:])
            ),
            8,
        ),
        {**HALF, "head.weight": (2, 4, 3, 3)},
    ),
    "nn.ChannelShuffle": Case(
        between(lambda self, x: self.mix(x), 8, mix=nn.ChannelShuffle(2)), {**HALF, "head.weight": (2, 4, 3, 3)}
    ),
    "pixel_shuffle": Case(
        between(lambda self, x: F.pixel_shuffle(x, 2), 4, 16), {"conv.weight": (8, 3, 3, 3), "head.weight": (2, 2, 3, 3)}
    ),
    "nn.PixelUnshuffle": Case(
        between(lambda self, x: self.fold(x), 32, fold=nn.PixelUnshuffle(2)),
        {**HALF, "head.weight": (2, 16, 3, 3)},
        more=[(image(size=14),)],
    ),
    "space to depth by slices": Case(
        between(
            lambda self, x: torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1), 32
        ),
        {**HALF, "head.weight": (2, 16, 3, 3)},
        more=[(image(size=14),)],
    ),
    "stacked and summed": Case(
        between(lambda self, x: torch.stack([x, self.b(x)], 1).sum(1), 8, b=c3(8, 8)),
        {**HALF, "b.weight": (4, 4, 3, 3), "head.weight": (2, 4, 3, 3)},
    ),
    "stacked before the channels and flattened": Case(
        between(lambda self, x: torch.stack([x, self.b(x)], 1).flatten(1, 2), 16, b=c3(8, 8)),
        {**HALF, "head.weight": (2, 8, 3, 3)},
    ),
    "stacked after the channels and flattened": Case(
        between(lambda self, x: torch.stack((x, self.b(x)), dim=2).flatten(1, 2), 16, b=c3(8, 8)),
        {**HALF, "head.weight": (2, 8, 3, 3)},
    ),
    "unbound": Case(between(unbound, 4), {**HALF, "head.weight": (2, 2, 3, 3)}),
    "unflattened, and the largest of every pair": Case(
        between(lambda self, x: x.unflatten(1, (4, 2)).amax(2), 4),
        {"conv.weight": (4, 3, 3, 3), "head.weight": (2, 4, 3, 3)},
    ),
    "moved to the end and back": Case(
        between(lambda self, x: x.movedim(1, -1).contiguous().swapaxes(1, 2).permute(0, 3, 1, 2), 8),
        {**HALF, "head.weight": (2, 4, 3, 3)},
    ),
}


def shuffle_unit(self: Any, x: Tensor) -> Tensor:
    x = torch.relu(self.stem(x))
    for branch in self.branches:
        a, b = x.chunk(2, dim=1)
        x = torch.cat((a, branch(b)), dim=1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
    return self.head(x)


def branch() -> Any:
    return nn.Sequential(conv(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), c3(8, 8, groups=8), conv(8, 8, 1), nn.ReLU())


def unfolded(self: Any, x: Tensor) -> Tensor:
    x = torch.relu(self.conv(x))
    columns = F.unfold(x, 3, padding=1)
    return self.head(F.fold(columns, x.shape[2:], 3, padding=1))


def overwritten(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    y[:, :4] = self.other(x)
    return self.head(y)


def in_place(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    y += self.other(x)
    y.relu_().mul_(2.0)
    return self.head(y.add_(self.other(x)))


def filled(self: Any, x: Tensor) -> Tensor:
    y = torch.zeros(x.size(0), 12, x.size(2), x.size(3), dtype=x.dtype)
    y[:, :8] = self.conv(x)
    y[:, 8:] = self.other(x)
    return self.head(y)


def without_gradient(self: Any, x: Tensor) -> Tensor:
    x = self.conv(x)
    with torch.no_grad():
        gate = self.gate(x.detach())
    return self.head(x * torch.sigmoid(gate))


def all_frozen() -> Any:
    return nn.Sequential(c3(3, 8), nn.ReLU(), c3(8, 2)).requires_grad_(False)


SPECIAL = {
    "ShuffleNet": Case(
        lambda: net(shuffle_unit, stem=c3(3, 16), branches=nn.ModuleList([branch(), branch()]), head=c3(16, 2)),
        {"stem.weight": (8, 3, 3, 3)},
    ),
    "unfolded and folded again": Case(
        lambda: net(unfolded, conv=c3(3, 8), head=nn.Sequential(c3(8, 4), c3(4, 2))),
        {"conv.weight": (4, 3, 3, 3), "head.1.weight": (2, 2, 3, 3)},
        more=[(image(batch=3),)],
    ),
    "a slice is assigned": Case(
        lambda: net(overwritten, conv=c3(3, 8), other=c3(3, 4), head=c3(8, 2)),
        {**HALF, "head.weight": (2, 4, 3, 3)},
    ),
    "in place": Case(
        lambda: net(in_place, conv=c3(3, 8), other=c3(3, 8), head=c3(8, 2)),
        {**HALF, "other.weight": (4, 3, 3, 3), "head.weight": (2, 4, 3, 3)},
    ),
    "slices of zeros are assigned": Case(
        lambda: net(filled, conv=c3(3, 8), other=c3(3, 4), head=c3(12, 2)), {"head.weight": (2, 6, 3, 3)}
    ),
    "a branch without gradients": Case(
        lambda: net(without_gradient, conv=c3(3, 8), gate=conv(8, 8, 1), head=c3(8, 2)),
        {**HALF, "gate.weight": (4, 4, 1, 1), "head.weight": (2, 4, 3, 3)},
    ),
    "no parameter wants gradients": Case(all_frozen, {"0.weight": (4, 3, 3, 3), "2.weight": (2, 4, 3, 3)}),
}


def normalised(self: Any, x: Tensor) -> Tensor:
    x = (x - self.mean) / self.std
    return self.head(self.conv(x) * self.scale + self.shift[None, :, None, None])


def class_token(self: Any, x: Tensor) -> Tensor:
    x = self.embed(x)
    x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
    return self.head(torch.relu(self.mid(x))[:, 0])


def made_in_forward(self: Any, x: Tensor) -> Tensor:
    x = self.conv(x)
    zero = torch.zeros(x.size(0), 8, 1, 1, dtype=x.dtype)
    one = x.new_ones(1, 8, 1, 1)
    return self.head(torch.cat([x + zero, (x * one)], 1))


def positional(self: Any, x: Tensor) -> Tensor:
    x = self.mid(self.embed(x))
    return self.head(x + torch.arange(8, dtype=x.dtype) / 8)


P = nn.Parameter
WORDS = torch.arange(14).reshape(2, 7) % 10
LOOSE = {
    "buffers, and statistics of the input": Case(
        lambda: net(
            normalised,
            mean=torch.rand(1, 3, 1, 1),
            std=torch.rand(3, 1, 1) + 1,
            scale=torch.rand(1, 8, 1, 1),
            shift=torch.rand(8),
            conv=c3(3, 8),
            head=c3(8, 2),
        ),
        {**HALF, "scale": (1, 4, 1, 1), "shift": (4,), "mean": (1, 3, 1, 1), "std": (3, 1, 1), "head.weight": (2, 4, 3, 3)},
    ),
    "parameters of no layer": Case(
        lambda: net(
            lambda self, x: self.head(
                F.conv2d(self.conv(x) * self.scale + self.shift.view(1, -1, 1, 1), self.weight, padding=1)
            ),
            conv=c3(3, 8),
            scale=P(torch.rand(8, 1, 1)),
            shift=P(torch.rand(8)),
            weight=P(torch.rand(6, 8, 3, 3)),
            head=c3(6, 2),
        ),
        {**HALF, "scale": (4, 1, 1), "shift": (4,), "weight": (3, 4, 3, 3), "head.weight": (2, 3, 3, 3)},
    ),
    "a square matrix for F.linear": Case(
        lambda: net(
            lambda self, x: self.head(torch.relu(F.linear(self.embed(x), self.weight, self.bias))),
            embed=linear(6, 8),
            weight=P(torch.rand(8, 8)),
            bias=P(torch.rand(8)),
            head=linear(8, 3),
        ),
        {"embed.weight": (4, 6), "weight": (4, 4), "bias": (4,), "head.weight": (3, 4)},
        (tokens(),),
        [(tokens(length=4),)],
    ),
    "a matrix on the left and right of @": Case(
        lambda: net(
            lambda self, x: self.head((self.embed(x) @ self.a) @ self.b.t()),
            embed=linear(6, 8),
            a=P(torch.rand(8, 10)),
            b=P(torch.rand(4, 10)),
            head=linear(4, 3),
        ),
        {"embed.weight": (4, 6), "a": (4, 5), "b": (2, 5), "head.weight": (3, 2)},
        (tokens(),),
        [(tokens(length=4),)],
    ),
    "a vector on the right of @": Case(
        lambda: net(
            lambda self, x: torch.relu(self.embed(x)) @ self.query,
            embed=linear(6, 8),
            query=P(torch.rand(8)),
        ),
        {"embed.weight": (4, 6), "query": (4,)},
        (tokens(),),
        [(tokens(length=4),)],
    ),
    "vectors on both sides": Case(
        lambda: net(
            lambda self, x: (
                self.weights @ torch.relu(self.embed(x)).transpose(1, 2)[0] + torch.mv(self.embed(x)[0], self.query)
            ),
            embed=linear(6, 8),
            weights=P(torch.rand(8)),
            query=P(torch.rand(8)),
        ),
        {"embed.weight": (4, 6), "weights": (4,), "query": (4,)},
        (tokens(),),
        [(tokens(length=4),)],
    ),
    "a table indexed by data keeps its rows": Case(
        lambda: net(lambda self, x: self.head(torch.relu(self.table[x])), table=P(torch.rand(11, 8)), head=linear(8, 3)),
        {"table": (11, 4), "head.weight": (3, 4)},
        (WORDS,),
        [(WORDS[:, :3] + 1,)],
    ),
    "positions up to the length keep their rows": Case(
        lambda: net(
            lambda self, x: self.head(torch.relu(self.embed(x) + self.table[: x.shape[1]].sum(0))),
            embed=linear(6, 8),
            table=P(torch.rand(11, 8)),
            head=linear(8, 3),
        ),
        {"table": (11, 4), "head.weight": (3, 4)},
        (tokens(),),
        [(tokens(length=11),)],
    ),
    "what a mask picks stays": Case(
        lambda: net(
            lambda self, x: self.head(self.mid(torch.relu(self.embed(x))[x.sum(-1) > 0])),
            embed=linear(6, 8),
            mid=linear(8, 10),
            head=linear(10, 3),
        ),
        {"embed.weight": (8, 6), "mid.weight": (5, 8)},
        (tokens(),),
        [(tokens(length=11),)],
        frozen={"embed": "a mask says so"},
    ),
    "a minus before the channels": Case(
        lambda: net(lambda self, x: self.head(-self.embed(x)), embed=linear(6, 8), head=linear(8, 3)),
        {"embed.weight": (4, 6), "head.weight": (3, 4)},
        (tokens(),),
        [],
    ),
    "class token and positions": Case(
        lambda: net(
            class_token,
            embed=linear(6, 8),
            token=P(torch.rand(1, 1, 8)),
            position=P(torch.rand(1, 8, 8)),
            mid=linear(8, 10),
            head=linear(10, 3),
        ),
        {"embed.weight": (4, 6), "token": (1, 1, 4), "position": (1, 8, 4), "mid.weight": (5, 4), "head.weight": (3, 5)},
        (tokens(),),
        [(tokens(batch=4),)],
    ),
    "zeros and ones with a written number of channels": Case(
        lambda: net(made_in_forward, conv=c3(3, 8), head=c3(16, 2)), {**HALF, "head.weight": (2, 8, 3, 3)}
    ),
    "arange over channels keeps them": Case(
        lambda: net(positional, embed=linear(6, 10), mid=linear(10, 8), head=linear(8, 3)),
        {"embed.weight": (5, 6), "mid.weight": (8, 5)},
        (tokens(),),
        [(tokens(length=4),)],
        frozen={"mid": "fixed size"},
    ),
}


def weighted(change: Callable[[Any], Any]) -> Callable[[], Any]:
    return lambda: nn.Sequential(c3(3, 8), nn.ReLU(), change(c3(8, 6)), nn.ReLU(), c3(6, 2))


def plain_parametrizations(model: Any) -> Any:
    for part in list(model.modules()):
        if parametrize.is_parametrized(part):
            parametrize.remove_parametrizations(part, "weight")
    return model


def plain_hooks(model: Any) -> Any:
    nn.utils.remove_weight_norm(model[2])
    return model


def plain_masks(model: Any) -> Any:
    torch_prune.remove(model[2], "weight")
    return model


def masked(part: Any) -> Any:
    return torch_prune.random_unstructured(part, "weight", 0.25)


def hooked_weight_norm(part: Any) -> Any:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(part)


THREE = {"0.weight": (4, 3, 3, 3), "2.weight": (3, 4, 3, 3), "4.weight": (2, 3, 3, 3)}
WEIGHTS = {
    "weight_norm": Case(weighted(parametrizations.weight_norm), THREE, plain=plain_parametrizations),
    "spectral_norm": Case(weighted(parametrizations.spectral_norm), THREE, plain=plain_parametrizations),
    "weight_norm by hooks": Case(weighted(hooked_weight_norm), THREE, plain=plain_hooks),
    "masked by torch.nn.utils.prune": Case(weighted(masked), THREE, plain=plain_masks),
}

CASES = {**MOVED, **SPECIAL, **LOOSE, **WEIGHTS}


@pytest.mark.parametrize("criterion", ["random", "l1_norm"])
@pytest.mark.parametrize("name", CASES)
def test_half_of_the_channels_go_and_the_rest_compute_what_they_did(name: str, criterion: str) -> None:
    check(CASES[name], criterion)
