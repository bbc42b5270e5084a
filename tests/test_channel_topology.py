"""Which channels go together: chains, residuals, joins, branches, shared layers, gates and parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress import PassManager, trace
from fxcompress.graph.channels import analyse
from tests.channel_cases import Case, c3, check, image, lived_in, net, prune, tokens

conv, linear = nn.Conv2d, nn.Linear


def features(x: Tensor) -> Tensor:
    return x.mean((2, 3))


CHAINS = {
    "conv, bn, relu, conv": Case(
        lambda: nn.Sequential(c3(3, 8), nn.BatchNorm2d(8), nn.ReLU(), c3(8, 4)),
        {"0.weight": (4, 3, 3, 3), "0.bias": (4,), "1.weight": (4,), "1.running_var": (4,), "3.weight": (4, 4, 3, 3)},
    ),
    "flatten to linear takes blocks of height times width": Case(
        lambda: nn.Sequential(c3(3, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), linear(72, 5)),
        {"0.weight": (4, 3, 3, 3), "4.weight": (5, 36)},
    ),
    "the input's own space, flattened": Case(
        lambda: nn.Sequential(c3(3, 8), nn.Flatten(), linear(8 * 16, 5)),
        {"0.weight": (4, 3, 3, 3), "2.weight": (5, 64)},
        (image(size=4),),
        [(image(size=4, batch=5),)],
    ),
    "conv1d": Case(
        lambda: nn.Sequential(nn.Conv1d(6, 8, 3), nn.ReLU(), nn.Flatten(), linear(8 * 5, 3)),
        {"0.weight": (4, 6, 3), "3.weight": (3, 20)},
        (tokens(7, 6),),
        [(tokens(7, 6, 4),)],
    ),
    "conv3d": Case(
        lambda: nn.Sequential(nn.Conv3d(2, 8, 2), nn.ReLU(), nn.Flatten(), linear(8 * 8, 3)),
        {"0.weight": (4, 2, 2, 2, 2), "3.weight": (3, 32)},
        (torch.randn(2, 2, 3, 3, 3, dtype=torch.float64),),
        [(torch.randn(3, 2, 3, 3, 3, dtype=torch.float64),)],
    ),
    "view to a number": Case(
        lambda: net(
            lambda self, x: self.head(F.adaptive_avg_pool2d(self.conv(x), 2).view(x.size(0), 32)),
            conv=c3(3, 8),
            head=linear(32, 5),
        ),
        {"conv.weight": (4, 3, 3, 3), "head.weight": (5, 16)},
    ),
    "view with a free batch": Case(
        lambda: net(
            lambda self, x: self.head(torch.reshape(F.adaptive_avg_pool2d(self.conv(x), 2), (-1, 8 * 2 * 2))),
            conv=c3(3, 8),
            head=linear(32, 5),
        ),
        {"conv.weight": (4, 3, 3, 3), "head.weight": (5, 16)},
    ),
    "view from features to maps": Case(
        lambda: net(
            lambda self, x: self.conv(torch.relu(self.lift(x)).view(-1, 8, 2, 2)), lift=linear(6, 32), conv=conv(8, 3, 2)
        ),
        {"lift.weight": (16, 6), "conv.weight": (3, 4, 2, 2)},
        (tokens(6)[:, 0],),
        [(tokens(6, batch=5)[:, 0],)],
    ),
    "channels last, strides interleaved": Case(
        lambda: net(
            lambda self, x: self.head(F.adaptive_avg_pool2d(self.conv(x), 3).permute(0, 2, 3, 1).reshape(x.shape[0], -1)),
            conv=c3(3, 8),
            head=linear(72, 5),
        ),
        {"conv.weight": (4, 3, 3, 3), "head.weight": (5, 36)},
    ),
    "channels last with a number": Case(
        lambda: net(
            lambda self, x: self.head(F.adaptive_avg_pool2d(self.conv(x), 3).permute(0, 2, 3, 1).reshape(-1, 72)),
            conv=c3(3, 8),
            head=linear(72, 5),
        ),
        {"conv.weight": (4, 3, 3, 3), "head.weight": (5, 36)},
    ),
}


def chain(n: int) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block[2](torch.relu(block[1](block[0](x))))
        return self.head(torch.relu(x))

    blocks = nn.ModuleList(nn.ModuleList([c3(8, 6), nn.BatchNorm2d(6), c3(6, 8)]) for _ in range(n))
    return net(forward, stem=c3(3, 8), blocks=blocks, head=c3(8, 2))


RESIDUALS = {
    "residual": Case(
        lambda: chain(1), {"stem.weight": (4, 3, 3, 3), "blocks.0.0.weight": (3, 4, 3, 3), "blocks.0.2.weight": (4, 3, 3, 3)}
    ),
    "three residuals": Case(
        lambda: chain(3),
        {
            "stem.weight": (4, 3, 3, 3),
            **{f"blocks.{i}.2.weight": (4, 3, 3, 3) for i in range(3)},
            "head.weight": (2, 4, 3, 3),
        },
    ),
    "residual with a projection": Case(
        lambda: net(
            lambda self, x: self.head(torch.relu(self.b(torch.relu(self.a(self.stem(x)))) + self.skip(self.stem(x)))),
            stem=c3(3, 6),
            a=c3(6, 8),
            b=c3(8, 10),
            skip=conv(6, 10, 1),
            head=c3(10, 2),
        ),
        {"stem.weight": (3, 3, 3, 3), "b.weight": (5, 4, 3, 3), "skip.weight": (5, 3, 1, 1), "head.weight": (2, 5, 3, 3)},
    ),
    "the identity is the model's input": Case(
        lambda: net(lambda self, x: self.head(x + self.b(torch.relu(self.a(x)))), a=c3(3, 8), b=c3(8, 3), head=c3(3, 2)),
        {"a.weight": (4, 3, 3, 3), "b.weight": (3, 4, 3, 3), "head.weight": (2, 3, 3, 3)},
        frozen={"b": "fixed size"},
    ),
}


def joined(join: Any, head: Any, second: int = 8) -> Any:
    return net(lambda self, x: self.head(torch.relu(join(self.a(x), self.b(x)))), a=c3(3, 8), b=c3(3, second), head=head)


def dense_block(self: Any, x: Tensor) -> Tensor:
    kept = [self.stem(x)]
    for layer in self.layers:
        kept.append(layer[1](torch.relu(layer[0](torch.cat(kept, 1)))))
    return self.head(torch.cat(kept, 1))


def with_tokens(join: Any, head: Any) -> Any:
    return net(lambda self, x: self.head(torch.relu(join(self.a(x), self.b(x)))), a=linear(6, 8), b=linear(6, 8), head=head)


JOINS = {
    "cat": Case(
        lambda: joined(lambda a, b: torch.cat([a, b], 1), c3(14, 2), 6),
        {"a.weight": (4, 3, 3, 3), "b.weight": (3, 3, 3, 3), "head.weight": (2, 7, 3, 3)},
    ),
    "cat of one tensor twice": Case(
        lambda: joined(lambda a, b: torch.cat([a, b, a], dim=1), c3(22, 2), 6), {"head.weight": (2, 11, 3, 3)}
    ),
    "cat along the last dimension, counted from the front": Case(
        lambda: with_tokens(lambda a, b: torch.cat((a, b), dim=2), linear(16, 3)), {"head.weight": (3, 8)}, (tokens(),), []
    ),
    "cat along the last dimension, counted from the back": Case(
        lambda: with_tokens(lambda a, b: torch.concat((a, b), dim=-1), linear(16, 3)),
        {"head.weight": (3, 8)},
        (tokens(),),
        [(tokens(length=4),)],
    ),
    "cat over the sequence joins the channels": Case(
        lambda: with_tokens(lambda a, b: torch.cat((a, b), dim=1), linear(8, 3)),
        {"a.weight": (4, 6), "b.weight": (4, 6), "head.weight": (3, 4)},
        (tokens(),),
        [(tokens(length=4),)],
    ),
    "cat over space joins the channels": Case(
        lambda: joined(lambda a, b: torch.cat([a, b], 3), c3(8, 2)), {"head.weight": (2, 4, 3, 3)}
    ),
    "dense block": Case(
        lambda: net(
            dense_block,
            stem=c3(3, 8),
            layers=nn.ModuleList(nn.ModuleList([nn.BatchNorm2d(8 + 4 * i), c3(8 + 4 * i, 4)]) for i in range(3)),
            head=c3(20, 2),
        ),
        {"layers.2.0.weight": (8,), "layers.2.1.weight": (2, 8, 3, 3), "head.weight": (2, 10, 3, 3)},
    ),
    "cat and add": Case(
        lambda: net(
            lambda self, x: self.head(torch.cat([self.a(x), self.b(x)], 1) + self.c(x)),
            a=c3(3, 8),
            b=c3(3, 4),
            c=c3(3, 12),
            head=c3(12, 2),
        ),
        {"a.weight": (4, 3, 3, 3), "b.weight": (2, 3, 3, 3), "c.weight": (6, 3, 3, 3), "head.weight": (2, 6, 3, 3)},
    ),
    "a group that spans the parts of a cat": Case(
        lambda: net(
            lambda self, x: self.head(self.mix(torch.cat([self.a(x), self.b(x)], 1))),
            a=c3(3, 4),
            b=c3(3, 8),
            mix=c3(12, 12, groups=2),
            head=c3(12, 2),
        ),
        {"mix.weight": (6, 3, 3, 3), "head.weight": (2, 6, 3, 3)},
    ),
}


def unet(self: Any, x: Tensor) -> Tensor:
    a = torch.relu(self.a(x))
    b = torch.relu(self.b(F.max_pool2d(a, 2)))
    up = F.interpolate(self.c(b), size=a.shape[2:], mode="nearest")
    return self.head(torch.relu(self.d(torch.cat([up, a], 1))))


def pyramid(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    a = torch.relu(self.a(x))
    b = torch.relu(self.b(F.max_pool2d(a, 2)))
    top = self.side_b(b)
    low = self.side_a(a) + F.interpolate(top, size=a.shape[-2:], mode="bilinear", align_corners=False)
    return self.head(top), self.head(low)


def trunk(self: Any, x: Tensor) -> dict[str, Tensor]:
    x = torch.relu(self.trunk(x))
    return {"a": self.a(x), "b": self.b(features(x))}


BRANCHES = {
    "U-Net": Case(
        lambda: net(unet, a=c3(3, 8), b=c3(8, 12), c=c3(12, 6), d=c3(14, 10), head=c3(10, 2)),
        {"a.weight": (4, 3, 3, 3), "c.weight": (3, 6, 3, 3), "d.weight": (5, 7, 3, 3)},
    ),
    "feature pyramid": Case(
        lambda: net(pyramid, a=c3(3, 8), b=c3(8, 12), side_a=conv(8, 6, 1), side_b=conv(12, 6, 1), head=c3(6, 4)),
        {"side_a.weight": (3, 4, 1, 1), "side_b.weight": (3, 6, 1, 1), "head.weight": (4, 3, 3, 3)},
    ),
    "inception": Case(
        lambda: net(
            lambda self, x: self.head(
                torch.cat([self.a(x), self.b(torch.relu(self.b0(x))), self.c(F.avg_pool2d(x, 3, 1, 1))], 1)
            ),
            a=conv(3, 4, 1),
            b0=conv(3, 6, 1),
            b=c3(6, 8),
            c=conv(3, 2, 1),
            head=c3(14, 2),
        ),
        {"b.weight": (4, 3, 3, 3), "c.weight": (1, 3, 1, 1), "head.weight": (2, 7, 3, 3)},
    ),
    "one trunk, two heads": Case(
        lambda: net(trunk, trunk=c3(3, 8), a=c3(8, 2), b=linear(8, 5)),
        {"trunk.weight": (4, 3, 3, 3), "a.weight": (2, 4, 3, 3), "b.weight": (5, 4)},
    ),
    "a feature map among the outputs stays": Case(
        lambda: net(lambda self, x: (self.head(self.b(self.a(x))), self.a(x)), a=c3(3, 8), b=c3(8, 6), head=c3(6, 2)),
        {"a.weight": (8, 3, 3, 3), "b.weight": (3, 8, 3, 3), "head.weight": (2, 3, 3, 3)},
        frozen={"a": "output of the model"},
    ),
}


def shared_twice(self: Any, x: Tensor) -> Tensor:
    x = self.stem(x)
    return self.head(self.same(torch.relu(self.same(x))))


def siamese(self: Any, x: Tensor, y: Tensor) -> Tensor:
    a, b = (features(torch.relu(self.trunk(image))) for image in (x, y))
    return self.head(torch.abs(a - b))


def tied(vocabulary: int = 11) -> Any:
    model = net(
        lambda self, x: self.head(torch.relu(self.mid(self.emb(x)))),
        emb=nn.Embedding(vocabulary, 8),
        mid=linear(8, 8),
        head=linear(8, vocabulary, bias=False),
    )
    model.head.weight = model.emb.weight
    return model


WORDS = torch.arange(14).reshape(2, 7) % 11

SHARED = {
    "one layer called twice in a row": Case(
        lambda: net(shared_twice, stem=c3(3, 8), same=c3(8, 8), head=c3(8, 2)),
        {"stem.weight": (4, 3, 3, 3), "same.weight": (4, 4, 3, 3), "head.weight": (2, 4, 3, 3)},
    ),
    "one layer called on two inputs": Case(
        lambda: net(siamese, trunk=c3(3, 8), head=linear(8, 2)),
        {"trunk.weight": (4, 3, 3, 3), "head.weight": (2, 4)},
        (image(), image(seed=1)),
        [(image(size=7), image(size=7, seed=1))],
    ),
    "embedding and head are one tensor": Case(
        tied, {"emb.weight": (11, 4), "head.weight": (11, 4), "mid.weight": (4, 4)}, (WORDS,), [(WORDS[:, :3],)]
    ),
}


def cbam(self: Any, x: Tensor) -> Tensor:
    x = torch.relu(self.conv(x))
    squeezed = torch.sigmoid(self.up(torch.relu(self.down(features(x)))))
    x = x * squeezed[:, :, None, None]
    both = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
    return self.head(x * torch.sigmoid(self.where(both)))


def outer(self: Any, x: Tensor) -> Tensor:
    a, b = self.a(x), self.b(x)
    return self.head((a[:, :, None] * b[:, None, :]).flatten(1))


GATES = {
    "a mask of one channel": Case(
        lambda: net(
            lambda self, x: self.head(self.conv(x) * torch.sigmoid(self.mask(x))),
            conv=c3(3, 8),
            mask=c3(3, 1),
            head=c3(8, 2),
        ),
        {"conv.weight": (4, 3, 3, 3), "mask.weight": (1, 3, 3, 3), "head.weight": (2, 4, 3, 3)},
    ),
    "squeeze and excite": Case(
        lambda: net(
            lambda self, x: self.head(
                self.conv(x) * torch.sigmoid(self.up(torch.relu(self.down(self.conv(x).mean((2, 3), keepdim=True)))))
            ),
            conv=c3(3, 8),
            down=conv(8, 4, 1),
            up=conv(4, 8, 1),
            head=c3(8, 2),
        ),
        {"conv.weight": (4, 3, 3, 3), "down.weight": (2, 4, 1, 1), "up.weight": (4, 2, 1, 1), "head.weight": (2, 4, 3, 3)},
    ),
    "CBAM: mean and maximum over channels": Case(
        lambda: net(cbam, conv=c3(3, 8), down=linear(8, 4), up=linear(4, 8), where=c3(2, 1), head=c3(8, 2)),
        {"conv.weight": (4, 3, 3, 3), "up.weight": (4, 2), "where.weight": (1, 2, 3, 3)},
    ),
    "GLU by chunk": Case(
        lambda: net(
            lambda self, x: self.head((lambda a, b: a * torch.sigmoid(b))(*self.conv(x).chunk(2, 1))),
            conv=c3(3, 16),
            head=c3(8, 2),
        ),
        {"conv.weight": (8, 3, 3, 3), "head.weight": (2, 4, 3, 3)},
    ),
    "F.glu": Case(
        lambda: net(lambda self, x: self.head(F.glu(self.conv(x), dim=1)), conv=c3(3, 16), head=c3(8, 2)),
        {"conv.weight": (8, 3, 3, 3), "head.weight": (2, 4, 3, 3)},
    ),
    "nn.GLU on the last dimension": Case(
        lambda: nn.Sequential(linear(6, 16), nn.GLU(), linear(8, 3)),
        {"0.weight": (8, 6), "2.weight": (3, 4)},
        (tokens(),),
        [(tokens(length=3),)],
    ),
    "SwiGLU of two layers": Case(
        lambda: net(
            lambda self, x: self.down(F.silu(self.gate(x)) * self.up(x)),
            gate=linear(6, 8),
            up=linear(6, 8),
            down=linear(8, 6),
        ),
        {"gate.weight": (4, 6), "up.weight": (4, 6), "down.weight": (6, 4)},
        (tokens(),),
        [(tokens(length=3),)],
    ),
    "SwiGLU of one layer": Case(
        lambda: net(
            lambda self, x: self.down((lambda a, b: F.silu(a) * b)(*self.both(x).split(8, dim=-1))),
            both=linear(6, 16),
            down=linear(8, 6),
        ),
        {"both.weight": (8, 6), "down.weight": (6, 4)},
        (tokens(),),
        [(tokens(length=3),)],
    ),
}


def c2f(self: Any, x: Tensor) -> Tensor:
    parts = list(self.a(x).chunk(2, 1))
    parts.extend(layer(parts[-1]) for layer in self.layers)
    return self.head(torch.cat(parts, 1))


def csp(self: Any, x: Tensor) -> Tensor:
    a, b = torch.split(torch.relu(self.a(x)), [4, 8], dim=1)
    return self.head(torch.cat((a, self.b(b)), dim=1))


PARTS = {
    "C2f: the last part feeds the next": Case(
        lambda: net(c2f, a=conv(3, 16, 1), layers=nn.ModuleList([c3(8, 8), c3(8, 8)]), head=conv(32, 2, 1)),
        {"a.weight": (8, 3, 1, 1), "layers.1.weight": (4, 4, 3, 3), "head.weight": (2, 16, 1, 1)},
    ),
    "CSP: unequal parts": Case(
        lambda: net(csp, a=c3(3, 12), b=c3(8, 6), head=c3(10, 2)), {"a.weight": (6, 3, 3, 3), "b.bias": (3,)}
    ),
}

CASES = {**CHAINS, **RESIDUALS, **JOINS, **BRANCHES, **SHARED, **GATES, **PARTS}


@pytest.mark.parametrize("criterion", ["random", "l1_norm"])
@pytest.mark.parametrize("name", CASES)
def test_half_of_the_channels_go_and_the_rest_compute_what_they_did(name: str, criterion: str) -> None:
    check(CASES[name], criterion)


def test_tied_tensors_stay_one_tensor() -> None:
    small, _ = prune(lived_in(tied()), (WORDS,))
    assert small.get_parameter("emb.weight") is small.get_parameter("head.weight")


def test_of_an_outer_product_that_is_flattened_one_factor_loses_channels_and_the_other_says_why_not() -> None:
    whole = {"a.weight": (2, 6), "b.weight": (4, 6), "head.weight": (3, 8)}
    check(
        Case(
            lambda: net(outer, a=linear(6, 4), b=linear(6, 4), head=linear(16, 3)),
            whole,
            (tokens()[:, 0],),
            [(tokens(batch=5)[:, 0],)],
            {"b": "two dimensions are merged"},
        )
    )


def test_slices_in_another_order_do_not_alarm_the_proof() -> None:
    class Rolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            x = torch.cat([self.norm(x), x], 1).roll(3, 1)
            out: torch.Tensor = self.fc(x.mean((2, 3)))
            return out

    torch.manual_seed(0)
    manager = PassManager([{"prune-channels": {"round_to": 1}}], progress=False)
    manager.run(Rolled().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert any(remark.reason.startswith("proved") for remark in manager.ledger.remarks("prune-channels"))


@pytest.mark.parametrize(("gate", "exact"), [(lambda x: 1 - x, False), (lambda x: x + 1, False), (lambda x: x + 0, True)])
def test_a_constant_that_a_channel_leaves_behind_is_not_exact(gate: Any, exact: bool) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.last(gate(self.first(x)))
            return out

    (group,) = analyse(trace(Gated().eval(), torch.randn(2, 6))).groups
    assert (group.inexact == "") is exact
