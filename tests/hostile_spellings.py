"""Models that are hard to prune: the many ways to write one thing."""

# mypy: disable-error-code="arg-type, attr-defined, call-arg, func-returns-value, operator"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.channel_cases import TOKENS, Hostile, X, c3, image, linear, net


def dense_by_name(self: Any, x: Tensor) -> Tensor:
    found = {}
    for number, layer in enumerate(self.ls):
        x = F.relu(layer(x))
        found[f"f{number}"] = x
        if number == 1:
            x = torch.cat([found["f0"], x], 1)
    return self.o(torch.cat(list(found.values()), 1))


def all_in_place(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    y += self.b(x)
    y *= 2
    y.relu_()
    y.clamp_(max=3)
    y -= 0.1
    return self.o(y)


def halves_in_place(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    y[:, :4] += 1
    y[:, 4:].mul_(2)
    return self.o(y)


MODELS = {
    "cat of chunk": Hostile(
        lambda: net(lambda self, x: self.o(torch.cat(self.a(x).chunk(2, 1), 1)), a=c3(3, 8), o=c3(8, 3))
    ),
    "cat of reversed split": Hostile(
        lambda: net(lambda self, x: self.o(torch.cat(self.a(x).tensor_split(3, 1)[::-1], 1)), a=c3(3, 8), o=c3(8, 3))
    ),
    "stack of chunk sum": Hostile(
        lambda: net(lambda self, x: self.o(torch.stack(self.a(x).chunk(2, 1)).sum(0)), a=c3(3, 8), o=c3(4, 3))
    ),
    "stack of unbind": Hostile(
        lambda: net(lambda self, x: self.o(torch.stack(self.a(x).unbind(1), 1)), a=c3(3, 8), o=c3(8, 3)),
        frozen="one index is picked at unbind[0]",
    ),
    "cat of getitem slices of list": Hostile(
        lambda: net(lambda self, x: self.o(torch.cat(self.a(x).split(2, 1)[1:], 1)), a=c3(3, 8), o=c3(6, 3))
    ),
    "sum of chunk": Hostile(lambda: net(lambda self, x: self.o(sum(self.a(x).chunk(2, 1)[0:2])), a=c3(3, 8), o=c3(4, 3))),
    "cat positional keyword": Hostile(
        lambda: net(
            lambda self, x: self.o(torch.cat(tensors=(self.a(x), self.b(x)), dim=1)), a=c3(3, 8), b=c3(3, 4), o=c3(12, 3)
        )
    ),
    "concat axis alias": Hostile(
        lambda: net(lambda self, x: self.o(torch.cat([self.a(x), self.b(x)], axis=1)), a=c3(3, 8), b=c3(3, 4), o=c3(12, 3))
    ),
    "mean axis alias": Hostile(
        lambda: net(
            lambda self, x: self.o(self.a(x).mean(axis=(2, 3)).sum(axis=0, keepdims=True)), a=c3(3, 8), o=linear(8, 3)
        ),
        X,
        [],
    ),
    "amax by axis": Hostile(
        lambda: net(lambda self, x: self.o(self.a(x).amax(axis=1, keepdim=True)), a=c3(3, 8), o=c3(1, 3))
    ),
    "squeeze unsqueeze kw": Hostile(
        lambda: net(
            lambda self, x: self.o(
                torch.transpose(self.a(x), dim0=1, dim1=2)
                .flatten(start_dim=1, end_dim=2)
                .unsqueeze(dim=1)
                .squeeze(dim=1)
                .mean(-1)
            ),
            a=c3(3, 8),
            o=linear(80, 3),
        ),
        X,
        [(image(batch=3),)],
    ),
    "permute tuple & list & kw": Hostile(
        lambda: net(lambda self, x: self.o(torch.permute(self.a(x), dims=[0, 2, 3, 1])), a=c3(3, 8), o=linear(8, 3))
    ),
    "reshape kw": Hostile(
        lambda: net(lambda self, x: self.o(torch.reshape(self.a(x), shape=(2, -1))), a=c3(3, 8), o=linear(800, 3)), X, []
    ),
    "view shape tuple concat": Hostile(
        lambda: net(
            lambda self, x: (lambda y: self.o(y.view((*y.shape[:2], -1)).mean(-1)))(self.a(x)), a=c3(3, 8), o=linear(8, 3)
        )
    ),
    "view *shape": Hostile(
        lambda: net(
            lambda self, x: (lambda y: self.o(y.view(*y.shape[:1], -1)))(F.adaptive_avg_pool2d(self.a(x), 2)),
            a=c3(3, 8),
            o=linear(32, 3),
        )
    ),
    "roll kw / flip list": Hostile(
        lambda: net(lambda self, x: self.o(torch.roll(self.a(x), shifts=3, dims=1).flip([1])), a=c3(3, 8), o=c3(8, 3))
    ),
    "chunk kw negative dim": Hostile(
        lambda: net(
            lambda self, x: (lambda p: self.o(p[0] * p[1].sigmoid()))(torch.chunk(self.a(x), chunks=2, dim=-1)),
            a=linear(6, 8),
            o=linear(4, 3),
        ),
        *TOKENS,
    ),
    "split kw": Hostile(
        lambda: net(
            lambda self, x: (lambda p: self.o(p[0] + p[1]))(torch.split(self.a(x), split_size_or_sections=4, dim=-1)),
            a=linear(6, 8),
            o=linear(4, 3),
        ),
        *TOKENS,
    ),
    "index_select kw": Hostile(
        lambda: net(
            lambda self, x: self.o(torch.index_select(self.a(x), dim=1, index=self.i)),
            a=c3(3, 8),
            i=torch.tensor([0, 3, 5]),
            o=c3(3, 3),
        )
    ),
    "narrow kw / select kw": Hostile(
        lambda: net(
            lambda self, x: self.o(
                torch.narrow(self.a(x), dim=1, start=2, length=4) + self.a(x).select(dim=1, index=3).unsqueeze(1)
            ),
            a=c3(3, 8),
            o=c3(4, 3),
        )
    ),
    "pad kw": Hostile(
        lambda: net(lambda self, x: self.o(F.pad(input=self.a(x), pad=(0, 0, 0, 0, 1, 0))), a=c3(3, 8), o=c3(9, 3))
    ),
    "linear kw weight": Hostile(
        lambda: net(
            lambda self, x: self.o(F.linear(input=self.a(x), weight=self.w, bias=None)),
            a=linear(6, 8),
            w=nn.Parameter(torch.randn(5, 8)),
            o=linear(5, 3),
        ),
        *TOKENS,
    ),
    "repeat tuple": Hostile(lambda: net(lambda self, x: self.o(self.a(x).repeat((1, 2, 1, 1))), a=c3(3, 8), o=c3(16, 3))),
    "tile short": Hostile(
        lambda: net(lambda self, x: self.o(torch.tile(self.a(x), (2,))), a=linear(6, 8), o=linear(16, 3)), *TOKENS
    ),
    "unflatten module/kw": Hostile(
        lambda: net(
            lambda self, x: self.o(torch.unflatten(self.a(x), dim=-1, sizes=(2, -1)).sum(-2)), a=linear(6, 8), o=linear(4, 3)
        ),
        *TOKENS,
    ),
    "movedim kw swapaxes": Hostile(
        lambda: net(
            lambda self, x: self.o(torch.movedim(self.a(x), source=1, destination=-1).swapaxes(1, 2)),
            a=c3(3, 8),
            o=linear(8, 3),
        )
    ),
    "leading view -1 batch merge": Hostile(
        lambda: net(
            lambda self, x: self.o(F.relu(self.a(x)).view(-1, 8)).view(x.shape[0], -1, 3), a=linear(6, 8), o=linear(8, 3)
        ),
        *TOKENS,
    ),
    "leading reshape to 2d and bn": Hostile(
        lambda: net(
            lambda self, x: self.o(self.n(self.a(x).reshape(-1, self.a.out_features)).reshape(x.shape[0], x.shape[1], -1)),
            a=linear(6, 8),
            n=nn.BatchNorm1d(8),
            o=linear(8, 3),
        ),
        *TOKENS,
    ),
    "attr out_channels used in view": Hostile(
        lambda: net(
            lambda self, x: self.o(self.a(x).view(x.shape[0], self.a.out_channels, -1).mean(2)), a=c3(3, 8), o=linear(8, 3)
        )
    ),
    "len & enumerate layers w/ skip dict": Hostile(
        lambda: net(dense_by_name, ls=nn.ModuleList([c3(3, 6), c3(6, 6), c3(12, 6)]), o=c3(18, 3))
    ),
    "inplace chain": Hostile(lambda: net(all_in_place, a=c3(3, 8), b=c3(3, 8), o=c3(8, 3))),
    "inplace on view": Hostile(lambda: net(halves_in_place, a=c3(3, 8), o=c3(8, 3))),
    "shared relu / bn reuse": Hostile(
        lambda: (lambda r, b: nn.Sequential(c3(3, 8), b, r, c3(8, 8), b, r, c3(8, 3)))(nn.ReLU(), nn.BatchNorm2d(8))
    ),
    "bias-only layer param": Hostile(
        lambda: net(
            lambda self, x: self.o(F.relu(self.a(x) + self.b[:, None, None])),
            a=c3(3, 8, bias=False),
            b=nn.Parameter(torch.randn(8)),
            o=c3(8, 3),
        )
    ),
    "parameter outer broadcast": Hostile(
        lambda: net(
            lambda self, x: self.o(self.a(x) * (self.p[:, None] * self.q[None, :]).reshape(-1)),
            a=linear(6, 8),
            p=nn.Parameter(torch.randn(2)),
            q=nn.Parameter(torch.randn(4)),
            o=linear(8, 3),
        ),
        *TOKENS,
        frozen="meets a value of fixed size at mul_1",
    ),
    "kron weights": Hostile(
        lambda: net(
            lambda self, x: self.o(F.linear(self.a(x), torch.kron(self.p, self.q))),
            a=linear(6, 8),
            p=nn.Parameter(torch.randn(2, 2)),
            q=nn.Parameter(torch.randn(3, 4)),
            o=linear(6, 3),
        ),
        *TOKENS,
        frozen="kron has no rule",
    ),
    "cat of weights": Hostile(
        lambda: net(
            lambda self, x: self.o(F.linear(self.a(x), torch.cat([self.p, self.q], 0))),
            a=linear(6, 8),
            p=nn.Parameter(torch.randn(2, 8)),
            q=nn.Parameter(torch.randn(3, 8)),
            o=linear(5, 3),
        ),
        *TOKENS,
    ),
}
