"""Models that are hard to prune: what networks are made of."""

# mypy: disable-error-code="arg-type, attr-defined, func-returns-value, operator"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.channel_cases import TOKENS, Hostile, T, X, c3, conv, image, linear, net, tokens


def scan(self: Any, x: Tensor) -> Tensor:
    u, z = self.i(x).chunk(2, -1)
    step, b, c = F.softplus(self.dt(u)), self.B(u), self.C(u)
    decay, given = torch.exp(step.unsqueeze(-1) * self.A), step.unsqueeze(-1) * b.unsqueeze(2)
    state, outputs = torch.zeros(x.shape[0], 8, 4, dtype=x.dtype), []
    for t in range(4):
        state = decay[:, t] * state + given[:, t] * u[:, t].unsqueeze(-1)
        outputs.append((state * c[:, t].unsqueeze(1)).sum(-1))
    return self.o(torch.stack(outputs, 1) * F.silu(z[:, :4]))


MODELS = {
    "einsum ellipsis grouped linear": Hostile(
        lambda: net(
            lambda self, x: self.o(torch.einsum("...gi,gio->...go", self.a(x).unflatten(-1, (2, 4)), self.w).flatten(-2)),
            a=linear(6, 8),
            w=nn.Parameter(torch.randn(2, 4, 5)),
            o=linear(10, 3),
        ),
        *TOKENS,
    ),
    "einsum diag": Hostile(
        lambda: net(
            lambda self, x: self.o(torch.einsum("bii->bi", self.a(x).transpose(1, 2) @ self.a(x))),
            a=linear(6, 8),
            o=linear(8, 3),
        ),
        *TOKENS,
        frozen="einsum with a repeated index has no rule",
    ),
    "bmm by parameters experts": Hostile(
        lambda: net(
            lambda self, x: self.o(torch.bmm(self.a(x).transpose(0, 1).expand(7, -1, -1), self.w).transpose(0, 1)),
            a=linear(6, 8),
            w=nn.Parameter(torch.randn(7, 8, 5)),
            o=linear(5, 3),
        ),
        T,
        [(tokens(batch=3),)],
    ),
    "moe softmax gate": Hostile(
        lambda: net(
            lambda self, x: (lambda g: self.o(sum((g[..., i : i + 1] * e(x) for i, e in enumerate(self.ex)))))(
                self.g(x).softmax(-1)
            ),
            g=linear(6, 3),
            ex=nn.ModuleList(nn.Sequential(linear(6, 8), nn.ReLU(), linear(8, 8)) for _ in range(3)),
            o=linear(8, 3),
        ),
        *TOKENS,
    ),
    "film": Hostile(
        lambda: net(
            lambda self, x, z: (lambda gb: self.o(self.a(x) * (1 + gb[0][:, :, None, None]) + gb[1][:, :, None, None]))(
                self.f(z).chunk(2, 1)
            ),
            a=c3(3, 8),
            f=linear(6, 16),
            o=c3(8, 3),
        ),
        (image(), torch.randn(2, 6, dtype=torch.float64)),
        [],
    ),
    "adain": Hostile(
        lambda: net(
            lambda self, x, z: (lambda y, s: self.o(F.instance_norm(y) * s[:, :8, None, None] + s[:, 8:, None, None]))(
                self.a(x), self.f(z)
            ),
            a=c3(3, 8),
            f=linear(6, 16),
            o=c3(8, 3),
        ),
        (image(), torch.randn(2, 6, dtype=torch.float64)),
        [],
    ),
    "eca conv1d over channels": Hostile(
        lambda: net(
            lambda self, x: (
                lambda y: self.o(y * torch.sigmoid(self.k(y.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1)))
            )(self.a(x)),
            a=c3(3, 8),
            k=nn.Conv1d(1, 1, 3, padding=1),
            o=c3(8, 3),
        ),
        frozen="a kernel slides over it at k",
    ),
    "global context block": Hostile(
        lambda: net(
            lambda self, x: (
                lambda y: self.o(y + self.t((y.flatten(2) @ self.m(y).flatten(2).softmax(-1).transpose(1, 2)).unsqueeze(-1)))
            )(self.a(x)),
            a=c3(3, 8),
            m=conv(8, 1, 1),
            t=nn.Sequential(conv(8, 4, 1), nn.LayerNorm([4, 1, 1]), nn.ReLU(), conv(4, 8, 1)),
            o=c3(8, 3),
        )
    ),
    "nonlocal block": Hostile(
        lambda: net(
            lambda self, x: (
                lambda y: self.o(
                    y
                    + self.z(
                        (
                            self.g(y).flatten(2)
                            @ (self.q(y).flatten(2).transpose(1, 2) @ self.k(y).flatten(2)).softmax(-1).transpose(1, 2)
                        ).view(y.shape[0], 4, y.shape[2], y.shape[3])
                    )
                )
            )(self.a(x)),
            a=c3(3, 8),
            q=conv(8, 4, 1),
            k=conv(8, 4, 1),
            g=conv(8, 4, 1),
            z=conv(4, 8, 1),
            o=c3(8, 3),
        )
    ),
    "coordinate conv": Hostile(
        lambda: net(
            lambda self, x: self.b(
                torch.cat(
                    [
                        F.relu(self.a(x)),
                        torch.linspace(-1, 1, x.shape[3], dtype=x.dtype).expand(x.shape[0], 1, x.shape[2], x.shape[3]),
                    ],
                    1,
                )
            ),
            a=c3(3, 8),
            b=c3(9, 3),
        )
    ),
    "squeeze one-channel cat": Hostile(
        lambda: net(
            lambda self, x: self.b(torch.cat([self.a(x), x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)),
            a=c3(3, 8),
            b=c3(10, 3),
        )
    ),
    "res2net": Hostile(
        lambda: net(
            lambda self, x: (
                lambda s: self.o(torch.cat([s[0], (y1 := self.c1(s[1])), (y2 := self.c2(s[2] + y1)), self.c3(s[3] + y2)], 1))
            )(self.a(x).chunk(4, 1)),
            a=c3(3, 16),
            c1=c3(4, 4),
            c2=c3(4, 4),
            c3=c3(4, 4),
            o=c3(16, 3),
        )
    ),
    "hourglass ghost": Hostile(
        lambda: net(
            lambda self, x: (lambda p: self.o(torch.cat([p, self.ch(p)], 1)[:, :7]))(self.a(x)),
            a=c3(3, 4),
            ch=c3(4, 4, groups=4),
            o=c3(7, 3),
        )
    ),
    "sknet select": Hostile(
        lambda: net(
            lambda self, x: (
                lambda u, v: self.o(
                    (torch.stack([u, v], 1) * self.f((u + v).mean((2, 3))).view(x.shape[0], 2, 8, 1, 1).softmax(1)).sum(1)
                )
            )(self.a(x), self.b(x)),
            a=c3(3, 8),
            b=c3(3, 8),
            f=linear(8, 16),
            o=c3(8, 3),
        )
    ),
    "resnest split attn": Hostile(
        lambda: net(
            lambda self, x: (
                lambda y: (lambda g: self.o((y.view(x.shape[0], 2, 8, *y.shape[2:]) * g).sum(1)))(
                    self.f2(F.relu(self.f1(y.view(x.shape[0], 2, 8, *y.shape[2:]).sum(1).mean((2, 3), keepdim=True))))
                    .view(x.shape[0], 2, 8, 1, 1)
                    .softmax(1)
                )
            )(self.a(x)),
            a=c3(3, 16),
            f1=conv(8, 4, 1),
            f2=conv(4, 16, 1),
            o=c3(8, 3),
        )
    ),
    "capsule routing-free": Hostile(
        lambda: net(
            lambda self, x: (lambda u: self.o((u / (u.norm(dim=-1, keepdim=True) + 1e-06)).flatten(1)))(
                self.a(x).mean((2, 3)).view(-1, 4, 2)
            ),
            a=c3(3, 8),
            o=linear(8, 3),
        )
    ),
    "cosine classifier": Hostile(
        lambda: net(
            lambda self, x: F.linear(F.normalize(self.a(x).mean((2, 3))), F.normalize(self.w)),
            a=c3(3, 8),
            w=nn.Parameter(torch.randn(5, 8)),
        )
    ),
    "cdist prototypes": Hostile(
        lambda: net(lambda self, x: torch.cdist(self.a(x), self.p), a=linear(6, 8), p=nn.Parameter(torch.randn(5, 8))),
        *TOKENS,
    ),
    "vq nearest": Hostile(
        lambda: net(
            lambda self, x: (
                lambda z: self.b(F.embedding((z[..., None, :] - self.p).square().sum(-1).argmin(-1), self.p) + z)
            )(self.a(x)),
            a=linear(6, 8),
            p=nn.Parameter(torch.randn(5, 8)),
            b=linear(8, 3),
        ),
        *TOKENS,
    ),
    "densenet memory cat list": Hostile(
        lambda: net(
            lambda self, x: (lambda fs: self.o(torch.cat([fs.append(m(torch.cat(fs, 1))) or fs[-1] for m in self.ls], 1)))(
                [self.a(x)]
            ),
            a=c3(3, 4),
            ls=nn.ModuleList([c3(4, 4), c3(8, 4), c3(12, 4)]),
            o=c3(12, 3),
        )
    ),
    "interpolate size + cat + 1x1": Hostile(
        lambda: net(
            lambda self, x: self.o(
                torch.cat([F.interpolate(self.a(x), size=x.shape[2:], mode="bilinear", align_corners=False), self.b(x)], 1)
            ),
            a=c3(3, 8, stride=2),
            b=c3(3, 4),
            o=conv(12, 3, 1),
        )
    ),
    "adaptive pools spp": Hostile(
        lambda: net(
            lambda self, x: self.o(torch.cat([F.adaptive_avg_pool2d(self.a(x), s).flatten(1) for s in (1, 2, 3)], 1)),
            a=c3(3, 8),
            o=linear(8 * 14, 3),
        )
    ),
    "deep sets sum": Hostile(
        lambda: net(
            lambda self, x: self.o(F.relu(self.b(F.relu(self.a(x)).sum(1)))), a=linear(6, 8), b=linear(8, 8), o=linear(8, 3)
        ),
        *TOKENS,
    ),
    "siamese abs diff": Hostile(
        lambda: net(
            lambda self, x, y: self.o((self.a(x) - self.a(y)).abs().mean((2, 3))),
            a=nn.Sequential(c3(3, 8), nn.ReLU(), c3(8, 6)),
            o=linear(6, 3),
        ),
        (image(), image(seed=2)),
        [],
    ),
    "clip two tower dot": Hostile(
        lambda: net(
            lambda self, x, y: F.normalize(self.a(x).mean((2, 3)), dim=-1) @ F.normalize(self.b(y).mean(1), dim=-1).t(),
            a=c3(3, 8),
            b=linear(6, 8),
        ),
        (image(), tokens()),
        [],
    ),
    "vae reparam": Hostile(
        lambda: net(
            lambda self, x: (lambda m, v: self.d(m + torch.exp(0.5 * v) * torch.ones_like(v)))(*self.e(x).chunk(2, -1)),
            e=linear(6, 16),
            d=linear(8, 6),
        ),
        *TOKENS,
    ),
    "autoencoder convT outputpad": Hostile(
        lambda: nn.Sequential(
            c3(3, 8, stride=2), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1), nn.ReLU(), c3(6, 3)
        )
    ),
    "glow coupling": Hostile(
        lambda: net(
            lambda self, x: (lambda a, b: torch.cat([a, b * torch.exp(self.s(F.relu(self.n(a))))], 1))(
                *self.st(x).chunk(2, 1)
            ),
            st=c3(3, 8),
            n=c3(4, 6),
            s=c3(6, 4),
        )
    ),
    "meshgrid positional": Hostile(
        lambda: net(
            lambda self, x: self.o(
                self.a(x)
                + self.p(
                    torch.stack(
                        torch.meshgrid(
                            torch.arange(10, dtype=torch.float64), torch.arange(10, dtype=torch.float64), indexing="ij"
                        ),
                        -1,
                    )
                ).permute(2, 0, 1)
            ),
            a=c3(3, 8),
            p=linear(2, 8),
            o=c3(8, 3),
        ),
        X,
        [(image(batch=3),)],
    ),
    "fourier features": Hostile(
        lambda: net(
            lambda self, x: (lambda z: self.o(torch.cat([z.sin(), z.cos()], -1)))(x @ self.B),
            B=torch.randn(6, 8),
            o=linear(16, 3),
        ),
        *TOKENS,
    ),
    "sinusoid time mlp": Hostile(
        lambda: net(
            lambda self, x, t: self.o(
                F.silu(
                    self.a(x)
                    + self.t2(F.silu(self.t1(torch.cat([(t[:, None] * self.f).sin(), (t[:, None] * self.f).cos()], -1))))[
                        :, :, None, None
                    ]
                )
            ),
            a=c3(3, 8),
            t1=linear(8, 12),
            t2=linear(12, 8),
            f=torch.rand(4),
            o=c3(8, 3),
        ),
        (image(), torch.rand(2, dtype=torch.float64)),
        [],
    ),
    "YOLO's C3": Hostile(
        lambda: net(
            lambda self, x: (lambda y: self.o(self.f(torch.cat([self.b(self.p(y)), self.q(y)], 1))))(self.a(x)),
            a=c3(3, 8),
            p=conv(8, 4, 1),
            q=conv(8, 4, 1),
            b=nn.Sequential(c3(4, 4), nn.SiLU(), c3(4, 4)),
            f=conv(8, 8, 1),
            o=c3(8, 3),
        )
    ),
    "yolo detect reshape": Hostile(
        lambda: net(
            lambda self, x: (lambda y: y.view(y.shape[0], 2, 5, *y.shape[2:]).permute(0, 1, 3, 4, 2))(
                self.d(F.relu(self.a(x)))
            ),
            a=c3(3, 8),
            d=conv(8, 10, 1),
        )
    ),
    "dfl": Hostile(
        lambda: net(
            lambda self, x: (
                lambda b: F.conv2d(b.view(b.shape[0], 4, 4, -1).transpose(2, 1).softmax(1), self.w.view(1, 4, 1, 1))
            )(self.d(F.relu(self.a(x))).flatten(2)),
            a=c3(3, 8),
            d=conv(8, 16, 1),
            w=torch.arange(4.0),
        )
    ),
    "conv1d on channels-as-length": Hostile(
        lambda: net(
            lambda self, x: self.o(self.k(self.a(x).transpose(1, 2)).transpose(1, 2)),
            a=linear(6, 8),
            k=nn.Conv1d(8, 8, 3, padding=1, groups=4),
            o=linear(8, 3),
        ),
        *TOKENS,
    ),
    "temporal conv stack residual": Hostile(
        lambda: net(
            lambda self, x: (lambda y: self.o(y + F.pad(self.k(y), (2, 0))[..., : y.shape[-1]]))(self.a(x.transpose(1, 2))),
            a=nn.Conv1d(6, 8, 1),
            k=nn.Conv1d(8, 8, 3, padding=0),
            o=nn.Conv1d(8, 3, 1),
        ),
        *TOKENS,
    ),
    "wavenet gated": Hostile(
        lambda: net(
            lambda self, x: (lambda y: self.o(self.r(torch.tanh(self.f(y)) * torch.sigmoid(self.g(y))) + y))(
                self.a(x.transpose(1, 2))
            ),
            a=nn.Conv1d(6, 8, 1),
            f=nn.Conv1d(8, 6, 3, padding=1),
            g=nn.Conv1d(8, 6, 3, padding=1),
            r=nn.Conv1d(6, 8, 1),
            o=nn.Conv1d(8, 3, 1),
        ),
        *TOKENS,
    ),
    "mamba-ish elementwise scan": Hostile(
        lambda: net(
            scan,
            i=linear(6, 16),
            dt=linear(8, 8),
            A=nn.Parameter(torch.randn(8, 4)),
            B=linear(8, 4),
            C=linear(8, 4),
            o=linear(8, 3),
        ),
        *TOKENS,
    ),
    "graph conv adjacency": Hostile(
        lambda: net(lambda self, x: self.o(F.relu(self.A @ self.a(x))), A=torch.rand(7, 7), a=linear(6, 8), o=linear(8, 3)),
        T,
        [(tokens(batch=3),)],
    ),
    "graph conv adjacency input": Hostile(
        lambda: net(lambda self, x, near: self.o(F.relu(near @ self.a(x))), a=linear(6, 8), o=linear(8, 3)),
        (tokens(), torch.rand(2, 7, 7, dtype=torch.float64)),
        [],
    ),
    "moe stacked expert weights einsum": Hostile(
        lambda: net(
            lambda self, x: (lambda g, h: torch.einsum("bne,bneh,eho->bno", g, h, self.w2))(
                self.g(x).softmax(-1), F.gelu(torch.einsum("bnd,edh->bneh", x, self.w1))
            ),
            g=linear(6, 4),
            w1=nn.Parameter(torch.randn(4, 6, 8)),
            w2=nn.Parameter(torch.randn(4, 8, 3)),
        ),
        *TOKENS,
    ),
    "low-rank bilinear": Hostile(
        lambda: net(
            lambda self, x: torch.einsum("bi,ij,bj->b", self.a(x).mean(1), self.w, self.b(x).mean(1)),
            a=linear(6, 8),
            b=linear(6, 5),
            w=nn.Parameter(torch.randn(8, 5)),
        ),
        *TOKENS,
    ),
    "cp tensor product sum": Hostile(
        lambda: net(
            lambda self, x: self.o(self.a(x) * self.b(x) * self.c(x)),
            a=linear(6, 8),
            b=linear(6, 8),
            c=linear(6, 8),
            o=linear(8, 3),
        ),
        *TOKENS,
    ),
}
