"""Attention in every spelling, products of activations, mixers, einsum; small instances of torchvision's families."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.channel_cases import Case, check, image, lived_in, net, prune, tokens

linear = nn.Linear
X, MORE = (tokens(),), [(tokens(length=4, batch=3),)]
HEADS: dict[str, Any] = {"prune_heads": True, "prune_head_dim": False}


def heads(x: Tensor, n: int) -> Tensor:
    return x.view(x.shape[0], x.shape[1], n, -1).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def by_hand(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return ((q @ k.transpose(-2, -1)) * scale).softmax(-1) @ v


def projections(**more: Any) -> dict[str, Any]:
    return {"embed": linear(6, 8), "q": linear(8, 8), "k": linear(8, 8), "v": linear(8, 8), "out": linear(8, 6)} | more


def separate(self: Any, x: Tensor) -> Tensor:
    x = self.embed(x)
    q, k, v = (heads(layer(x), 2) for layer in (self.q, self.k, self.v))
    return self.out(joined(by_hand(q, k, v, 0.5)))


def core(self: Any, x: Tensor, **options: Any) -> Tensor:
    x = self.embed(x)
    q, k, v = (heads(layer(x), 2) for layer in (self.q, self.k, self.v))
    return self.out(joined(F.scaled_dot_product_attention(q, k, v, **options)))


def packed_reshape(self: Any, x: Tensor) -> Tensor:
    x = self.embed(x)
    n, length, _ = x.shape
    q, k, v = self.qkv(x).reshape(n, length, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, 8))


def packed_chunk(self: Any, x: Tensor) -> Tensor:
    q, k, v = self.qkv(self.embed(x)).chunk(3, dim=-1)
    return self.out(joined(by_hand(heads(q, 2), heads(k, 2), heads(v, 2), 0.5)))


def packed_interleaved(self: Any, x: Tensor) -> Tensor:
    x = self.embed(x)
    both = self.qkv(x).view(x.shape[0], x.shape[1], 2, 12).transpose(1, 2)
    q, k, v = both.split(4, dim=-1)
    return self.out(joined(F.scaled_dot_product_attention(q, k, v)))


def width(n: int = 8, **more: Any) -> dict[str, Any]:
    return {"embed": linear(6, n), "qkv": linear(n, 24), "out": linear(8, 6)} | more


def grouped(expand: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        q, k, v = heads(self.q(x), 4), heads(self.k(x), 2), heads(self.v(x), 2)
        return self.out(joined(by_hand(q, expand(k), expand(v), 0.5)))

    return forward


def expanded(x: Tensor) -> Tensor:
    n, h, length, d = x.shape
    return x[:, :, None, :, :].expand(n, h, 2, length, d).reshape(n, h * 2, length, d)


def natively(self: Any, x: Tensor) -> Tensor:
    q, k, v = heads(self.q(x), 4), heads(self.k(x), 2), heads(self.v(x), 2)
    return self.out(joined(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))


def one_key(self: Any, x: Tensor) -> Tensor:
    q, k, v = heads(self.q(x), 4), self.k(x).unsqueeze(1), self.v(x).unsqueeze(1)
    return self.out(joined(by_hand(q, k, v, 0.5)))


def gqa(keys: int = 8) -> dict[str, Any]:
    return {"q": linear(6, 16), "k": linear(6, keys), "v": linear(6, keys), "out": linear(16, 6)}


def rotated_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], -1) * sin


def rotated_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def rotary(rotate: Any) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (heads(layer(x), 2) for layer in (self.q, self.k, self.v))
        length = x.shape[1]
        q, k = (rotate(t, self.cos[:length], self.sin[:length]) for t in (q, k))
        return self.out(joined(F.scaled_dot_product_attention(q, k, v)))

    return forward


def wide(**more: Any) -> dict[str, Any]:
    return {"embed": linear(6, 8), "q": linear(8, 16), "k": linear(8, 16), "v": linear(8, 16), "out": linear(16, 6)} | more


def biased(self: Any, x: Tensor) -> Tensor:
    x = self.embed(x)
    q, k, v = (heads(layer(x), 2) for layer in (self.q, self.k, self.v))
    bias = self.table[self.index.view(-1)].view(7, 7, 2).permute(2, 0, 1).unsqueeze(0)
    return self.out(joined(((q @ k.transpose(-2, -1)) * 0.5 + bias).softmax(-1) @ v))


def alibi(self: Any, x: Tensor) -> Tensor:
    x = self.embed(x)
    q, k, v = (heads(layer(x), 2) for layer in (self.q, self.k, self.v))
    place = torch.arange(x.shape[1], dtype=x.dtype)
    bias = self.slopes[:, None, None] * (place[None, :] - place[:, None]).abs()
    return self.out(joined(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))


def windowed(self: Any, x: Tensor) -> Tensor:
    length = x.shape[1]
    place = torch.arange(length)
    near = (place[:, None] - place[None, :]).abs() <= 2
    return core(self, x, attn_mask=near)


def cached(self: Any, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    q, k, v = (heads(layer(x), 2) for layer in (self.q, self.k, self.v))
    return self.out(joined(F.scaled_dot_product_attention(q, torch.cat([keys, k], 2), torch.cat([values, v], 2))))


INDEX = (torch.arange(7)[:, None] - torch.arange(7)[None, :] + 6).long()
PLACES = torch.arange(16, dtype=torch.float64)[:, None] * torch.arange(1, 5, dtype=torch.float64)

DIMS = {"embed.weight": (4, 6), "q.weight": (4, 4), "k.weight": (4, 4), "v.weight": (4, 4), "out.weight": (6, 4)}
WRITTEN = {
    "separate projections lose dimensions of heads": Case(lambda: net(separate, **projections()), DIMS, X, MORE),
    "separate projections lose heads": Case(lambda: net(separate, **projections()), DIMS, X, MORE, options=HEADS),
    "the core's own scale is kept": Case(lambda: net(core, **projections()), DIMS, X, MORE),
    "the core with a scale": Case(lambda: net(lambda self, x: core(self, x, scale=0.3), **projections()), DIMS, X, MORE),
    "the core, causal": Case(lambda: net(lambda self, x: core(self, x, is_causal=True), **projections()), DIMS, X, MORE),
    "the core loses heads": Case(lambda: net(core, **projections()), DIMS, X, MORE, options=HEADS),
    "packed, by reshape and unbind": Case(
        lambda: net(packed_reshape, **width()), {"qkv.weight": (12, 4), "out.weight": (6, 4)}, X, MORE
    ),
    "packed, by reshape and unbind, loses heads": Case(
        lambda: net(packed_reshape, **width()), {"qkv.weight": (12, 4), "out.weight": (6, 4)}, X, MORE, options=HEADS
    ),
    "packed, by chunk": Case(lambda: net(packed_chunk, **width()), {"qkv.weight": (12, 4), "out.weight": (6, 4)}, X, MORE),
    "packed, head by head": Case(lambda: net(packed_interleaved, **width()), {"embed.weight": (4, 6)}, X, MORE),
    "grouped queries by repeat_interleave": Case(
        lambda: net(grouped(lambda x: x.repeat_interleave(2, dim=1)), **gqa()),
        {"q.weight": (8, 6), "k.weight": (4, 6), "v.weight": (4, 6), "out.weight": (6, 8)},
        X,
        MORE,
    ),
    "grouped queries by repeat_interleave lose heads": Case(
        lambda: net(grouped(lambda x: x.repeat_interleave(2, dim=1)), **gqa()),
        {"q.weight": (8, 6), "k.weight": (4, 6), "v.weight": (4, 6), "out.weight": (6, 8)},
        X,
        MORE,
        options=HEADS,
    ),
    "grouped queries by expand and reshape": Case(
        lambda: net(grouped(expanded), **gqa()),
        {"q.weight": (8, 6), "k.weight": (4, 6), "v.weight": (4, 6), "out.weight": (6, 8)},
        X,
        MORE,
    ),
    "grouped queries by the core": Case(
        lambda: net(natively, **gqa()), {"q.weight": (8, 6), "k.weight": (4, 6), "v.weight": (4, 6)}, X, MORE
    ),
    "grouped queries by the core lose heads": Case(
        lambda: net(natively, **gqa()), {"q.weight": (8, 6), "k.weight": (4, 6), "v.weight": (4, 6)}, X, MORE, options=HEADS
    ),
    "one key for all heads": Case(
        lambda: net(one_key, **gqa(4)), {"q.weight": (8, 6), "k.weight": (2, 6), "v.weight": (2, 6)}, X, MORE
    ),
    "rotary positions in halves": Case(
        lambda: net(rotary(rotated_half), **wide(cos=torch.rand(16, 8), sin=torch.rand(16, 8))),
        {"q.weight": (8, 4), "k.weight": (8, 4), "v.weight": (8, 4), "cos": (16, 4), "sin": (16, 4)},
        X,
        MORE,
    ),
    "rotary positions in pairs": Case(
        lambda: net(rotary(rotated_pairs), **wide(cos=torch.rand(16, 4), sin=torch.rand(16, 4))),
        {"q.weight": (8, 4), "k.weight": (8, 4), "v.weight": (8, 4), "cos": (16, 2), "sin": (16, 2)},
        X,
        [(tokens(length=4),), (tokens(length=15),)],
    ),
    "a bias by relative position": Case(
        lambda: net(biased, **projections(table=nn.Parameter(torch.rand(13, 2)), index=INDEX)),
        DIMS | {"table": (13, 2)},
        X,
        [],
    ),
    "a bias by relative position loses heads": Case(
        lambda: net(biased, **projections(table=nn.Parameter(torch.rand(13, 2)), index=INDEX)),
        DIMS | {"table": (13, 1)},
        X,
        [],
        options=HEADS,
    ),
    "ALiBi slopes of heads": Case(
        lambda: net(alibi, **projections(slopes=torch.rand(2))), DIMS | {"slopes": (1,)}, X, MORE, options=HEADS
    ),
    "a window": Case(lambda: net(windowed, **projections()), DIMS, X, MORE),
    "cached keys and values stay": Case(
        lambda: net(cached, q=linear(6, 8), k=linear(6, 8), v=linear(6, 8), out=nn.Sequential(linear(8, 10), linear(10, 6))),
        {"q.weight": (8, 6), "v.weight": (8, 6), "out.0.weight": (5, 8)},
        (tokens(), torch.randn(2, 2, 3, 4, dtype=torch.float64), torch.randn(2, 2, 3, 4, dtype=torch.float64)),
        [],
        frozen={"q": "fixed size", "v": "fixed size"},
    ),
}


def mha(forward: Any, **options: Any) -> Callable[[], Any]:
    return lambda: net(
        forward,
        embed=linear(6, 8),
        att=nn.MultiheadAttention(8, 2, **options),
        out=nn.Sequential(linear(8, 10), linear(10, 3)),
    )


def to_itself(self: Any, x: Tensor) -> Tensor:
    x = self.embed(x)
    return self.out(self.att(x, x, x, need_weights=False)[0])


def with_weights(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = self.embed(x)
    y, weights = self.att(x, x, x)
    return self.out(y), weights


def to_memory(self: Any, x: Tensor, memory: Tensor) -> Tensor:
    return self.out(self.att(self.embed(x), memory, memory)[0])


def with_mask(self: Any, x: Tensor) -> Tensor:
    x = self.embed(x)
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return self.out(self.att(x, x, x, attn_mask=mask, need_weights=False)[0])


MODULES = {
    "nn.MultiheadAttention with a mask made in forward": Case(
        mha(with_mask, batch_first=True), {"embed.weight": (4, 6)}, X, MORE
    ),
    "nn.MultiheadAttention": Case(
        mha(to_itself, batch_first=True), {"embed.weight": (4, 6), "att.in_proj_weight": (12, 4)}, X, MORE
    ),
    "nn.MultiheadAttention loses heads": Case(
        mha(to_itself, batch_first=True), {"embed.weight": (4, 6), "att.in_proj_weight": (12, 4)}, X, MORE, options=HEADS
    ),
    "nn.MultiheadAttention, sequence first": Case(
        mha(to_itself), {"att.in_proj_weight": (12, 4), "att.out_proj.weight": (4, 4), "out.0.weight": (5, 4)}, X, MORE
    ),
    "nn.MultiheadAttention without bias": Case(mha(to_itself, bias=False), {"att.in_proj_weight": (12, 4)}, X, MORE),
    "nn.MultiheadAttention that gives its weights": Case(
        mha(with_weights, batch_first=True), {"embed.weight": (4, 6), "att.in_proj_weight": (12, 4)}, X, MORE
    ),
    "nn.MultiheadAttention to a memory of other widths": Case(
        mha(to_memory, batch_first=True, kdim=5, vdim=5),
        {"att.q_proj_weight": (4, 4), "att.k_proj_weight": (4, 5), "att.v_proj_weight": (4, 5)},
        (tokens(), tokens(5, 3)),
        [(tokens(length=2), tokens(5, 6))],
    ),
}


def mixer(self: Any, x: Tensor) -> Tensor:
    x = self.embed(x)
    x = x + self.down(F.gelu(self.up(self.norm(x).transpose(1, 2)))).transpose(1, 2)
    return self.head(x + self.back(F.gelu(self.out(x))))


def by_einsum(self: Any, x: Tensor) -> Tensor:
    return self.head(torch.einsum("bnc,cd->bnd", torch.relu(self.embed(x)), self.weight))


def einsum_attention(self: Any, x: Tensor) -> Tensor:
    q, k, v = (layer(self.embed(x)).unflatten(-1, (2, 4)) for layer in (self.q, self.k, self.v))
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.5).softmax(-1)
    return self.out(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


def gram(self: Any, x: Tensor) -> Tensor:
    a, b = self.a(x), self.b(x)
    return self.head((a.transpose(1, 2) @ a).sum(1, keepdim=True)) + (b @ b.transpose(1, 2)).sum((1, 2), keepdim=True)


PRODUCTS = {
    "MLP-Mixer": Case(
        lambda: net(
            mixer,
            embed=linear(6, 8),
            norm=nn.LayerNorm(8),
            up=linear(7, 10),
            down=linear(10, 7),
            out=linear(8, 12),
            back=linear(12, 8),
            head=linear(8, 3),
        ),
        {"embed.weight": (4, 6), "up.weight": (5, 7), "down.weight": (7, 5), "out.weight": (6, 4), "back.weight": (4, 6)},
        X,
        [(tokens(batch=5),)],
        frozen={"down": "fixed size"},
    ),
    "einsum with a matrix": Case(
        lambda: net(by_einsum, embed=linear(6, 8), weight=nn.Parameter(torch.rand(8, 10)), head=linear(10, 3)),
        {"embed.weight": (4, 6), "weight": (4, 5), "head.weight": (3, 5)},
        X,
        MORE,
    ),
    "einsum attention": Case(lambda: net(einsum_attention, **projections()), DIMS, X, MORE),
    "einsum attention loses heads": Case(lambda: net(einsum_attention, **projections()), DIMS, X, MORE, options=HEADS),
    "products of activations": Case(
        lambda: net(gram, a=linear(6, 8), b=linear(6, 10), head=linear(8, 3)),
        {"a.weight": (4, 6), "b.weight": (5, 6)},
        X,
        [],
    ),
}

CASES = {**WRITTEN, **MODULES, **PRODUCTS}


@pytest.mark.parametrize("criterion", ["random", "l1_norm"])
@pytest.mark.parametrize("name", CASES)
def test_half_of_the_channels_go_and_the_rest_compute_what_they_did(name: str, criterion: str) -> None:
    check(CASES[name], criterion)


def test_the_scale_of_the_dense_head_is_written_down() -> None:
    small, _ = prune(lived_in(net(lambda self, x: core(self, x), **projections())), X)
    scales = [node.kwargs["scale"] for node in small.graph.nodes if node.target is F.scaled_dot_product_attention]
    assert scales == [1 / math.sqrt(4)]


def families() -> dict[str, tuple[Callable[[], Any], int]]:
    torchvision = pytest.importorskip("torchvision")
    m = torchvision.models
    swin = {"patch_size": [4, 4], "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    settings = m.convnext.CNBlockConfig
    return {
        "ViT": (lambda: m.VisionTransformer(16, 4, 2, 2, 8, 16, num_classes=5), 16),
        "Swin": (lambda: m.SwinTransformer(**swin, num_classes=5), 32),
        "ConvNeXt": (lambda: m.ConvNeXt([settings(8, 12, 2), settings(12, None, 2)], num_classes=5), 32),
        "DenseNet": (lambda: m.DenseNet(4, (2, 2), 8, 2, num_classes=5), 64),
        "ShuffleNet": (lambda: m.ShuffleNetV2([2, 2, 2], [8, 16, 16, 16, 32], num_classes=5), 64),
        "MobileNetV2": (lambda: m.MobileNetV2(5, inverted_residual_setting=[[1, 8, 1, 1], [4, 12, 2, 2]]), 32),
        "RegNet": (lambda: m.RegNet(m.regnet.BlockParams([1, 2], [8, 16], [4, 4], [1.0, 1.0], [2, 2], 0.25), 5), 32),
    }


@pytest.mark.parametrize("name", ["ViT", "Swin", "ConvNeXt", "DenseNet", "ShuffleNet", "MobileNetV2", "RegNet"])
def test_small_instances_of_torchvision_families_lose_half_of_their_channels(name: str) -> None:
    build, size = families()[name]
    model = lived_in(build())
    small, _ = prune(model, (image(size=size),))
    before, after = (sum(p.numel() for p in module.parameters()) for module in (model, small))
    assert after < 0.6 * before
