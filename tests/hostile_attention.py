"""Models that are hard to prune: attention in its many forms."""

# mypy: disable-error-code="arg-type, attr-defined, func-returns-value, operator"

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.channel_cases import TOKENS, Hostile, T, c3, conv, linear, net, tokens


def heads(mix: Callable[..., Tensor], **parts: Any) -> Callable[[], Any]:
    """Two heads of four channels, queries, keys and values each from a linear layer; ``mix`` makes one value of them."""

    def forward(self: Any, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(mix(self, q, k, v).transpose(1, 2).flatten(2))

    return lambda: net(
        forward,
        q=linear(6, 8),
        k=linear(6, 8),
        v=linear(6, 8),
        o=linear(8, 3),
        **{name: part() for name, part in parts.items()},
    )


def talking(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores of one head reach the others (Shazeer 2020)."""
    mixed = self.m((q @ k.transpose(-1, -2)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return mixed.softmax(-1) @ v


def decayed(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No softmax, and a decay for every head in a buffer (RetNet)."""
    return q @ k.transpose(-1, -2) * self.D @ v


def sloped(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A slope for every head as a literal (ALiBi)."""
    slopes = torch.tensor([0.5, 0.25], dtype=q.dtype).view(1, 2, 1, 1)
    return (q @ k.transpose(-1, -2) + slopes * torch.arange(q.shape[2], dtype=q.dtype)).softmax(-1) @ v


def shared_keys_repeated(self: Any, x: Tensor) -> Tensor:
    """Four heads of queries share two of keys and values, which are repeated."""
    q, k, v = (
        layer(x).view(x.shape[0], -1, count, 4).transpose(1, 2) for layer, count in ((self.q, 4), (self.k, 2), (self.v, 2))
    )
    mixed = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    return self.o(mixed.transpose(1, 2).reshape(x.shape[0], -1, 16))


def shared_keys_by_einsum(self: Any, x: Tensor) -> Tensor:
    """The same with a dimension of its own for the group."""
    q = self.q(x).view(*x.shape[:2], 2, 2, 4)
    k, v = self.k(x).view(*x.shape[:2], 2, 4), self.v(x).view(*x.shape[:2], 2, 4)
    scores = torch.einsum("bqkgd,bskd->bkgqs", q, k).softmax(-1)
    return self.o(torch.einsum("bkgqs,bskd->bqkgd", scores, v).flatten(2))


def four_heads_on_two(forward: Callable[..., Tensor]) -> Callable[[], Any]:
    return lambda: net(forward, q=linear(6, 16), k=linear(6, 8), v=linear(6, 8), o=linear(16, 3))


def parameters_by_head(self: Any, x: Tensor) -> Tensor:
    """Projections are three-dimensional parameters: input, head, channel."""
    q, k, v = (torch.einsum("bnc,chd->bnhd", self.a(x), weight) for weight in (self.q, self.k, self.v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
    return torch.einsum("bqhd,hdo->bqo", torch.einsum("bhqk,bkhd->bqhd", scores, v), self.o)


def with_parameters_by_head() -> Any:
    q, k, v = (nn.Parameter(torch.randn(8, 2, 4)) for _ in range(3))
    return net(parameters_by_head, a=linear(6, 8), q=q, k=k, v=v, o=nn.Parameter(torch.randn(2, 4, 3)))


LOSES_HEADS: dict[str, Any] = {"options": {"prune_heads": True}}
FIXED_LENGTH = (T, [(tokens(batch=3),)])

TALKING = Hostile(heads(talking, m=lambda: linear(2, 2)), *TOKENS)
DECAYED = Hostile(heads(decayed, D=lambda: torch.rand(2, 7, 7)), *FIXED_LENGTH)
SLOPED = Hostile(heads(sloped), *TOKENS)
BY_EINSUM = Hostile(four_heads_on_two(shared_keys_by_einsum), *TOKENS)
BY_HEAD = Hostile(with_parameters_by_head, *TOKENS)

MODELS = {
    "talking heads": TALKING,
    "talking heads prune heads": replace(TALKING, **LOSES_HEADS),
    "retnet decay buffer per head": DECAYED,
    "retnet decay heads": replace(DECAYED, **LOSES_HEADS),
    "alibi computed from heads literal": SLOPED,
    "alibi heads": replace(SLOPED, frozen="meets a value of fixed size at add", **LOSES_HEADS),
    "gqa via view 5d": BY_EINSUM,
    "gqa 5d heads": replace(BY_EINSUM, **LOSES_HEADS),
    "multi-head weights 3d param einsum heads": BY_HEAD,
    "heads of parameters lose heads": replace(BY_HEAD, **LOSES_HEADS),
    "mqa 4 heads kv 2 groups repeat": Hostile(four_heads_on_two(shared_keys_repeated), *TOKENS),
    "qk norm": Hostile(
        heads(
            lambda self, q, k, v: F.scaled_dot_product_attention(self.n1(q), self.n2(k), v),
            n1=lambda: nn.LayerNorm(4),
            n2=lambda: nn.RMSNorm(4),
        ),
        *TOKENS,
    ),
    "axial attention": Hostile(
        lambda: net(
            lambda self, x: (
                lambda y: self.o(
                    F.scaled_dot_product_attention(*(f(y).permute(0, 2, 3, 1) for f in (self.q, self.k, self.v))).permute(
                        0, 3, 1, 2
                    )
                )
            )(self.a(x)),
            a=c3(3, 8),
            q=conv(8, 4, 1),
            k=conv(8, 4, 1),
            v=conv(8, 6, 1),
            o=c3(6, 3),
        )
    ),
    "xcit channel attention": Hostile(
        lambda: net(
            lambda self, x: (
                lambda qkv: self.o(
                    (
                        torch.softmax(
                            F.normalize(qkv[0], dim=-1) @ F.normalize(qkv[1], dim=-1).transpose(-2, -1) * self.t, -1
                        )
                        @ qkv[2]
                    )
                    .permute(0, 3, 1, 2)
                    .flatten(2)
                )
            )(self.qkv(x).reshape(x.shape[0], x.shape[1], 3, 2, 4).permute(2, 0, 3, 4, 1).unbind(0)),
            qkv=linear(6, 24),
            t=nn.Parameter(torch.ones(2, 1, 1)),
            o=linear(8, 3),
        ),
        *TOKENS,
    ),
    "linear attention elu": Hostile(
        lambda: net(
            lambda self, x: (
                lambda q, k, v: self.o(q @ (k.transpose(1, 2) @ v) / (q @ k.sum(1, keepdim=True).transpose(1, 2)))
            )(F.elu(self.q(x)) + 1, F.elu(self.k(x)) + 1, self.v(x)),
            q=linear(6, 8),
            k=linear(6, 8),
            v=linear(6, 8),
            o=linear(8, 3),
        ),
        *TOKENS,
        statistics=True,
    ),
    "perceiver latents": Hostile(
        lambda: net(
            lambda self, x: self.o(
                F.scaled_dot_product_attention(self.q(self.z).expand(x.shape[0], -1, -1), self.k(x), self.v(x))
            ),
            z=nn.Parameter(torch.randn(1, 3, 5)),
            q=linear(5, 8),
            k=linear(6, 8),
            v=linear(6, 8),
            o=linear(8, 3),
        ),
        *TOKENS,
    ),
    "attention pooling einsum heads": Hostile(
        lambda: net(
            lambda self, x: self.o(
                torch.einsum("bnh,bnhd->bhd", self.s(x).softmax(1), self.v(x).view(*x.shape[:2], 2, 4)).flatten(1)
            ),
            s=linear(6, 2),
            v=linear(6, 8),
            o=linear(8, 3),
        ),
        *TOKENS,
    ),
    "detr queries": Hostile(
        lambda: net(
            lambda self, x: self.o(
                F.scaled_dot_product_attention(
                    self.q(self.e.weight).unsqueeze(0).expand(x.shape[0], -1, -1),
                    (m := self.a(x).flatten(2).transpose(1, 2)),
                    m,
                )
            ),
            a=c3(3, 8),
            e=nn.Embedding(4, 8),
            q=linear(8, 8),
            o=linear(8, 3),
        )
    ),
    "attn scale from size": Hostile(
        lambda: net(
            lambda self, x: (lambda q, k: self.o((q @ k.transpose(1, 2) / math.sqrt(q.size(-1))).softmax(-1) @ k))(
                self.q(x), self.k(x)
            ),
            q=linear(6, 8),
            k=linear(6, 8),
            o=linear(8, 3),
        ),
        *TOKENS,
    ),
    "deepseek MLA: low-rank kv": Hostile(
        lambda: net(
            lambda self, x: (
                lambda q, kv: (
                    lambda k, v: self.o(
                        F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
                        .transpose(1, 2)
                        .flatten(2)
                    )
                )(*kv.split([4, 3], -1))
            )(self.q(x).unflatten(-1, (2, 4)), self.ub(self.n(self.d(x))).unflatten(-1, (2, 7))),
            q=linear(6, 8),
            d=linear(6, 5),
            n=nn.RMSNorm(5),
            ub=linear(5, 14),
            o=linear(6, 3),
        ),
        *TOKENS,
    ),
}
