"""Models that are hard to prune: weights that are shared, computed, masked, hooked or nobody's layer."""

# mypy: disable-error-code="arg-type, attr-defined, func-returns-value, operator"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.channel_cases import TOKENS, Hostile, X, c3, linear, net


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
}
