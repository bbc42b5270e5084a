"""YAML as plain data: nothing is built, nothing unfolds without end, and every key has its line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from fxcompress.errors import PlanError

__all__ = ["Lines", "parse", "read_yaml"]

Lines = dict[tuple[Any, ...], int]
"""The line of every key and list item by its path."""

_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map")}


def read_yaml(text: str) -> Any:
    """YAML as plain data; PlanError for what is not YAML, or more than plain data, naming the line."""
    return parse(text)[0]


def parse(text: str) -> tuple[Any, Lines]:
    """YAML as plain data, and where everything stands in it.

    Refuses tags that would build objects, aliases and merges (they can unfold without end), duplicate keys, and values
    that are not what their tag says. Raises PlanError naming the line.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        data = None if node is None else loader.construct_document(node)
        lines = dict(_places(loader, node, ()))
    except (yaml.YAMLError, RecursionError) as error:
        raise PlanError(f"this is not YAML we read: {_explained(error, text)}") from error
    return data, lines


def _places(loader: _Loader, node: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*path, loader.construct_object(key, deep=True))
            yield inner, key.start_mark.line + 1
            yield from _places(loader, value, inner)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield (*path, number), value.start_mark.line + 1
            yield from _places(loader, value, (*path, number))


def _explained(error: Exception, text: str) -> str:
    """What is wrong with a text, in which line and column, and what to do."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply; nothing that is read here needs more than a few levels"
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"the character {chr(error.character)!r} stands for nothing in it, line {line}; take it out"
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem is None or error.problem_mark is None:
        return str(error)
    mark, context = error.problem_mark, ""
    if error.context is not None and error.context_mark is not None:
        context = f"{error.context} of line {error.context_mark.line + 1}: "
    hint = next((f"; {hint}" for problem, hint in _HINTS.items() if problem in error.problem), "")
    return f"{context}{error.problem}, line {mark.line + 1}, column {mark.column + 1}{hint}"


_HINTS = {
    "character '\\t'": "indent with spaces",
    "mapping values are not allowed": "indent the keys of one mapping alike, and quote a value that holds ': '",
    "expected <block end>": "indent the keys of one mapping, and the items of one list, alike",
    "could not find expected ':'": "a key is followed by ': '",
    "unhashable key": "a key is a word or a number",
    "expected ',' or": "close what was opened with [ or {",
    "another document": "give one document, without '---' in between",
}
"""What YAML's parser objects to → what to do."""


def _refusal(mark: Any, what: str) -> yaml.YAMLError:
    return yaml.YAMLError(f"{what}, line {mark.line + 1}")


class _Loader(yaml.SafeLoader):
    """Safe YAML, and of that only what JSON has too (and dates, which nothing asks for)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _refusal(event.start_mark, f"aliases (*{event.anchor}) are not read")
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in _PLAIN:
            raise _refusal(event.start_mark, f"the tag {tag!r} is not read")
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: Any) -> None:
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise _refusal(key.start_mark, "merges (<<) are not read")
        super().flatten_mapping(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key.value, str) else str(key.value)
            if name in seen:
                raise _refusal(key.start_mark, f"key {name!r} stands twice")
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # what the constructors make of "!!int x"
            kind = node.tag.rpartition(":")[2]
            raise _refusal(node.start_mark, f"this cannot be read as {kind} ({error})") from error

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise _refusal(node.start_mark, f"{value!r} is not text") from error
        return value
