"""Models that are hard to prune: normalisation and softmax."""

# mypy: disable-error-code="arg-type, attr-defined, func-returns-value, operator"

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.channel_cases import TOKENS, Hostile, X, c3, image, linear, net

MODELS = {
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
    "LP pooling": Hostile(lambda: net(lambda self, x: self.o(F.lp_pool2d(self.a(x), 2.0, 2)), a=c3(3, 8), o=c3(8, 3))),
    "softmin over channels": Hostile(
        lambda: net(lambda self, x: self.o(F.softmin(self.a(x), 1)), a=c3(3, 8), o=c3(8, 3)), statistics=True
    ),
    "groupwise softmax heads 2d": Hostile(
        lambda: net(lambda self, x: self.o(self.a(x).unflatten(1, (2, 4)).softmax(2).flatten(1, 2)), a=c3(3, 8), o=c3(8, 3)),
        statistics=True,
    ),
    "bn eval in train mode flags": Hostile(
        lambda: nn.Sequential(c3(3, 8), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(), c3(8, 3))
    ),
    "softmax2d": Hostile(lambda: nn.Sequential(c3(3, 8), nn.Softmax2d(), c3(8, 3))),
    "bn momentum None bn no stats 1d 3d": Hostile(
        lambda: nn.Sequential(nn.Conv3d(2, 8, 2), nn.BatchNorm3d(8, momentum=None), nn.ReLU(), nn.Conv3d(8, 3, 1)),
        (torch.randn(2, 2, 3, 3, 3, dtype=torch.float64),),
        [],
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
