"""Models that are hard to prune: values moved, written over, picked, counted."""

# mypy: disable-error-code="arg-type, attr-defined, func-returns-value, operator"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.channel_cases import TOKENS, Hostile, T, X, c3, conv, image, linear, net, tokens


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
    "unfold tensor method": Hostile(
        lambda: net(
            lambda self, x: self.b(self.a(x).unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).mean(4)), a=c3(3, 8), b=c3(8, 5)
        ),
        X,
        [],
    ),
    "F.unfold then linear": Hostile(
        lambda: net(lambda self, x: self.b(F.unfold(self.a(x), 2, stride=2).transpose(1, 2)), a=c3(3, 8), b=linear(32, 5))
    ),
    "nn.Unfold attention conv": Hostile(
        lambda: net(
            lambda self, x: self.c(
                (
                    F.unfold(self.a(x), 3, padding=1).view(x.shape[0], 8, 9, x.shape[2], x.shape[3]) * self.k(x).unsqueeze(1)
                ).sum(2)
            ),
            a=c3(3, 8),
            k=c3(3, 9),
            c=c3(8, 4),
        )
    ),
    "fold overlap": Hostile(
        lambda: net(lambda self, x: self.b(F.fold(self.a(x).flatten(2), (11, 11), 2)), a=c3(3, 8), b=c3(2, 5)), X, []
    ),
    "setitem constant mask": Hostile(lambda: net(a_constant_mask, a=c3(3, 8), b=c3(8, 5)), X, [(image(batch=3),)]),
    "setitem swap halves": Hostile(lambda: net(halves_swapped, a=c3(3, 8), b=c3(8, 5))),
    "setitem space zero": Hostile(lambda: net(a_row_of_zeros, a=c3(3, 8), b=c3(8, 5))),
    "setitem one channel": Hostile(
        lambda: net(a_channel_of_ones, a=c3(3, 8), b=c3(8, 5)), frozen="no form of its numbers is proved right"
    ),
    "setitem by mask": Hostile(lambda: net(zeros_by_mask, a=c3(3, 8), b=c3(8, 5))),
    "pixelshuffle after groups": Hostile(
        lambda: nn.Sequential(c3(3, 16), nn.ReLU(), c3(16, 16, groups=2), nn.PixelShuffle(2), nn.ReLU(), c3(4, 3))
    ),
    "pixel unshuffle then shuffle": Hostile(
        lambda: nn.Sequential(c3(3, 4), nn.PixelUnshuffle(2), nn.ReLU(), nn.PixelShuffle(2), c3(4, 3)), X, []
    ),
    "flip+roll channels add": Hostile(
        lambda: net(lambda self, x: (lambda y: self.b(y + y.flip(1) + y.roll(2, 1)))(self.a(x)), a=c3(3, 8), b=c3(8, 3))
    ),
    "matmul by parameter left": Hostile(
        lambda: net(
            lambda self, x: self.o(F.relu(self.w @ self.a(x).flatten(2)).mean(2)),
            a=c3(3, 8),
            w=nn.Parameter(torch.randn(6, 8)),
            o=linear(6, 3),
        ),
        statistics=True,
    ),
    "outer product channels": Hostile(
        lambda: net(
            lambda self, x: self.o((self.a(x).mean(1)[:, :, None] * self.b(x).mean(1)[:, None, :]).flatten(1)),
            a=linear(6, 4),
            b=linear(6, 5),
            o=linear(20, 3),
        ),
        *TOKENS,
        frozen="two dimensions are merged at flatten",
    ),
    "bilinear pooling gram": Hostile(
        lambda: net(
            lambda self, x: (lambda f: self.o((f @ f.transpose(1, 2)).flatten(1)))(self.a(x).flatten(2)),
            a=c3(3, 4),
            o=linear(16, 3),
        ),
        frozen="two dimensions are merged at flatten_1",
    ),
    "maxout": Hostile(
        lambda: net(
            lambda self, x: self.b(self.a(x).view(x.shape[0], 4, 2, x.shape[2], x.shape[3]).amax(2)), a=c3(3, 8), b=c3(4, 3)
        ),
        statistics=True,
    ),
    "maxout by max values": Hostile(
        lambda: net(
            lambda self, x: self.b(self.a(x).view(x.shape[0], 4, 2, x.shape[2], x.shape[3]).max(2).values),
            a=c3(3, 8),
            b=c3(4, 3),
        ),
        statistics=True,
    ),
    "max of two": Hostile(
        lambda: net(lambda self, x: self.b(torch.max(self.a(x), self.c(x))), a=c3(3, 8), c=c3(3, 8), b=c3(8, 3))
    ),
    "mfm split max": Hostile(
        lambda: net(lambda self, x: self.b(torch.max(*torch.split(self.a(x), 4, 1))), a=c3(3, 8), b=c3(4, 3))
    ),
    "output also intermediate twice": Hostile(
        lambda: net(lambda self, x: (lambda y: (self.b(y), y.sum(1)))(self.a(x)), a=c3(3, 8), b=c3(8, 3))
    ),
    "output slice of features": Hostile(
        lambda: net(lambda self, x: (lambda y: (self.b(y), y[:, :2]))(self.a(x)), a=c3(3, 8), b=c3(8, 3))
    ),
    "output reduced amax": Hostile(
        lambda: net(
            lambda self, x: (lambda y: (self.b(y), y.flatten(1).topk(3, 1).values))(self.a(x)), a=c3(3, 8), b=c3(8, 3)
        ),
        frozen="order matters at topk",
    ),
    "input used as channel gate": Hostile(
        lambda: net(lambda self, x: (lambda y: self.b(y * x.mean(1, keepdim=True)))(self.a(x)), a=c3(3, 8), b=c3(8, 3))
    ),
    "x repeated to add": Hostile(
        lambda: net(lambda self, x: self.b(self.a(x) + x.repeat(1, 3, 1, 1)[:, :8]), a=c3(3, 8), b=c3(8, 3)),
        frozen="meets a value of fixed size at add",
    ),
    "resnet-A shortcut": Hostile(
        lambda: net(
            lambda self, x: (lambda y: self.c(self.b(y) + F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))))(self.a(x)),
            a=c3(3, 8),
            b=c3(8, 12, stride=2),
            c=c3(12, 3),
        )
    ),
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
    "cumsum channels": Hostile(
        lambda: net(lambda self, x: self.b(self.a(x).cumsum(1)), a=c3(3, 8), b=c3(8, 3)), frozen="order matters at cumsum"
    ),
    "cumsum tokens": Hostile(
        lambda: net(lambda self, x: self.b(self.a(x).cumsum(1)), a=linear(6, 8), b=linear(8, 3)), *TOKENS
    ),
    "logsumexp channels": Hostile(
        lambda: net(lambda self, x: self.b(torch.logsumexp(self.a(x), 1, keepdim=True)), a=c3(3, 8), b=c3(1, 3)),
        statistics=True,
    ),
    "prod channels": Hostile(
        lambda: net(lambda self, x: self.b(torch.prod(self.a(x), 1, keepdim=True)), a=c3(3, 8), b=c3(1, 3)), statistics=True
    ),
    "var_mean": Hostile(
        lambda: net(
            lambda self, x: (lambda v, m: self.b(v + m))(*torch.var_mean(self.a(x), (2, 3))), a=c3(3, 8), b=linear(8, 3)
        )
    ),
    "std over channels": Hostile(
        lambda: net(lambda self, x: self.b(self.a(x).std(1, keepdim=True)), a=c3(3, 8), b=c3(1, 3))
    ),
    "median": Hostile(
        lambda: net(lambda self, x: self.b(self.a(x).flatten(2).median(2).values), a=c3(3, 8), b=linear(8, 3))
    ),
    "outer product by torch.outer": Hostile(
        lambda: net(
            lambda self, x: self.o(torch.outer(self.a(x).mean((0, 1)), self.b(x).mean((0, 1))).flatten()),
            a=linear(6, 4),
            b=linear(6, 5),
            o=linear(20, 3),
        ),
        *TOKENS,
    ),
    "tensordot": Hostile(
        lambda: net(
            lambda self, x: self.o(torch.tensordot(self.a(x), self.w, dims=([2], [1]))),
            a=linear(6, 8),
            w=nn.Parameter(torch.randn(5, 8)),
            o=linear(5, 3),
        ),
        *TOKENS,
    ),
    "view as complex rope": Hostile(
        lambda: net(
            lambda self, x: self.o(
                torch.view_as_real(torch.view_as_complex(self.a(x).unflatten(-1, (4, 2)).contiguous()) * self.f).flatten(-2)
            ),
            a=linear(6, 8),
            f=torch.polar(torch.ones(7, 4), torch.randn(7, 4)).to(torch.complex128),
            o=linear(8, 3),
        ),
        T,
        [],
    ),
    "space to depth by reshape and permute": Hostile(
        lambda: net(
            lambda self, x: self.b(
                self.a(x)
                .reshape(x.shape[0], 8, x.shape[2] // 2, 2, x.shape[3] // 2, 2)
                .permute(0, 1, 3, 5, 2, 4)
                .reshape(x.shape[0], 32, x.shape[2] // 2, x.shape[3] // 2)
            ),
            a=c3(3, 8),
            b=c3(32, 3),
        ),
        X,
        [(image(size=12),)],
    ),
    "depth to space by hand": Hostile(
        lambda: net(
            lambda self, x: self.b(
                self.a(x)
                .reshape(x.shape[0], 2, 2, 2, x.shape[2], x.shape[3])
                .permute(0, 3, 4, 1, 5, 2)
                .reshape(x.shape[0], 2, x.shape[2] * 2, x.shape[3] * 2)
            ),
            a=c3(3, 8),
            b=c3(2, 3),
        )
    ),
    "as_strided": Hostile(
        lambda: net(
            lambda self, x: self.b(torch.as_strided(self.a(x).contiguous(), (2, 4, 10, 10), (800, 200, 10, 1))),
            a=c3(3, 8),
            b=c3(4, 3),
        ),
        X,
        [],
        frozen="as_strided has no rule",
    ),
    "diagonal of a map": Hostile(
        lambda: net(lambda self, x: self.b(torch.diagonal(self.a(x), dim1=2, dim2=3).mean(2)), a=c3(3, 8), b=linear(8, 3))
    ),
    "tril of gram": Hostile(
        lambda: net(
            lambda self, x: (lambda h: self.b(torch.tril(h @ h.transpose(1, 2)) @ h))(self.a(x)),
            a=linear(6, 8),
            b=linear(8, 3),
        ),
        *TOKENS,
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
    "split with remainder": Hostile(
        lambda: net(
            lambda self, x: (lambda p: self.o(torch.cat([p[0], self.m(p[1]), p[2]], 1)))(self.a(x).split(3, 1)),
            a=c3(3, 8),
            m=c3(3, 3),
            o=c3(8, 3),
        )
    ),
    "tensor_split uneven": Hostile(
        lambda: net(
            lambda self, x: (lambda p: self.o(torch.cat([p[2], p[0], p[1]], 1)))(self.a(x).tensor_split(3, 1)),
            a=c3(3, 8),
            o=c3(8, 3),
        )
    ),
    "tensor_split indices": Hostile(
        lambda: net(
            lambda self, x: (lambda p: self.o(p[0] + p[1][:, :3]))(torch.tensor_split(self.a(x), (3,), 1)),
            a=c3(3, 8),
            o=c3(3, 3),
        )
    ),
    "hsplit dsplit": Hostile(
        lambda: net(lambda self, x: (lambda p: self.o(p[0] + p[1]))(torch.hsplit(self.a(x), 2)), a=c3(3, 8), o=c3(4, 3)),
        frozen="hsplit has no rule",
    ),
    "negative step flip via index": Hostile(
        lambda: net(lambda self, x: self.o(self.a(x)[:, [7, 6, 5, 4, 3, 2, 1, 0]]), a=c3(3, 8), o=c3(8, 3))
    ),
    "ellipsis index": Hostile(
        lambda: net(lambda self, x: self.o(self.a(x)[..., 2:6]), a=linear(6, 8), o=linear(4, 3)), *TOKENS
    ),
    "none index": Hostile(
        lambda: net(lambda self, x: self.o(self.a(x)[:, None, :, 1:].squeeze(1)), a=linear(6, 8), o=linear(7, 3)), *TOKENS
    ),
    "double negative slice": Hostile(
        lambda: net(lambda self, x: self.o(self.a(x)[..., -5:-1]), a=linear(6, 8), o=linear(4, 3)), *TOKENS
    ),
    "expand conv groups multi-level shuffle": Hostile(
        lambda: nn.Sequential(
            c3(3, 24), nn.ChannelShuffle(4), nn.ChannelShuffle(3), c3(24, 24, groups=6), nn.ReLU(), c3(24, 3)
        )
    ),
    "batch dim tricks: fold time": Hostile(
        lambda: net(
            lambda self, x: (lambda b: self.o(F.relu(self.a(x.flatten(0, 1))).unflatten(0, (b, -1)).mean(1)))(x.shape[0]),
            a=c3(3, 8),
            o=c3(8, 3),
        ),
        (torch.randn(2, 4, 3, 6, 6, dtype=torch.float64),),
        [(torch.randn(3, 2, 3, 6, 6, dtype=torch.float64),)],
    ),
    "TSM temporal shift": Hostile(
        lambda: net(
            lambda self, x: (
                lambda y: (
                    lambda v: self.o(
                        torch.cat([torch.roll(v[:, :, :2], 1, 1), v[:, :, 2:4].roll(-1, 1), v[:, :, 4:]], 2).flatten(0, 1)
                    )
                )(y.unflatten(0, (-1, 2)))
            )(self.a(x.flatten(0, 1))),
            a=c3(3, 8),
            o=c3(8, 3),
        ),
        (torch.randn(3, 2, 3, 6, 6, dtype=torch.float64),),
        [],
    ),
    "squeeze dim0 batch1": Hostile(
        lambda: net(lambda self, x: self.o(self.a(x).squeeze()), a=linear(6, 8), o=linear(8, 3)), (tokens(batch=1),), []
    ),
    "float int casts": Hostile(
        lambda: net(lambda self, x: self.o(self.a(x).float().double()), a=linear(6, 8), o=linear(8, 3)), *TOKENS
    ),
    "clamp min tensor": Hostile(
        lambda: net(
            lambda self, x: self.o(torch.clamp(self.a(x), min=self.m)), a=linear(6, 8), m=torch.randn(8), o=linear(8, 3)
        ),
        *TOKENS,
    ),
    "chunk of 3 with 8 channels": Hostile(
        lambda: net(lambda self, x: (lambda p: self.o(p[0] + p[1]))(self.a(x).chunk(3, 1)), a=c3(3, 8), o=c3(3, 3))
    ),
    "conv output used two flattenings": Hostile(
        lambda: net(
            lambda self, x: (lambda y: self.o(y.flatten(1)) + self.p(y.permute(0, 2, 3, 1).flatten(1)))(
                F.adaptive_avg_pool2d(self.a(x), 2)
            ),
            a=c3(3, 8),
            o=linear(32, 3),
            p=linear(32, 3),
        )
    ),
    "view interleave tied residual": Hostile(
        lambda: net(
            lambda self, x: (lambda y: self.o(y + y.view(x.shape[0], 2, 4, *y.shape[2:]).transpose(1, 2).reshape(y.shape)))(
                self.a(x)
            ),
            a=c3(3, 8),
            o=c3(8, 3),
        )
    ),
    "view_as / reshape_as": Hostile(
        lambda: net(
            lambda self, x: (lambda y, z: self.o(y.view_as(z) + z))(self.a(x), self.b(x)), a=c3(3, 8), b=c3(3, 8), o=c3(8, 3)
        )
    ),
    "new_zeros cat width pad": Hostile(
        lambda: net(
            lambda self, x: (lambda y: self.o(torch.cat([y, y.new_zeros(y.shape[0], 3, *y.shape[2:])], 1)))(self.a(x)),
            a=c3(3, 8),
            o=c3(11, 3),
        )
    ),
    "torch.full_like mul": Hostile(
        lambda: net(lambda self, x: (lambda y: self.o(y * torch.full_like(y, 0.5)))(self.a(x)), a=c3(3, 8), o=c3(8, 3))
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
    "fold then unfold": Hostile(
        lambda: net(
            lambda self, x: self.o(
                F.fold(self.a(F.unfold(self.s(x), 2, stride=2).transpose(1, 2)).transpose(1, 2), x.shape[2:], 2, stride=2)
            ),
            s=c3(3, 4),
            a=linear(16, 24),
            o=c3(6, 3),
        ),
        X,
        [],
    ),
    "nn.Fold": Hostile(
        lambda: nn.Sequential(conv(3, 16, 2, stride=2), nn.Flatten(2), nn.Fold((10, 10), 2, stride=2), c3(4, 3)),
        X,
        [(image(batch=3),)],
    ),
    "mT matmul": Hostile(
        lambda: net(
            lambda self, x: self.o((self.a(x).mT @ self.b(x)).mean(1)), a=linear(6, 8), b=linear(6, 5), o=linear(5, 3)
        ),
        *TOKENS,
    ),
    "x.T chain": Hostile(
        lambda: net(
            lambda self, x: self.o((self.w.T @ self.a(x).flatten(0, 1).T).T),
            a=linear(6, 8),
            w=nn.Parameter(torch.randn(8, 5)),
            o=linear(5, 3),
        ),
        *TOKENS,
    ),
    "zero pad channels F.pad const nonzero then bn": Hostile(
        lambda: net(
            lambda self, x: self.o(self.n(F.pad(self.a(x), (0, 0, 0, 0, 2, 0), value=1.0))),
            a=c3(3, 8),
            n=nn.BatchNorm2d(10),
            o=c3(10, 3),
        )
    ),
    "cosine similarity": Hostile(
        lambda: net(lambda self, x, y: F.cosine_similarity(self.a(x), self.b(y), dim=-1), a=linear(6, 8), b=linear(6, 8)),
        (tokens(), tokens(seed=2)),
        [],
    ),
    "pairwise distance": Hostile(
        lambda: net(
            lambda self, x, y: F.pairwise_distance(self.a(x).mean(1), self.b(y).mean(1)), a=linear(6, 8), b=linear(6, 8)
        ),
        (tokens(), tokens(seed=2)),
        [],
        frozen="pairwise_distance has no rule",
    ),
    "atan nan_to_num erfc logaddexp": Hostile(
        lambda: net(
            lambda self, x: self.o(
                torch.nan_to_num(torch.atan(self.a(x)))
                + torch.special.erfc(self.b(x))
                + torch.logaddexp(self.a(x), self.b(x))
            ),
            a=linear(6, 8),
            b=linear(6, 8),
            o=linear(8, 3),
        ),
        *TOKENS,
    ),
    "hypot trunc frac": Hostile(
        lambda: net(
            lambda self, x: self.o(torch.hypot(self.a(x), self.b(x)).frac() + self.a(x).trunc()),
            a=linear(6, 8),
            b=linear(6, 8),
            o=linear(8, 3),
        ),
        *TOKENS,
    ),
    "addcdiv lerp tensor weight": Hostile(
        lambda: net(
            lambda self, x: self.o(
                torch.addcdiv(self.a(x), self.b(x), self.c(x).exp() + 1) + torch.lerp(self.a(x), self.b(x), self.w)
            ),
            a=linear(6, 8),
            b=linear(6, 8),
            c=linear(6, 8),
            w=torch.rand(8),
            o=linear(8, 3),
        ),
        *TOKENS,
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
    "prod over space": Hostile(
        lambda: net(lambda self, x: self.o(torch.sigmoid(self.a(x)).prod(2)), a=nn.Conv1d(7, 8, 1), o=linear(8, 3)),
        T,
        [(tokens(batch=3),)],
    ),
    "logsumexp pool": Hostile(
        lambda: net(lambda self, x: self.o(torch.logsumexp(self.a(x), (2, 3))), a=c3(3, 8), o=linear(8, 3))
    ),
    "fliplr rot90": Hostile(lambda: net(lambda self, x: self.o(torch.rot90(self.a(x), 1, [2, 3])), a=c3(3, 8), o=c3(8, 3))),
    "rot90 through channels": Hostile(
        lambda: net(lambda self, x: self.o(torch.rot90(self.a(x), 2, [1, 2])), a=c3(3, 8), o=c3(8, 3))
    ),
    "diagonal tokens": Hostile(
        lambda: net(
            lambda self, x: self.o(
                torch.diagonal(self.a(x) @ self.a(x).transpose(1, 2), dim1=1, dim2=2).unsqueeze(-1) * self.a(x)
            ),
            a=linear(6, 8),
            o=linear(8, 3),
        ),
        *TOKENS,
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
    "mult by 1-channel computed & expand_as": Hostile(
        lambda: net(
            lambda self, x: (lambda y: self.o(y * self.g(y).expand_as(y)))(self.a(x)), a=c3(3, 8), g=c3(8, 1), o=c3(8, 3)
        )
    ),
    "expand -1 explicit": Hostile(
        lambda: net(
            lambda self, x: (lambda y: self.o(y * self.g(y).expand(-1, 8, -1, -1)))(self.a(x)),
            a=c3(3, 8),
            g=c3(8, 1),
            o=c3(8, 3),
        )
    ),
    "broadcast_to shape": Hostile(
        lambda: net(
            lambda self, x: (lambda y: self.o(y * torch.broadcast_to(self.g(y), y.shape)))(self.a(x)),
            a=c3(3, 8),
            g=c3(8, 1),
            o=c3(8, 3),
        )
    ),
    "size arithmetic: channels from shape": Hostile(
        lambda: net(
            lambda self, x: (lambda y: self.o(y.view(y.shape[0], y.shape[1] // 2, 2, -1).mean(2) / y.shape[1]))(
                self.a(x).flatten(2)
            ),
            a=c3(3, 8),
            o=nn.Conv1d(4, 3, 1),
        ),
        statistics=True,
    ),
    "scale by sqrt(channels)": Hostile(
        lambda: net(
            lambda self, x: (lambda y: self.o(y * y.shape[-1] ** (-0.5)))(self.a(x)), a=linear(6, 8), o=linear(8, 3)
        ),
        *TOKENS,
    ),
    "mean by hand /C": Hostile(
        lambda: net(
            lambda self, x: (lambda y: self.o(y - y.sum(1, keepdim=True) / y.shape[1]))(self.a(x)), a=c3(3, 8), o=c3(8, 3)
        )
    ),
    "arange(C) from shape": Hostile(
        lambda: net(
            lambda self, x: (lambda y: self.o(y * torch.arange(y.shape[1], dtype=y.dtype).view(1, -1, 1, 1)))(self.a(x)),
            a=c3(3, 8),
            o=c3(8, 3),
        ),
        frozen="meets a value of fixed size at mul",
    ),
    "ones(C) param-free weight conv": Hostile(
        lambda: net(
            lambda self, x: (
                lambda y: self.o(F.conv2d(y, torch.ones(y.shape[1], 1, 3, 3, dtype=y.dtype), padding=1, groups=y.shape[1]))
            )(self.a(x)),
            a=c3(3, 8),
            o=c3(8, 3),
        )
    ),
    "blur pool buffer depthwise": Hostile(
        lambda: net(
            lambda self, x: self.o(F.conv2d(self.a(x), self.k.repeat(8, 1, 1, 1), padding=1, groups=8, stride=2)),
            a=c3(3, 8),
            k=torch.rand(1, 1, 3, 3),
            o=c3(8, 3),
        )
    ),
    "blur pool expand groups shape": Hostile(
        lambda: net(
            lambda self, x: (
                lambda y: self.o(F.conv2d(y, self.k.expand(y.shape[1], -1, -1, -1), padding=1, groups=y.shape[1], stride=2))
            )(self.a(x)),
            a=c3(3, 8),
            k=torch.rand(1, 1, 3, 3),
            o=c3(8, 3),
        )
    ),
    "loop over channels split 1": Hostile(
        lambda: net(
            lambda self, x: self.o(torch.cat([f * (i + 1) for i, f in enumerate(self.a(x).split(1, 1))], 1)),
            a=c3(3, 8),
            o=c3(8, 3),
        ),
        frozen="one index is picked at split[0]",
    ),
    "unbind channels stack reversed": Hostile(
        lambda: net(lambda self, x: self.o(torch.stack(self.a(x).unbind(1)[::-1], 1)), a=c3(3, 8), o=c3(8, 3)),
        frozen="one index is picked at unbind[0]",
    ),
    "channel dropout by index each separately": Hostile(
        lambda: net(lambda self, x: (lambda y: self.o(y[:, 0:1] + y[:, 1:2] * y[:, 2:3]))(self.a(x)), a=c3(3, 8), o=c3(1, 3))
    ),
    "cross-channel diff": Hostile(
        lambda: net(lambda self, x: (lambda y: self.o(y[:, 1:] - y[:, :-1]))(self.a(x)), a=c3(3, 8), o=c3(7, 3))
    ),
    "torch.diff": Hostile(
        lambda: net(lambda self, x: self.o(torch.diff(self.a(x), dim=1)), a=c3(3, 8), o=c3(7, 3)), frozen="diff has no rule"
    ),
    "avg over pairs via avg_pool1d on channels": Hostile(
        lambda: net(lambda self, x: self.o(F.avg_pool1d(self.a(x), 2)), a=linear(6, 8), o=linear(4, 3)),
        *TOKENS,
        frozen="a window slides over it at avg_pool1d",
    ),
    "channel max pool 3d": Hostile(
        lambda: net(
            lambda self, x: self.o(F.max_pool3d(self.a(x).unsqueeze(1), (2, 1, 1)).squeeze(1)), a=c3(3, 8), o=c3(4, 3)
        ),
        frozen="a window slides over it at max_pool3d",
    ),
    "conv3d over channel axis": Hostile(
        lambda: net(
            lambda self, x: self.o(self.k(self.a(x).unsqueeze(1)).squeeze(1)),
            a=c3(3, 8),
            k=nn.Conv3d(1, 1, (3, 1, 1), padding=(1, 0, 0)),
            o=c3(8, 3),
        ),
        frozen="a kernel slides over it at k",
    ),
}
