"""Models that are hard to prune: values moved, joined and taken apart."""

# mypy: disable-error-code="arg-type, attr-defined, func-returns-value, operator"

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.channel_cases import TOKENS, Hostile, T, X, c3, conv, image, linear, net, tokens

MODELS = {
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
    "pixelshuffle after groups": Hostile(
        lambda: nn.Sequential(c3(3, 16), nn.ReLU(), c3(16, 16, groups=2), nn.PixelShuffle(2), nn.ReLU(), c3(4, 3))
    ),
    "pixel unshuffle then shuffle": Hostile(
        lambda: nn.Sequential(c3(3, 4), nn.PixelUnshuffle(2), nn.ReLU(), nn.PixelShuffle(2), c3(4, 3)), X, []
    ),
    "flip+roll channels add": Hostile(
        lambda: net(lambda self, x: (lambda y: self.b(y + y.flip(1) + y.roll(2, 1)))(self.a(x)), a=c3(3, 8), b=c3(8, 3))
    ),
    "output also intermediate twice": Hostile(
        lambda: net(lambda self, x: (lambda y: (self.b(y), y.sum(1)))(self.a(x)), a=c3(3, 8), b=c3(8, 3))
    ),
    "output slice of features": Hostile(
        lambda: net(lambda self, x: (lambda y: (self.b(y), y[:, :2]))(self.a(x)), a=c3(3, 8), b=c3(8, 3))
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
}
