"""Blocks and functions that random networks are drawn from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["FUNCTIONS", "Attention", "ByHand", "Excite", "Involution", "Norm2d", "Recurrent", "Scaled", "Summed", "Taps"]


class Attention(nn.Module):
    """Self-attention with two heads; ``packed``: one projection for all three."""

    def __init__(self, width: int, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        self.inner = nn.Linear(width, 24) if packed else nn.ModuleList(nn.Linear(width, 8) for _ in range(3))
        self.out = nn.Linear(8, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            q, k, v = self.inner(x).reshape(x.shape[0], x.shape[1], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            layers: Any = self.inner
            q, k, v = (layer(x).view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2) for layer in layers)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Excite(nn.Module):
    """Squeeze and excite."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))))


class Norm2d(nn.LayerNorm):
    """Layer normalisation over the channels of a map."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias).permute(0, 3, 1, 2)


class Scaled(nn.Module):
    """A buffer and a parameter of the channels' own shape, not in any layer."""

    gain: Tensor

    def __init__(self, width: int, sequence: bool) -> None:
        super().__init__()
        shape = (width,) if sequence else (1, width, 1, 1)
        self.register_buffer("gain", torch.ones(shape))
        self.shift = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain + self.shift


class Summed(nn.Module):
    """A product with a parameter, as ``how`` writes it."""

    def __init__(self, width: int, out: int, how: str) -> None:
        super().__init__()
        self.how = how
        self.table = nn.Parameter(torch.zeros((out, width) if how in ("linear", "from the left") else (width, out)))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "linear":
            return F.linear(x, self.table)
        if self.how == "from the left":
            return (self.table @ x.transpose(1, 2)).transpose(1, 2)
        return x @ self.table if self.how == "matmul" else torch.einsum("bnc,cd->bnd", x, self.table)


class Recurrent(nn.Module):
    """The outputs of a recurrent layer."""

    def __init__(self, kind: Any, width: int, out: int, **options: Any) -> None:
        super().__init__()
        self.inner = kind(width, out, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class ByHand(nn.Module):
    """Attention of two heads, written out, with the scale read off the tensors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, 8) for _ in range(3))
        self.out = nn.Linear(8, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))


class Taps(nn.Module):
    """A convolution along a sequence, in groups."""

    def __init__(self, width: int, out: int, groups: int) -> None:
        super().__init__()
        self.inner = nn.Conv1d(width, out, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


class Involution(nn.Module):
    """Patches weighed by kernels that the values make."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kernel = nn.Conv2d(width, 9, 1)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, 3, padding=1).unflatten(1, (-1, 9))
        return (patches * self.kernel(x).flatten(2).unsqueeze(1)).sum(2).unflatten(2, x.shape[2:])


def shuffled(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def gated(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return a * torch.sigmoid(b)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "relu": lambda x: F.relu(x),
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "times two": lambda x: x * 2.0,
    "plus one": lambda x: 1.0 + x,
    "negative": lambda x: -x,
    "add": lambda a, b: a + b,
    "multiply": lambda a, b: a * torch.tanh(b),
    "average": lambda a, b: torch.stack([a, b]).mean(0),
    "cat": lambda a, b: torch.cat([a, b], 1),
    "cat last": lambda a, b: torch.cat((a, b), dim=-1),
    "first half": lambda x: x.chunk(2, dim=1)[0],
    "second half": lambda x: torch.split(x, x.shape[1] // 2, dim=1)[1],
    "halves gate": gated,
    "F.glu": lambda x: F.glu(x, 1),
    "all but one": lambda x: x[:, 1:],
    "every other": lambda x: x[:, ::2],
    "listed": lambda x: x[:, [3, 0, 2, 1]],
    "flip": lambda x: x.flip(1),
    "roll": lambda x: torch.roll(x, 1, 1),
    "twice": lambda x: x.repeat(1, 2, 1, 1),
    "each twice": lambda x: x.repeat_interleave(2, 1),
    "interleaved": lambda a, b: torch.stack((a, b), 2).flatten(1, 2),
    "padded": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
    "shuffled": shuffled,
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "max pool": lambda x: F.max_pool2d(x, 2),
    "upsample": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    "strongest gates": lambda x: x * torch.sigmoid(x.amax(1, keepdim=True)),
    "to sequence": lambda x: x.flatten(2).transpose(1, 2),
    "to map": lambda t, like: t.transpose(1, 2).reshape(t.shape[0], -1, like.shape[2], like.shape[3]),
    "pooled": lambda x: x.mean((2, 3)),
    "flat": lambda x: F.adaptive_avg_pool2d(x, 2).flatten(1),
    "flat, channels last": lambda x: F.adaptive_avg_pool2d(x, 2).permute(0, 2, 3, 1).reshape(x.shape[0], -1),
    "over the sequence": lambda t: t.mean(1),
    "thirds in another order": lambda x: torch.cat(x.tensor_split(3, 1)[::-1], 1),
    "by their number": lambda x: x / x.shape[1] + x * x.size(1) ** -0.5,
    "gated by one": lambda x: x * torch.sigmoid(x[:, :1].expand(-1, x.shape[1], -1, -1)),
    "shared gate": lambda x: x * torch.sigmoid(x.mean(1, keepdim=True).expand_as(x)),
    "blocks folded": lambda x: F.fold(F.unfold(x, 2, stride=2), x.shape[2:], 2, stride=2),
    "mirrored in space": lambda x: x.mT.flip(-1),
    "a row overwritten": lambda x: torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, 1:]], 2),
    "sorted in space": lambda x: x.flatten(2).sort(dim=2).values.unflatten(2, x.shape[2:]),
    "largest where": lambda a, b: torch.where(a > b, a, torch.maximum(a, b) * 0.5),
    "atan": torch.atan,
    "some tokens": lambda t: torch.gather(t, 1, t[..., :1].argsort(1)[:, :3].expand(-1, -1, t.shape[2])),
    "mean of tokens": lambda t: t.mean(1, keepdim=True),
    "several": lambda a, b: {"first": a, "rest": [b, a * 2]},
}
