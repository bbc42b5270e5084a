"""Random networks for pruning: maps and sequences of channels that are convolved, normalised, joined, moved and attended.

A network is drawn as a program over a pool of live values. It runs on any batch and any image size that 4 divides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests import channel_blocks as blocks
from tests.channel_blocks import FUNCTIONS, Attention, Excite, Norm2d
from tests.channel_cases import lived_in

__all__ = ["Drawn", "Program", "channel_networks"]

WIDTHS = [4, 6, 8, 12]


class Program(nn.Module):
    """Runs drawn steps: (what, operands, layer), where a layer of -1 means that ``what`` names a function.

    ``asks`` for the size of its input, so that it is captured by export.
    """

    def __init__(self, steps: list[tuple[str, tuple[int, ...], int]], layers: list[nn.Module], asks: bool) -> None:
        super().__init__()
        self.steps, self.layers, self.asks = steps, nn.ModuleList(layers), asks

    def forward(self, x: Tensor) -> Any:
        if self.asks and x.shape[1] != 3:
            raise ValueError("it takes three channels")
        pool = [x]
        for what, operands, layer in self.steps:
            values = [pool[i] for i in operands]
            pool.append(self.layers[layer](*values) if layer >= 0 else FUNCTIONS[what](*values))
        return pool[-1]


ACTIVATIONS = ["relu", "sigmoid", "gelu", "hardswish", "times two", "plus one", "negative", "atan"]
RESHAPED = {"twice": 2.0, "each twice": 2.0, "every other": 0.5, "first half": 0.5, "second half": 0.5}
RESHAPED |= {"halves gate": 0.5, "F.glu": 0.5, "flip": 1.0, "roll": 1.0, "shuffled": 1.0, "strongest gates": 1.0}
SAME = ["by their number", "gated by one", "shared gate", "mirrored in space", "a row overwritten", "sorted in space"]


@dataclass(frozen=True)
class Live:
    """A value: its channels, its size as a power of two of the input's, and the map a sequence was made from."""

    channels: int
    scale: int = 0
    like: int | None = None


@dataclass
class Draft:
    """The program while it is drawn."""

    draw: Callable[[Any], Any]
    live: list[Live] = field(default_factory=lambda: [Live(3)])
    steps: list[tuple[str, tuple[int, ...], int]] = field(default_factory=list)
    layers: list[nn.Module] = field(default_factory=list)

    def emit(self, what: str | nn.Module, operands: tuple[int, ...], live: Live) -> int:
        layer = -1
        if isinstance(what, nn.Module):
            self.layers.append(what)
            layer, what = len(self.layers) - 1, type(what).__name__
        self.steps.append((what, operands, layer))
        self.live.append(live)
        return len(self.live) - 1

    def again(self, layer: int, operands: tuple[int, ...], live: Live) -> int:
        """A layer that is there already is called once more."""
        self.steps.append((type(self.layers[layer]).__name__, operands, layer))
        self.live.append(live)
        return len(self.live) - 1

    def pick(self, sequence: bool = False) -> int | None:
        """A live value, the newest most often; not the input."""
        fitting = [i for i, live in enumerate(self.live) if i and (live.like is not None) == sequence]
        return fitting[-1 - self.draw(st.integers(0, min(3, len(fitting) - 1)))] if fitting else None

    def partner(self, index: int, same_width: bool) -> int:
        own = self.live[index]
        fitting = [
            i
            for i, live in enumerate(self.live)
            if i
            and (live.scale, live.like) == (own.scale, own.like)
            and (live.channels == own.channels if same_width else live.channels + own.channels <= 24)
        ]
        return int(self.draw(st.sampled_from(fitting or [index])))


def convolution(draft: Draft, source: int) -> None:
    live = draft.live[source]
    kinds = ["plain", "plain", "1x1", "depth", "depth2", "groups", "transposed", "normalised", "again"]
    width, kind = live.channels, draft.draw(st.sampled_from(kinds))
    known = [i for i, layer in enumerate(draft.layers) if type(layer) is nn.Conv2d and layer.in_channels == width]
    if kind == "again" and known:
        layer = draft.draw(st.sampled_from(known))
        draft.again(layer, (source,), Live(int(draft.layers[layer].out_channels), live.scale))  # type: ignore[arg-type]
        return
    bias = draft.draw(st.booleans())
    if kind == "depth":
        conv: nn.Module = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=bias)
        out = width
    elif kind == "depth2":
        conv, out = nn.Conv2d(width, 2 * width, 1, groups=width, bias=bias), 2 * width
    else:
        out = draft.draw(st.sampled_from(WIDTHS))
        groups = 2 if kind in ("groups", "transposed") and width % 2 == 0 and draft.draw(st.booleans()) else 1
        if kind == "transposed":
            conv = nn.ConvTranspose2d(width, out, 3, padding=1, groups=groups, bias=bias)
        elif kind == "1x1":
            conv = nn.Conv2d(width, out, 1, bias=bias)
        elif kind == "normalised":
            conv = parametrizations.weight_norm(nn.Conv2d(width, out, 3, padding=1, bias=bias))
        else:
            conv = nn.Conv2d(width, out, 3, padding=1, groups=groups, bias=bias)
    draft.emit(conv, (source,), Live(out, live.scale))


def normalise(draft: Draft, source: int) -> None:
    live = draft.live[source]
    width = live.channels
    norms = [nn.BatchNorm2d(width), nn.InstanceNorm2d(width, affine=True), nn.PReLU(width), Norm2d(width)]
    norms += [blocks.Scaled(width, False), nn.Softmax2d()]
    norms += [nn.GroupNorm(2, width)] if width % 2 == 0 and width > 2 else []
    draft.emit(norms[draft.draw(st.integers(0, len(norms) - 1))], (source,), live)


def activate(draft: Draft, source: int) -> None:
    draft.emit(draft.draw(st.sampled_from(ACTIVATIONS)), (source,), draft.live[source])


def combine(draft: Draft, source: int) -> None:
    other = draft.partner(source, same_width=True)
    what = draft.draw(st.sampled_from(["add", "multiply", "average", "largest where"]))
    draft.emit(what, (source, other), draft.live[source])


def join(draft: Draft, source: int) -> None:
    live, sequence = draft.live[source], draft.live[source].like is not None
    other = draft.partner(source, same_width=False)
    total = live.channels + draft.live[other].channels
    if sequence:
        draft.emit("cat last", (source, other), Live(total, live.scale, live.like))
    elif live.channels == draft.live[other].channels and draft.draw(st.booleans()):
        draft.emit("interleaved", (source, other), Live(total, live.scale))
    else:
        draft.emit("cat", (source, other), Live(total, live.scale))


def rearrange(draft: Draft, source: int) -> None:
    live = draft.live[source]
    what = draft.draw(st.sampled_from([*RESHAPED, *SAME, "all but one", "listed", "padded", "thirds", "folded"]))
    width = live.channels
    if what in SAME or (what == "thirds" and width >= 3) or (what == "folded" and live.scale > -2):
        named = {"thirds": "thirds in another order", "folded": "blocks folded"}.get(what, what)
        draft.emit(named, (source,), live)
    elif what in RESHAPED and width % 2 == 0 and 2 <= width * RESHAPED[what] <= 24:
        draft.emit(what, (source,), Live(int(width * RESHAPED[what]), live.scale))
    elif what == "all but one" and width > 2:
        draft.emit(what, (source,), Live(width - 1, live.scale))
    elif what == "listed" and width >= 4:
        draft.emit(what, (source,), Live(4, live.scale))
    elif what == "padded":
        draft.emit(what, (source,), Live(width + 3, live.scale))


def resize(draft: Draft, source: int) -> None:
    live = draft.live[source]
    what = draft.draw(st.sampled_from(["max pool", "upsample", "pixel shuffle", "pixel unshuffle"]))
    if what == "max pool" and live.scale > -2:
        draft.emit(what, (source,), Live(live.channels, live.scale - 1))
    elif what == "upsample" and live.scale < 0:
        draft.emit(what, (source,), Live(live.channels, live.scale + 1))
    elif what == "pixel shuffle" and live.scale < 1 and live.channels % 4 == 0:
        draft.emit(what, (source,), Live(live.channels // 4, live.scale + 1))
    elif what == "pixel unshuffle" and live.scale > -2 and live.channels <= 6:
        draft.emit(what, (source,), Live(live.channels * 4, live.scale - 1))


def excite(draft: Draft, source: int) -> None:
    made = draft.draw(st.sampled_from([Excite, Excite, blocks.Involution]))
    draft.emit(made(draft.live[source].channels), (source,), draft.live[source])


def to_sequence(draft: Draft, source: int) -> None:
    live = draft.live[source]
    made = draft.emit("to sequence", (source,), Live(live.channels, live.scale, source))
    for _ in range(draft.draw(st.integers(1, 3))):
        made = sequence_step(draft, made)
    if draft.draw(st.booleans()):
        draft.emit("to map", (made, source), Live(draft.live[made].channels, live.scale))


def sequence_step(draft: Draft, source: int) -> int:
    live = draft.live[source]
    width = live.channels
    what = draft.draw(st.sampled_from([*MIXING, *KEEPING, "act", "add", "cat", "some"]))
    out = draft.draw(st.sampled_from(WIDTHS))
    if what in MIXING:
        return draft.emit(MIXING[what](draft, width, out), (source,), Live(out, live.scale, live.like))
    if what in ("attention", "norm"):
        return draft.emit(KEEPING[what](draft, width), (source,), live)
    if what == "some" and live.like is not None:
        kept = draft.emit("some tokens", (source,), live)
        return draft.emit("add", (source, draft.emit("mean of tokens", (kept,), live)), live)
    {"act": activate, "add": combine, "cat": join}.get(what, activate)(draft, source)
    return len(draft.live) - 1


def attention_layer(draft: Draft, width: int) -> nn.Module:
    """Attention of any kind that keeps its width."""
    what = draft.draw(st.sampled_from(["apart", "packed", "by hand", "torch"] if width % 2 == 0 else ["apart", "packed"]))
    if what == "torch":
        first = draft.draw(st.booleans())
        return nn.TransformerEncoderLayer(width, 2, 8, dropout=0.0, batch_first=True, norm_first=first)
    return blocks.ByHand(width) if what == "by hand" else Attention(width, what == "packed")


def sequence_norm(draft: Draft, width: int) -> nn.Module:
    scaled = blocks.Scaled(width, True)
    return draft.draw(st.sampled_from([nn.LayerNorm(width), nn.RMSNorm(width), nn.LayerNorm(width, bias=False), scaled]))


KEEPING: dict[str, Callable[..., nn.Module]] = {"attention": attention_layer, "norm": sequence_norm}

MIXING: dict[str, Callable[..., nn.Module]] = {
    "linear": lambda draft, width, out: nn.Linear(width, out, bias=draft.draw(st.booleans())),
    "product": lambda draft, width, out: blocks.Summed(
        width, out, draft.draw(st.sampled_from(["linear", "matmul", "einsum", "from the left"]))
    ),
    "taps": lambda draft, width, out: blocks.Taps(width, out, 2 if width % 2 == 0 else 1),
    "recurrent": lambda draft, width, out: blocks.Recurrent(
        draft.draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN])), width, out
    ),
}
"""Steps of a sequence that make channels of another number."""


STEPS = (convolution, convolution, convolution, normalise, activate, combine, join, rearrange, rearrange, resize, excite)


class Drawn:
    """A network in float64 and eval mode, and images of two sizes for it."""

    def __init__(self, model: Program, small: Tensor, large: Tensor) -> None:
        self.model, self.small, self.large = model, small, large

    def __repr__(self) -> str:
        return f"{self.model.steps} with {[*self.model.layers]}"


@st.composite
def channel_networks(draw: Any, max_steps: int = 10) -> Drawn:
    """A network of up to ``max_steps`` steps after its first convolution, with one or two heads added up."""
    seed = draw(st.integers(0, 2**16))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draft = Draft(draw)
        first = draw(st.sampled_from(WIDTHS))
        draft.emit(nn.Conv2d(3, first, 3, padding=1), (0,), Live(first))
        for _ in range(draw(st.integers(1, max_steps))):
            source = draft.pick()
            assert source is not None
            draw(st.sampled_from((*STEPS, to_sequence)))(draft, source)
        heads = [head(draft, i) for i in {len(draft.live) - 1, draft.pick()} if i is not None]
        if len(heads) > 1:
            draft.emit(draw(st.sampled_from(["add", "several"])), (heads[0], heads[1]), Live(3))
        model = lived_in(Program(draft.steps, draft.layers, draw(st.sampled_from([False] * 7 + [True]))), seed)
        small, large = (torch.randn(n, 3, size, size, dtype=torch.float64) for n, size in ((2, 8), (3, 12)))
    return Drawn(model, small, large)


def head(draft: Draft, source: int) -> int:
    live = draft.live[source]
    if live.like is not None:
        flat, width = "over the sequence", live.channels
    else:
        flat = draft.draw(st.sampled_from(["pooled", "flat", "flat, channels last"]))
        width = live.channels * (1 if flat == "pooled" else 4)
    made = draft.emit(flat, (source,), Live(width))
    return draft.emit(nn.Linear(width, 3), (made,), Live(3))
