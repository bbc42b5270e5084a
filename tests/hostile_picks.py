"""Models that are hard to prune: entries picked by index, by mask or by data, and written over."""

# mypy: disable-error-code="arg-type, attr-defined, func-returns-value, operator"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.channel_cases import TOKENS, Hostile, T, X, c3, image, linear, net


def a_constant_mask(self: Any, x: Tensor) -> Tensor:
    mask = x.new_zeros((10, 10))
    mask[:5, :5] = 1.0
    mask[5:, 5:] = 2.0
    return self.b(self.a(x) + mask)


def halves_swapped(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    z = torch.zeros_like(y)
    z[:, :4] = y[:, 4:]
    z[:, 4:] = y[:, :4]
    return self.b(z)


def a_row_of_zeros(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    y[:, :, 0] = 0.0
    return self.b(F.relu(y))


def a_channel_of_ones(self: Any, x: Tensor) -> Tensor:
    y = self.a(x).clone()
    y[:, 3] = 1.0
    return self.b(y)


def zeros_by_mask(self: Any, x: Tensor) -> Tensor:
    y = self.a(x).clone()
    y[y < 0] = 0.0
    return self.b(y)


def filled(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    y[:, :, 0].zero_()
    y[..., 0].fill_(0.5)
    return self.o(y)


def unpooled(self: Any, x: Tensor) -> Tensor:
    y, indices = self.p(F.relu(self.a(x)))
    return self.o(self.u(self.b(y), indices))


MODELS = {
    "gather channels const": Hostile(
        lambda: net(
            lambda self, x: self.b(
                torch.gather(F.relu(self.a(x)), 1, self.idx.view(1, -1, 1, 1).expand(x.shape[0], -1, x.shape[2], x.shape[3]))
            ),
            a=c3(3, 8),
            b=c3(4, 5),
            idx=torch.tensor([1, 3, 5, 6]),
        ),
        frozen="it is indexed by data at gather",
    ),
    "gather space": Hostile(
        lambda: net(
            lambda self, x: self.b(
                torch.gather(F.relu(self.a(x)).flatten(2), 2, self.idx.view(1, 1, -1).expand(x.shape[0], 8, -1)).mean(2)
            ),
            a=c3(3, 8),
            b=linear(8, 5),
            idx=torch.tensor([1, 3, 5, 6]),
        )
    ),
    "take_along tokens by data": Hostile(
        lambda: net(
            lambda self, x: (lambda h, s: self.b(torch.gather(h, 1, s.argsort(1)[:, :3, None].expand(-1, -1, 8))))(
                F.relu(self.a(x)), x[..., 0]
            ),
            a=linear(6, 8),
            b=linear(8, 5),
        ),
        *TOKENS,
    ),
    "index_select data tokens": Hostile(
        lambda: net(
            lambda self, x: self.b(torch.index_select(self.a(x), 1, torch.tensor([0, 2]))), a=linear(6, 8), b=linear(8, 5)
        ),
        *TOKENS,
    ),
    "setitem constant mask": Hostile(lambda: net(a_constant_mask, a=c3(3, 8), b=c3(8, 5)), X, [(image(batch=3),)]),
    "setitem swap halves": Hostile(lambda: net(halves_swapped, a=c3(3, 8), b=c3(8, 5))),
    "setitem space zero": Hostile(lambda: net(a_row_of_zeros, a=c3(3, 8), b=c3(8, 5))),
    "setitem one channel": Hostile(
        lambda: net(a_channel_of_ones, a=c3(3, 8), b=c3(8, 5)), frozen="no form of its numbers is proved right"
    ),
    "setitem by mask": Hostile(lambda: net(zeros_by_mask, a=c3(3, 8), b=c3(8, 5))),
    "channel argmax hard gate": Hostile(
        lambda: net(
            lambda self, x: (lambda y: self.b(y * F.one_hot(y.argmax(1), 8).permute(0, 3, 1, 2)))(self.a(x)),
            a=c3(3, 8),
            b=c3(8, 3),
        ),
        frozen="order matters at argmax",
    ),
    "sort channels": Hostile(
        lambda: net(lambda self, x: self.b(self.a(x).sort(1)[0]), a=c3(3, 8), b=c3(8, 3)), frozen="order matters at sort"
    ),
    "masked_fill gate by data": Hostile(
        lambda: net(lambda self, x: (lambda y: self.b(y.masked_fill(y > 1, 0.5)))(self.a(x)), a=c3(3, 8), b=c3(8, 3))
    ),
    "where with channel buffer": Hostile(
        lambda: net(
            lambda self, x: self.b(torch.where(self.m, self.a(x), self.c(x))),
            a=c3(3, 8),
            c=c3(3, 8),
            m=(torch.arange(8) % 2 == 0).view(1, 8, 1, 1),
            b=c3(8, 3),
        ),
        statistics=True,
    ),
    "scatter add": Hostile(
        lambda: net(
            lambda self, x: self.b(
                torch.zeros(x.shape[0], 4, 8, dtype=x.dtype).scatter_add(
                    1, self.i.view(1, 7, 1).expand(x.shape[0], 7, 8), self.a(x)
                )
            ),
            a=linear(6, 8),
            i=torch.tensor([0, 1, 2, 3, 0, 1, 2]),
            b=linear(8, 3),
        ),
        T,
        [],
    ),
    "index_add": Hostile(
        lambda: net(
            lambda self, x: self.b(torch.zeros(x.shape[0], 4, 8, dtype=x.dtype).index_add(1, self.i, self.a(x))),
            a=linear(6, 8),
            i=torch.tensor([0, 1, 2, 3, 0, 1, 2]),
            b=linear(8, 3),
        ),
        T,
        [],
    ),
    "masked select const": Hostile(
        lambda: net(lambda self, x: self.b(self.a(x)[:, self.m]), a=c3(3, 8), m=torch.arange(8) % 2 == 0, b=c3(4, 3)),
        frozen="picks where a mask says so",
    ),
    "segnet modules": Hostile(
        lambda: net(
            unpooled, a=c3(3, 8), p=nn.MaxPool2d(2, return_indices=True), u=nn.MaxUnpool2d(2), b=c3(8, 8), o=c3(8, 3)
        ),
        X,
        [(image(batch=3),)],
    ),
    "max pool indices F": Hostile(
        lambda: net(
            lambda self, x: (lambda y, i: self.o(F.max_unpool2d(self.b(y), i, 2)))(
                *F.max_pool2d(self.a(x), 2, return_indices=True)
            ),
            a=c3(3, 8),
            b=c3(8, 8),
            o=c3(8, 3),
        ),
        X,
        [(image(batch=3),)],
    ),
    "attribute .values of sort tokens": Hostile(
        lambda: net(lambda self, x: self.o(self.a(x).sort(dim=1).values), a=linear(6, 8), o=linear(8, 3)), *TOKENS
    ),
    "topk tokens values": Hostile(
        lambda: net(lambda self, x: self.o(self.a(x).topk(2, dim=1)[0]), a=linear(6, 8), o=linear(8, 3)), *TOKENS
    ),
    "argsort gather tokens (topk pruning)": Hostile(
        lambda: net(
            lambda self, x: (
                lambda h: self.o(
                    torch.gather(h, 1, self.s(h).squeeze(-1).topk(3, dim=1)[1].unsqueeze(-1).expand(-1, -1, h.shape[-1]))
                )
            )(self.a(x)),
            a=linear(6, 8),
            s=linear(8, 1),
            o=linear(8, 3),
        ),
        *TOKENS,
    ),
    "any mask rows": Hostile(
        lambda: net(lambda self, x: self.o(self.a(x) * (x > 0).any(-1, keepdim=True)), a=linear(6, 8), o=linear(8, 3)),
        *TOKENS,
    ),
    "channel any": Hostile(
        lambda: net(lambda self, x: self.o(self.a(x) * (self.a(x) > 0).any(1, keepdim=True)), a=c3(3, 8), o=c3(8, 3))
    ),
    "fill_ zero_": Hostile(lambda: net(filled, a=c3(3, 8), o=c3(8, 3))),
    "index_copy": Hostile(
        lambda: net(
            lambda self, x: self.o(self.a(x).index_copy(1, torch.tensor([0, 2]), self.b(x[:, :2]))),
            a=linear(6, 8),
            b=linear(6, 8),
            o=linear(8, 3),
        ),
        *TOKENS,
    ),
    "channel dropout by index each separately": Hostile(
        lambda: net(lambda self, x: (lambda y: self.o(y[:, 0:1] + y[:, 1:2] * y[:, 2:3]))(self.a(x)), a=c3(3, 8), o=c3(1, 3))
    ),
}
