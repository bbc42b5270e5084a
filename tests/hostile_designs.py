"""Models that are hard to prune: small forms of what published networks do."""

# mypy: disable-error-code="arg-type, attr-defined, func-returns-value, operator"

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.channel_cases import TOKENS, Hostile, c3, conv, image, linear, net


def shaped_like_what_was_read(self: Any, x: Tensor) -> Tensor:
    """The number of channels is asked of a tensor that other channels make."""
    y = F.relu(self.a(x))
    n, c, h, w = y.shape
    return self.o(self.b(y).reshape(n, 4, 2, h * w).reshape(n, c, h, w))


def divided_by_the_spread_of_groups(self: Any, x: Tensor) -> Tensor:
    """Evolved normalisation (EvoNorm-S0): groups of channels by their standard deviation, repeated for every channel."""
    y = self.a(x)
    n, c, h, w = y.shape
    grouped = y.reshape(n, 4, c // 4, h, w)
    spread = (grouped.var((2, 3, 4), unbiased=False, keepdim=True) + 1e-5).sqrt()
    return self.o(y * torch.sigmoid(y * self.v) / spread.expand(grouped.shape).reshape(n, c, h, w))


class Standardised(nn.Conv2d):
    """A convolution whose weight is normalised filter by filter, by batch normalisation (normaliser-free networks)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, **options: Any) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, **options)
        self.gain, self.scale = nn.Parameter(torch.ones(outputs, 1, 1, 1)), 0.3

    def forward(self, x: Tensor) -> Tensor:
        flat, gain = self.weight.reshape(1, self.out_channels, -1), (self.gain * self.scale).view(-1)
        weight = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def normalised_by_instance_across_channels(self: Any, x: Tensor) -> Tensor:
    """Statistics run over what loses channels."""
    y = F.relu(self.a(x)).transpose(1, 2)
    return self.o(F.batch_norm(y, None, None, training=True).transpose(1, 2))


class Patches(nn.Module):
    """Patches as sequences, the batch merged with the channels, and sizes that do not fit resized (MobileViT)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        rows, columns = math.ceil(h / 2), math.ceil(w / 2)
        if (rows * 2, columns * 2) != (h, w):
            x = F.interpolate(x, (rows * 2, columns * 2))
        x = x.reshape(n * c * rows, 2, columns, 2).transpose(1, 2)
        x = x.reshape(n, c, rows * columns, 4).transpose(1, 3).reshape(n * 4, rows * columns, c)
        x = x + self.mix(self.norm(x))
        x = x.contiguous().view(n, 4, rows * columns, c).transpose(1, 3).reshape(n * c * rows, columns, 2, 2)
        return x.transpose(1, 2).reshape(n, c, rows * 2, columns * 2)


class GlobalFilter(nn.Module):
    """A filter for every channel in the frequencies of space (GFNet)."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(size, size // 2 + 1, width, 2) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.rfft2(x.permute(0, 2, 3, 1), dim=(1, 2), norm="ortho")
        y = y * torch.view_as_complex(self.filter)
        return torch.fft.irfft2(y, s=(x.shape[2], x.shape[3]), dim=(1, 2), norm="ortho").permute(0, 3, 1, 2)


def mixed_by_fourier(self: Any, x: Tensor) -> Tensor:
    """Channels and positions transformed, the real part kept (FNet): the channels between stay."""
    y = self.a(x)
    y = y + torch.fft.fft(torch.fft.fft(y, dim=-1), dim=-2).real
    return self.o(F.gelu(self.b(y)))


def rolled_out(self: Any, x: Tensor) -> Tensor:
    """Two cells, one upon the other, from states that start at zero and at something learned."""
    h = torch.tanh(self.start(x[:, 0]))
    state: Any = None
    for i in range(4):
        h = self.gru(x[:, i], h)
        state = self.lstm(F.relu(self.between(h)), state)
    return self.o(self.rnn(state[1], state[0]) + h)


def involution(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    n, c, h, w = y.shape
    kernels = self.k(y).view(n, 4, 1, 9, h, w)
    patches = F.unfold(y, 3, padding=1).view(n, 4, c // 4, 9, h, w)
    return self.o((kernels * patches).sum(3).view(n, c, h, w))


MODELS = {
    "filters in the frequencies of space": Hostile(
        lambda: nn.Sequential(c3(3, 8), GlobalFilter(8, 10), nn.ReLU(), c3(8, 3)), more=[(image(batch=3),)]
    ),
    "channels mixed by Fourier transforms": Hostile(
        lambda: net(mixed_by_fourier, a=linear(6, 8), b=linear(8, 8), o=linear(8, 3)), *TOKENS
    ),
    "cells upon cells": Hostile(
        lambda: net(
            rolled_out,
            start=linear(6, 8),
            gru=nn.GRUCell(6, 8),
            between=linear(8, 6),
            lstm=nn.LSTMCell(6, 8, bias=False),
            rnn=nn.RNNCell(8, 8, nonlinearity="relu"),
            o=linear(8, 3),
        ),
        *TOKENS,
    ),
    "a cell whose code is exported": Hostile(
        lambda: net(
            lambda self, x: self.o(self.c(x[:, 1], self.c(x[:, 0], torch.zeros(x.shape[0], 8, dtype=x.dtype)))),
            c=nn.GRUCell(6, 8),
            o=linear(8, 3),
        ),
        *TOKENS,
    ),
    "a diagonal in index notation": Hostile(
        lambda: net(
            lambda self, x: self.o(torch.einsum("bnc,cc,dcd->bnd", self.a(x), self.w, self.v)),
            a=linear(6, 8),
            w=nn.Parameter(torch.randn(8, 8)),
            v=nn.Parameter(torch.randn(6, 8, 6)),
            o=linear(6, 3),
        ),
        *TOKENS,
    ),
    "one output of every group": Hostile(
        lambda: net(
            lambda self, x: self.o(self.g(F.relu(self.a(x)))), a=c3(3, 16), g=c3(16, 48, groups=16), o=c3(48, 3, groups=3)
        )
    ),
    "several outputs of every input": Hostile(lambda: nn.Sequential(c3(3, 24, groups=3), nn.ReLU(), c3(24, 3))),
    "kernels from data, one for every group (involution)": Hostile(
        lambda: net(involution, a=c3(3, 16), k=conv(16, 36, 1), o=c3(16, 3)), more=[(image(batch=3),)]
    ),
    "complex numbers of two layers": Hostile(
        lambda: net(
            lambda self, x: (lambda z: self.o((z * z.conj()).real + z.abs() + z.imag))(torch.complex(self.a(x), self.b(x))),
            a=c3(3, 8),
            b=c3(3, 8),
            o=c3(8, 3),
        )
    ),
    "pairs of indices": Hostile(
        lambda: net(
            lambda self, x: self.o(self.a(x).mean(3)[:, self.i, self.j]),
            a=c3(3, 8),
            i=torch.tensor([0, 3, 5]),
            j=torch.tensor([1, 2, 3]),
            o=linear(3, 3),
        ),
        more=[(image(batch=3),)],
        frozen="picks pairs of indices",
    ),
    "patches as sequences, batch and channels merged": Hostile(
        lambda: nn.Sequential(c3(3, 8), Patches(8), c3(8, 3)), more=[(image(size=14, batch=3),), (image(size=6, batch=1),)]
    ),
    "weights normalised filter by filter": Hostile(
        lambda: nn.Sequential(
            Standardised(3, 8, 3),
            nn.ReLU(),
            Standardised(8, 6, 3),
            nn.ReLU(),
            Standardised(6, 6, 3, groups=6),
            Standardised(6, 6, 3, groups=3),
            nn.ReLU(),
            Standardised(6, 4, 1),
        ),
        statistics=True,
    ),
    "rows of an image normalised over its channels": Hostile(
        lambda: net(normalised_by_instance_across_channels, a=c3(3, 8), o=c3(8, 3)), statistics=True
    ),
    "flattened and folded back": Hostile(
        lambda: net(
            lambda self, x: self.o(F.relu(self.a(x)).flatten(1).view(x.shape[0], -1, x.shape[2], x.shape[3]) + 1),
            a=c3(3, 8),
            o=c3(8, 3),
        )
    ),
    "spread of groups": Hostile(
        lambda: net(divided_by_the_spread_of_groups, a=c3(3, 16), o=c3(16, 3), v=torch.randn(1, 16, 1, 1))
    ),
    "a size asked of other channels": Hostile(
        lambda: net(shaped_like_what_was_read, a=c3(3, 8), b=c3(8, 8), o=c3(8, 3)),
        options={"sparsity": 0.2},
    ),
}
