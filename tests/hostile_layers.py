"""Models that are hard to prune: layers, parameters, inputs and outputs of all forms."""

# mypy: disable-error-code="arg-type, attr-defined, func-returns-value, operator"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.channel_cases import TOKENS, Hostile, T, X, c3, conv, image, linear, net, tokens


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


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Causal(nn.Conv2d):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        mask = torch.ones_like(self.weight)
        mask[:, :, 1, 2:] = 0
        mask[:, :, 2:] = 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class LowRank(nn.Linear):
    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__(inputs, outputs)
        self.A, self.B = nn.Parameter(torch.randn(rank, inputs)), nn.Parameter(torch.randn(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + (x @ self.A.t() @ self.B.t()) * 0.5


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
    "weight norm param new style conv": Hostile(
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(c3(3, 8)),
            nn.ReLU(),
            nn.utils.parametrizations.weight_norm(c3(8, 5), dim=1),
            nn.ReLU(),
            c3(5, 3),
        ),
        statistics=True,
    ),
    "orthogonal parametrization": Hostile(
        lambda: nn.Sequential(linear(6, 8), nn.ReLU(), nn.utils.parametrizations.orthogonal(linear(8, 8)), linear(8, 3)),
        *TOKENS,
    ),
    "tied encoder decoder linear": Hostile(
        lambda: net(lambda self, x: F.linear(F.relu(self.a(x)), self.a.weight.t()), a=linear(6, 8)), *TOKENS
    ),
    "tied convs same weight object": Hostile(
        lambda: (lambda m: (setattr(m.b, "weight", m.a.weight), m)[1])(
            net(
                lambda self, x: self.c(F.relu(self.b(F.relu(self.a(self.s(x)))))),
                s=c3(3, 8),
                a=c3(8, 8),
                b=c3(8, 8),
                c=c3(8, 3),
            )
        )
    ),
    "module called thrice different": Hostile(
        lambda: net(lambda self, x: self.h(self.a(x) + self.a(x.flip(2)) * self.a(-x)), a=c3(3, 8), h=c3(8, 3))
    ),
    "recurrent weights loop": Hostile(
        lambda: net(
            lambda self, x: (lambda h: self.o([(h := torch.tanh(self.w(h) + self.u(x[:, i]))) for i in range(4)][-1]))(
                x.new_zeros(x.shape[0], 8)
            ),
            w=linear(8, 8),
            u=linear(6, 8),
            o=linear(8, 3),
        ),
        *TOKENS,
    ),
    "user buffer pos": Hostile(
        lambda: net(
            lambda self, x: self.b(F.relu(self.a(x) + self.pos[:, : x.shape[1]])),
            a=linear(6, 8),
            b=linear(8, 3),
            pos=torch.randn(1, 20, 8),
        ),
        *TOKENS,
    ),
    "user buffer scalar & index": Hostile(
        lambda: net(
            lambda self, x: self.b(F.relu(self.a(x) * self.s)[:, self.i]),
            a=c3(3, 8),
            b=c3(4, 3),
            s=torch.tensor(2.0),
            i=torch.tensor([0, 2, 4, 7]),
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
    "groupnorm groups = channels/2 residual": Hostile(
        lambda: net(
            lambda self, x: (lambda y: self.c(y + F.relu(self.n(self.b(y)))))(self.a(x)),
            a=c3(3, 12),
            b=c3(12, 12),
            n=nn.GroupNorm(6, 12),
            c=c3(12, 3),
        )
    ),
    "GN after cat": Hostile(
        lambda: net(
            lambda self, x: self.c(self.n(torch.cat([self.a(x), self.b(x)], 1))),
            a=c3(3, 6),
            b=c3(3, 6),
            n=nn.GroupNorm(4, 12),
            c=c3(12, 3),
        )
    ),
    "instance norm untracked no affine": Hostile(lambda: nn.Sequential(c3(3, 8), nn.InstanceNorm2d(8), nn.ReLU(), c3(8, 3))),
    "layernorm no affine tokens": Hostile(
        lambda: nn.Sequential(linear(6, 8), nn.LayerNorm(8, elementwise_affine=False), linear(8, 3)), *TOKENS
    ),
    "layernorm bias False": Hostile(lambda: nn.Sequential(linear(6, 8), nn.LayerNorm(8, bias=False), linear(8, 3)), *TOKENS),
    "rms via rsqrt mean pow": Hostile(
        lambda: net(
            lambda self, x: (lambda h: self.b(h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-06) * self.g))(self.a(x)),
            a=linear(6, 8),
            b=linear(8, 3),
            g=nn.Parameter(torch.ones(8)),
        ),
        *TOKENS,
    ),
    "reflect pad then conv": Hostile(lambda: nn.Sequential(c3(3, 8), nn.ReflectionPad2d(1), conv(8, 3, 3))),
    "circular pad conv": Hostile(
        lambda: nn.Sequential(c3(3, 8, padding_mode="circular"), nn.ReLU(), c3(8, 3, padding_mode="reflect"))
    ),
    "embedding of ints + pos + tied head": Hostile(
        lambda: (lambda m: (setattr(m.h, "weight", m.e.weight), m)[1])(
            net(
                lambda self, i: self.h(F.relu(self.l(self.e(i) + self.p(torch.arange(i.shape[1]))))),
                e=nn.Embedding(11, 8),
                p=nn.Embedding(9, 8),
                l=linear(8, 8),
                h=linear(8, 11),
            )
        ),
        (torch.randint(0, 11, (2, 5)),),
        [],
    ),
    "embedding padding idx": Hostile(
        lambda: net(lambda self, i: self.h(self.e(i).mean(1)), e=nn.Embedding(11, 8, padding_idx=0), h=linear(8, 3)),
        (torch.randint(0, 11, (2, 5)),),
        [],
    ),
    "embedding max_norm": Hostile(
        lambda: net(lambda self, i: self.h(self.e(i).mean(1)), e=nn.Embedding(11, 8, max_norm=1.0), h=linear(8, 3)),
        (torch.randint(0, 11, (2, 5)),),
        [],
        frozen="the length of its entries is bounded at e",
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
    "conv weight standardised": Hostile(
        lambda: net(
            lambda self, x: self.b(
                F.relu(
                    F.conv2d(
                        x,
                        (self.w - self.w.mean((1, 2, 3), keepdim=True)) / (self.w.std((1, 2, 3), keepdim=True) + 1e-05),
                        padding=1,
                    )
                )
            ),
            w=nn.Parameter(torch.randn(8, 3, 3, 3)),
            b=c3(8, 3),
        )
    ),
    "conv subclass WS": Hostile(
        lambda: nn.Sequential(
            Standardised(3, 8, 3, padding=1), nn.ReLU(), Standardised(8, 6, 3, padding=1), nn.ReLU(), c3(6, 3)
        ),
        statistics=True,
    ),
    "masked conv subclass": Hostile(
        lambda: nn.Sequential(Causal(3, 8, 3, padding=1), nn.ReLU(), Causal(8, 6, 3, padding=1), nn.ReLU(), c3(6, 3))
    ),
    "lora linear": Hostile(lambda: nn.Sequential(LowRank(6, 8), nn.GELU(), LowRank(8, 8), nn.ReLU(), linear(8, 3)), *TOKENS),
    "dyn conv kernels from data": Hostile(
        lambda: net(
            lambda self, x: self.o(
                F.conv2d(
                    self.a(x).reshape(1, -1, *x.shape[2:]),
                    self.k(x.mean((2, 3))).view(-1, 1, 3, 3),
                    padding=1,
                    groups=8 * x.shape[0],
                ).view(x.shape[0], 8, *x.shape[2:])
            ),
            a=c3(3, 8),
            k=linear(3, 72),
            o=c3(8, 3),
        ),
        X,
        [],
        frozen="no form of its numbers is proved right",
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
    "hook user conv forward hook": Hostile(
        lambda: (lambda m: (m[0].register_forward_hook(lambda mod, i, o: o * 2), m)[1])(
            nn.Sequential(c3(3, 8), nn.ReLU(), c3(8, 3))
        ),
    ),
    "pre hook": Hostile(
        lambda: (lambda m: (m[2].register_forward_pre_hook(lambda mod, i: (i[0] + 1,)), m)[1])(
            nn.Sequential(c3(3, 8), nn.ReLU(), c3(8, 3))
        ),
    ),
    "ParameterList": Hostile(
        lambda: net(
            lambda self, x: F.linear(F.relu(F.linear(x, self.p[0], self.p[1])), self.p[2]),
            p=nn.ParameterList([torch.randn(8, 6), torch.randn(8), torch.randn(3, 8)]),
        ),
        *TOKENS,
    ),
    "ParameterDict": Hostile(
        lambda: net(
            lambda self, x: F.relu(x @ self.p["a"] + self.p["b"]) @ self.p["c"],
            p=nn.ParameterDict({"a": torch.randn(6, 8), "b": torch.randn(8), "c": torch.randn(8, 3)}),
        ),
        *TOKENS,
    ),
    "fused big parameter sliced": Hostile(
        lambda: net(
            lambda self, x: F.linear(F.relu(F.linear(x, self.w[:8, :6])), self.w[8:, :]), w=nn.Parameter(torch.randn(11, 8))
        ),
        *TOKENS,
    ),
    "weights chunked qkv": Hostile(
        lambda: net(
            lambda self, x: (
                lambda q, k, v: self.o(F.scaled_dot_product_attention(F.linear(x, q), F.linear(x, k), F.linear(x, v)))
            )(*self.w.chunk(3, 0)),
            w=nn.Parameter(torch.randn(24, 6)),
            o=linear(8, 3),
        ),
        *TOKENS,
    ),
    "hypernet": Hostile(
        lambda: net(
            lambda self, x: self.o(F.linear(x, self.g(self.z).view(8, 6))),
            g=linear(4, 48),
            z=nn.Parameter(torch.randn(4)),
            o=linear(8, 3),
        ),
        *TOKENS,
    ),
    "conv bias from other module": Hostile(
        lambda: net(
            lambda self, x: self.o(F.conv2d(x, self.a.weight, self.b.weight[0], padding=1)),
            a=c3(3, 8, bias=False),
            b=linear(8, 1),
            o=c3(8, 3),
        )
    ),
    "unused params": Hostile(
        lambda: net(
            lambda self, x: self.o(F.relu(self.a(x))), a=c3(3, 8), u=c3(8, 8), o=c3(8, 3), up=nn.Parameter(torch.randn(8))
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
    "LP pooling": Hostile(lambda: net(lambda self, x: self.o(F.lp_pool2d(self.a(x), 2.0, 2)), a=c3(3, 8), o=c3(8, 3))),
    "softmin over channels": Hostile(
        lambda: net(lambda self, x: self.o(F.softmin(self.a(x), 1)), a=c3(3, 8), o=c3(8, 3)), statistics=True
    ),
    "rrelu, hardshrink, softshrink": Hostile(
        lambda: nn.Sequential(c3(3, 8), nn.RReLU(), nn.Hardshrink(), nn.Softshrink(), c3(8, 3))
    ),
    "groupwise softmax heads 2d": Hostile(
        lambda: net(lambda self, x: self.o(self.a(x).unflatten(1, (2, 4)).softmax(2).flatten(1, 2)), a=c3(3, 8), o=c3(8, 3)),
        statistics=True,
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
    "residual scaled by buffer gamma per channel 1d": Hostile(
        lambda: net(
            lambda self, x: (lambda y: self.o(y + self.g * self.b(y)))(self.a(x)),
            a=linear(6, 8),
            b=linear(8, 8),
            g=torch.randn(8),
            o=linear(8, 3),
        ),
        *TOKENS,
    ),
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
    "pow by channel param (GeM)": Hostile(
        lambda: net(
            lambda self, x: self.o(
                F.relu(self.a(x)).clamp(min=1e-06).pow(self.p.view(1, -1, 1, 1)).mean((2, 3)).pow(1 / self.p)
            ),
            a=c3(3, 8),
            p=nn.Parameter(torch.ones(8) * 3),
            o=linear(8, 3),
        )
    ),
    "snake act": Hostile(
        lambda: net(
            lambda self, x: (lambda y: self.o(y + 1 / self.al * torch.sin(self.al * y) ** 2))(self.a(x)),
            a=c3(3, 8),
            al=nn.Parameter(torch.ones(1, 8, 1, 1)),
            o=c3(8, 3),
        ),
        statistics=True,
    ),
    "script function inside": Hostile(lambda: net(lambda self, x: self.o(doubled(self.a(x))), a=c3(3, 8), o=c3(8, 3))),
    "while shape loop": Hostile(lambda: net(halved_until_small, a=c3(3, 8), o=c3(8, 3))),
    "bn eval in train mode flags": Hostile(
        lambda: nn.Sequential(c3(3, 8), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(), c3(8, 3))
    ),
    "conv with padding same & valid": Hostile(
        lambda: nn.Sequential(
            conv(3, 8, 3, padding="same"), nn.ReLU(), conv(8, 6, 3, padding="valid"), nn.ReLU(), conv(6, 3, 1)
        )
    ),
    "x.data": Hostile(
        lambda: net(lambda self, x: self.o(self.a(x).data * self.a(x)), a=linear(6, 8), o=linear(8, 3)), *TOKENS
    ),
    "softmax2d": Hostile(lambda: nn.Sequential(c3(3, 8), nn.Softmax2d(), c3(8, 3))),
    "circular pad module 1d": Hostile(
        lambda: nn.Sequential(nn.Conv1d(7, 8, 1), nn.CircularPad1d(1), nn.ReplicationPad1d(1), nn.Conv1d(8, 3, 3)),
        T,
        [(tokens(batch=3),)],
    ),
    "blur pool buffer full": Hostile(
        lambda: net(
            lambda self, x: self.o(F.conv2d(self.a(x), self.k, padding=1, groups=8, stride=2)),
            a=c3(3, 8),
            k=torch.rand(8, 1, 3, 3),
            o=c3(8, 3),
        )
    ),
    "grouped F.conv2d param": Hostile(
        lambda: net(
            lambda self, x: self.o(F.conv2d(self.a(x), self.k, self.kb, padding=1, groups=2)),
            a=c3(3, 8),
            k=nn.Parameter(torch.rand(6, 4, 3, 3)),
            kb=nn.Parameter(torch.rand(6)),
            o=c3(6, 3),
        )
    ),
    "relu6 clamp hardtanh": Hostile(lambda: nn.Sequential(c3(3, 8), nn.Hardtanh(0.5, 2.0), c3(8, 3))),
    "bn momentum None bn no stats 1d 3d": Hostile(
        lambda: nn.Sequential(nn.Conv3d(2, 8, 2), nn.BatchNorm3d(8, momentum=None), nn.ReLU(), nn.Conv3d(8, 3, 1)),
        (torch.randn(2, 2, 3, 3, 3, dtype=torch.float64),),
        [],
    ),
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
    "layernorm over (C,H,W) literal": Hostile(
        lambda: nn.Sequential(c3(3, 8), nn.LayerNorm([8, 10, 10]), nn.ReLU(), c3(8, 3)), X, [(image(batch=3),)]
    ),
    "F.layer_norm by shape": Hostile(
        lambda: net(
            lambda self, x: (lambda y: self.o(F.layer_norm(y, y.shape[-1:])))(self.a(x)), a=linear(6, 8), o=linear(8, 3)
        ),
        *TOKENS,
    ),
    "F.layer_norm literal no weight": Hostile(
        lambda: net(lambda self, x: self.o(F.layer_norm(self.a(x), (8,))), a=linear(6, 8), o=linear(8, 3)), *TOKENS
    ),
    "F.group_norm literal": Hostile(
        lambda: net(
            lambda self, x: self.o(F.group_norm(self.a(x), 2, self.g, self.b)),
            a=c3(3, 8),
            g=nn.Parameter(torch.rand(8)),
            b=nn.Parameter(torch.rand(8)),
            o=c3(8, 3),
        )
    ),
    "F.batch_norm buffers": Hostile(
        lambda: net(
            lambda self, x: self.o(F.batch_norm(self.a(x), self.m, self.running_var)),
            a=c3(3, 8),
            m=torch.rand(8),
            running_var=torch.rand(8) + 1,
            o=c3(8, 3),
        )
    ),
    "GroupNorm whole groups after grouped conv": Hostile(
        lambda: nn.Sequential(c3(3, 8), c3(8, 8, groups=4), nn.GroupNorm(4, 8), nn.ReLU(), c3(8, 3))
    ),
    "GroupNorm over heads": Hostile(
        lambda: net(
            lambda self, x: self.o(
                self.n(
                    F.scaled_dot_product_attention(
                        *(f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
                    )
                    .transpose(1, 2)
                    .flatten(0, 1)
                    .flatten(1)
                ).unflatten(0, (x.shape[0], -1))
            ),
            q=linear(6, 8),
            k=linear(6, 8),
            v=linear(6, 8),
            n=nn.GroupNorm(2, 8),
            o=linear(8, 3),
        ),
        *TOKENS,
    ),
}
