"""What the pages about reports share: a model whose names are hostile, and a reader that finds whatever would run."""

from __future__ import annotations

from collections import Counter
from html.parser import HTMLParser

import torch
from torch import Tensor, fx, nn

from fxcompress import PassManager

__all__ = ["HOSTILE", "INT8", "Net", "Reader", "harmless", "in_integers", "network", "pictures"]

HOSTILE = "<script>alert(1)</script>"
VOID = {"meta", "link", "br", "hr", "img", "input"}
KNOWN = """html head meta title style body main h1 h2 h3 h4 p a code pre nav ul li dl dt dd div span section footer details
summary table caption thead tbody tr th td figure figcaption svg g rect line text path polyline circle"""


class Reader(HTMLParser):
    """Reads a page as a browser does: its elements, attributes and texts; every element must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, key, value) for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def harmless(text: str) -> Reader:
    """The page, read: it holds only elements of ours, nothing that runs, and nothing that is loaded from anywhere."""
    read = Reader(text)
    assert set(read.tags) <= set(KNOWN.split())
    for kind, key, value in read.attributes:
        assert not key.startswith("on")
        assert key not in ("src", "srcset", "xlink:href", "action", "data", "style"), (kind, key)
        assert key != "href" or (value or "").startswith("#")
    assert "url(" not in text and "@import" not in text
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in read.attributes
    return read


INT8 = [
    "fold-batchnorm",
    "fuse-activations",
    "insert-observers",
    {"calibrate": {"num_batches": 1}},
    "fold-quantization",
    "lower",
]


class Net(nn.Module):
    """A residual network with a batch normalisation that folds, and a layer of a hostile name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.add_module(HOSTILE, nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = x + self.second(x)
        found: Tensor = self._modules[HOSTILE](x.mean((2, 3)))  # type: ignore[misc]
        return found


def network() -> nn.Module:
    """The network, always the same."""
    torch.manual_seed(0)
    return Net().eval()


def pictures() -> Tensor:
    """A batch for it."""
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def in_integers(model: nn.Module, images: Tensor) -> fx.GraphModule:
    """The model in 8-bit integers, calibrated on one batch."""
    return PassManager(INT8, progress=False).run(model, data=[images])
