"""Models that are hard to prune: layers, inputs and outputs of all forms."""

# mypy: disable-error-code="arg-type, attr-defined, func-returns-value, operator"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.channel_cases import TOKENS, Hostile, T, c3, conv, image, linear, net, tokens


class Pair(NamedTuple):
    a: Tensor
    b: int


def halved_until_small(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    while y.shape[-1] > 3:
        y = F.max_pool2d(y, 2)
    return self.o(y)


def doubled(y: Tensor) -> Tensor:
    return F.relu(y) * 2


def with_or_without(self: Any, x: Tensor, y: Tensor | None = None) -> Tensor:
    z = self.a(x)
    if y is not None:
        z = z + self.b(y)
    return self.o(z)


def averaged(self: Any, x: Tensor) -> Tensor:
    """A running mean of the channels, also in eval mode, by a chain of writes."""
    y = self.a(x)
    self.mean.mul_(0.9).add_(y.mean((0, 2, 3)).detach(), alpha=0.1)
    return self.o(y - self.mean[None, :, None, None])


MODELS = {
    "shuffle then grouped": Hostile(
        lambda: nn.Sequential(
            c3(3, 12),
            nn.ChannelShuffle(3),
            c3(12, 12, groups=3),
            nn.ReLU(),
            nn.ChannelShuffle(2),
            c3(12, 8, groups=2),
            nn.ReLU(),
            c3(8, 3),
        )
    ),
    "grouped 4 after cat of 3 and 5": Hostile(
        lambda: net(
            lambda self, x: self.d(F.relu(self.c(torch.cat([self.a(x), self.b(x)], 1)))),
            a=c3(3, 3),
            b=c3(3, 5),
            c=c3(8, 8, groups=4),
            d=c3(8, 3),
        )
    ),
    "convT groups 2 then dw": Hostile(
        lambda: nn.Sequential(
            c3(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 12, 2, 2, groups=2), nn.ReLU(), c3(12, 12, groups=12), c3(12, 4)
        )
    ),
    "conv multiplier 3 then bn": Hostile(
        lambda: nn.Sequential(c3(3, 6), nn.ReLU(), c3(6, 18, groups=6), nn.BatchNorm2d(18), nn.ReLU6(), conv(18, 4, 1))
    ),
    "mobile block residual": Hostile(
        lambda: net(
            lambda self, x: (lambda y: self.h(y + self.p(F.relu6(self.d(F.relu6(self.e(y)))))))(self.s(x)),
            s=c3(3, 8),
            e=conv(8, 16, 1),
            d=c3(16, 16, groups=16),
            p=conv(16, 8, 1),
            h=c3(8, 3),
        )
    ),
    "dict out": Hostile(
        lambda: net(lambda self, x: {"a": self.b(F.relu(self.a(x))), "n": 3, "z": None}, a=c3(3, 8), b=c3(8, 3))
    ),
    "list nested out": Hostile(
        lambda: net(lambda self, x: [(y := F.relu(self.a(x))).mean((1, 2, 3)), (self.b(y),)], a=c3(3, 8), b=c3(8, 3))
    ),
    "prelu per channel then dw": Hostile(
        lambda: nn.Sequential(c3(3, 8), nn.PReLU(8), c3(8, 8, groups=8), nn.PReLU(), c3(8, 3))
    ),
    "reflect pad then conv": Hostile(lambda: nn.Sequential(c3(3, 8), nn.ReflectionPad2d(1), conv(8, 3, 3))),
    "circular pad conv": Hostile(
        lambda: nn.Sequential(c3(3, 8, padding_mode="circular"), nn.ReLU(), c3(8, 3, padding_mode="reflect"))
    ),
    "lstm then conv1d": Hostile(
        lambda: net(
            lambda self, x: self.c(self.r(self.a(x))[0].transpose(1, 2)),
            a=linear(6, 8),
            r=nn.LSTM(8, 10, batch_first=True),
            c=nn.Conv1d(10, 4, 1),
        ),
        *TOKENS,
    ),
    "a buffer averaged into": Hostile(lambda: net(averaged, a=c3(3, 8), mean=torch.zeros(8), o=c3(8, 3)), more=[]),
    "gru cell loop": Hostile(
        lambda: net(
            lambda self, x: (lambda h: self.o([(h := self.c(x[:, i], h)) for i in range(4)][-1]))(
                x.new_zeros(x.shape[0], 8)
            ),
            c=nn.GRUCell(6, 8),
            o=linear(8, 3),
        ),
        *TOKENS,
    ),
    "lstm cell loop": Hostile(
        lambda: net(
            lambda self, x: (lambda h: self.o([(h := self.c(x[:, i], h)) for i in range(4)][-1][0]))(
                (x.new_zeros(x.shape[0], 8), x.new_zeros(x.shape[0], 8))
            ),
            c=nn.LSTMCell(6, 8),
            o=linear(8, 3),
        ),
        *TOKENS,
    ),
    "rnn one hidden to next lstm": Hostile(
        lambda: net(
            lambda self, x: self.h(self.b(self.a(x)[0])[0]),
            a=nn.GRU(6, 8, batch_first=True, bidirectional=True),
            b=nn.LSTM(16, 6, batch_first=True),
            h=linear(6, 3),
        ),
        *TOKENS,
    ),
    "stochastic depth & dropout2d": Hostile(
        lambda: net(
            lambda self, x: (lambda y: self.c(y + self.d(F.relu(self.b(y)))))(self.a(x)),
            a=c3(3, 8),
            b=c3(8, 8),
            d=nn.Dropout2d(0.5),
            c=c3(8, 3),
        )
    ),
    "interleaved stereo conv reuse different channel": Hostile(
        lambda: net(
            lambda self, x: self.o(torch.cat([self.s(self.a(x)), self.s(self.b(x))], 1)),
            a=c3(3, 8),
            b=c3(3, 8),
            s=c3(8, 4),
            o=c3(8, 3),
        )
    ),
    "rrelu, hardshrink, softshrink": Hostile(
        lambda: nn.Sequential(c3(3, 8), nn.RReLU(), nn.Hardshrink(), nn.Softshrink(), c3(8, 3))
    ),
    "multi input list": Hostile(
        lambda: net(lambda self, xs: self.o(self.a(xs[0]) + self.b(xs[1])), a=c3(3, 8), b=c3(3, 8), o=c3(8, 3)),
        ([image(), image(seed=1)],),
        [],
    ),
    "empty branch zero channels": Hostile(
        lambda: net(lambda self, x: self.o(torch.cat([self.a(x), x[:, :0]], 1)), a=c3(3, 8), o=c3(8, 3))
    ),
    "one channel layer": Hostile(lambda: nn.Sequential(c3(3, 1), nn.ReLU(), c3(1, 8), nn.ReLU(), c3(8, 3))),
    "no_grad & detach": Hostile(
        lambda: net(lambda self, x: self.o(self.a(x) * torch.sigmoid(self.a(x)).detach()), a=linear(6, 8), o=linear(8, 3)),
        *TOKENS,
    ),
    "baddbmm": Hostile(
        lambda: net(
            lambda self, x: self.o(torch.baddbmm(self.b, self.a(x), self.w.expand(x.shape[0], -1, -1))),
            a=linear(6, 8),
            b=nn.Parameter(torch.randn(1, 1, 5)),
            w=nn.Parameter(torch.randn(1, 8, 5)),
            o=linear(5, 3),
        ),
        *TOKENS,
    ),
    "addmm beta alpha": Hostile(
        lambda: net(
            lambda self, x: self.o(torch.addmm(self.b, self.a(x).flatten(0, 1), self.w, beta=0.5, alpha=2.0)),
            a=linear(6, 8),
            b=nn.Parameter(torch.randn(5)),
            w=nn.Parameter(torch.randn(8, 5)),
            o=linear(5, 3),
        ),
        *TOKENS,
    ),
    "script function inside": Hostile(lambda: net(lambda self, x: self.o(doubled(self.a(x))), a=c3(3, 8), o=c3(8, 3))),
    "while shape loop": Hostile(lambda: net(halved_until_small, a=c3(3, 8), o=c3(8, 3))),
    "conv with padding same & valid": Hostile(
        lambda: nn.Sequential(
            conv(3, 8, 3, padding="same"), nn.ReLU(), conv(8, 6, 3, padding="valid"), nn.ReLU(), conv(6, 3, 1)
        )
    ),
    "x.data": Hostile(
        lambda: net(lambda self, x: self.o(self.a(x).data * self.a(x)), a=linear(6, 8), o=linear(8, 3)), *TOKENS
    ),
    "circular pad module 1d": Hostile(
        lambda: nn.Sequential(nn.Conv1d(7, 8, 1), nn.CircularPad1d(1), nn.ReplicationPad1d(1), nn.Conv1d(8, 3, 3)),
        T,
        [(tokens(batch=3),)],
    ),
    "relu6 clamp hardtanh": Hostile(lambda: nn.Sequential(c3(3, 8), nn.Hardtanh(0.5, 2.0), c3(8, 3))),
    "sequential in moduledict": Hostile(
        lambda: net(lambda self, x: self.d["o"](F.relu(self.d["a"](x))), d=nn.ModuleDict({"a": c3(3, 8), "o": c3(8, 3)}))
    ),
    "optional second input None": Hostile(lambda: net(with_or_without, a=c3(3, 8), b=c3(3, 8), o=c3(8, 3))),
    "kwargs only dict input": Hostile(
        lambda: net(lambda self, d: self.o(F.relu(self.a(d["x"]))), a=c3(3, 8), o=c3(8, 3)), ({"x": image()},), []
    ),
    "namedtuple output": Hostile(
        lambda: net(lambda self, x: Pair(self.o(F.relu(self.a(x))), x.shape[0]), a=c3(3, 8), o=c3(8, 3))
    ),
}
