"""Models that are hard to prune: channels summed, compared, multiplied and counted."""

# mypy: disable-error-code="arg-type, attr-defined, func-returns-value, operator"

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.channel_cases import TOKENS, Hostile, T, c3, linear, net, tokens

MODELS = {
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
    "output reduced amax": Hostile(
        lambda: net(
            lambda self, x: (lambda y: (self.b(y), y.flatten(1).topk(3, 1).values))(self.a(x)), a=c3(3, 8), b=c3(8, 3)
        ),
        frozen="order matters at topk",
    ),
    "input used as channel gate": Hostile(
        lambda: net(lambda self, x: (lambda y: self.b(y * x.mean(1, keepdim=True)))(self.a(x)), a=c3(3, 8), b=c3(8, 3))
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
    "tril of gram": Hostile(
        lambda: net(
            lambda self, x: (lambda h: self.b(torch.tril(h @ h.transpose(1, 2)) @ h))(self.a(x)),
            a=linear(6, 8),
            b=linear(8, 3),
        ),
        *TOKENS,
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
    "prod over space": Hostile(
        lambda: net(lambda self, x: self.o(torch.sigmoid(self.a(x)).prod(2)), a=nn.Conv1d(7, 8, 1), o=linear(8, 3)),
        T,
        [(tokens(batch=3),)],
    ),
    "logsumexp pool": Hostile(
        lambda: net(lambda self, x: self.o(torch.logsumexp(self.a(x), (2, 3))), a=c3(3, 8), o=linear(8, 3))
    ),
    "mult by 1-channel computed & expand_as": Hostile(
        lambda: net(
            lambda self, x: (lambda y: self.o(y * self.g(y).expand_as(y)))(self.a(x)), a=c3(3, 8), g=c3(8, 1), o=c3(8, 3)
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
    "cross-channel diff": Hostile(
        lambda: net(lambda self, x: (lambda y: self.o(y[:, 1:] - y[:, :-1]))(self.a(x)), a=c3(3, 8), o=c3(7, 3))
    ),
    "torch.diff": Hostile(
        lambda: net(lambda self, x: self.o(torch.diff(self.a(x), dim=1)), a=c3(3, 8), o=c3(7, 3)),
        frozen="diff has no rule",
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
