"""passes and schema: what there is to be written into a configuration."""

from __future__ import annotations

import argparse
import inspect

from fxcompress import library
from fxcompress.commands.command import Command
from fxcompress.commands.given import print_json
from fxcompress.schema import schema

__all__ = ["PASSES", "SCHEMA"]


def passes(options: argparse.Namespace) -> int:
    """The library of passes, from the docstrings."""
    rows = {name: (inspect.getdoc(cls) or "").splitlines()[0] for name, cls in library.passes().items()}
    if options.json:
        print_json(rows)
    else:
        for name, line in rows.items():
            print(f"{name:22} {line}")
    return 0


def print_schema(options: argparse.Namespace) -> int:
    """The JSON Schema of configurations."""
    print_json(schema())
    return 0


PASSES = Command("passes", "list the library of passes", "fxcompress passes", passes)
SCHEMA = Command(
    "schema", "print the JSON Schema of configurations", "fxcompress schema > compression.schema.json", print_schema
)
