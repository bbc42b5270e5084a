"""Elements, a whole page, and its file. Text and attributes are escaped by the serialiser, whoever wrote them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from xml.etree.ElementTree import Element, tostring

from fxcompress.files import write_text
from fxcompress.html.style import SHEET

__all__ = ["Child", "hint", "name", "page", "tag", "write"]

Child = Element | str | None | Iterable["Child"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""A page that cannot load or run anything, whatever it holds."""


def tag(kind: str, *children: Child, **attributes: object) -> Element:
    """An element. ``class_`` gives ``class`` and ``text_anchor`` ``text-anchor``; attributes that are None are left out."""
    made = Element(kind, {_attribute(key): _number(value) for key, value in attributes.items() if value is not None})
    for child in _flat(children):
        if isinstance(child, Element):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + child
        else:
            made.text = (made.text or "") + child
    return made


def _attribute(key: str) -> str:
    return key if key in ("viewBox", "preserveAspectRatio") else key.rstrip("_").replace("_", "-")


def _number(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def _flat(children: Iterable[Child]) -> Iterator[Element | str]:
    for child in children:
        if isinstance(child, (Element, str)):
            yield child
        elif child is not None:
            yield from _flat(child)


def name(text: str) -> Element:
    """The name of a layer, a pass or a node, as code, with its direction kept to itself."""
    return tag("code", text)


def hint(text: str) -> Element:
    """What a browser shows over a part of a drawing, and a screen reader says."""
    return tag("title", text)


def page(title: str, *children: Child) -> str:
    """A whole document in English."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", **{"http-equiv": "Content-Security-Policy"}, content=_POLICY),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", SHEET),
    )
    body = tag("body", tag("main", tag("h1", title), children))
    return "<!doctype html>\n" + tostring(tag("html", head, body, lang="en"), encoding="unicode", method="html") + "\n"


def write(path: str | os.PathLike[str], text: str) -> Path:
    """Write a page; the file appears whole or not at all. Raises ConfigError where it cannot be written.

    Half a character (a lone surrogate, as a damaged name may hold) becomes a question mark.
    """
    write_text(path, text.encode("utf-8", "replace").decode("utf-8"))
    return Path(path)
