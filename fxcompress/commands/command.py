"""What a sub-command of ``fxcompress`` is: a name, a line about it, an example, its arguments, what it does."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fxcompress.commands.values import text

__all__ = ["Command"]


def _none(parser: argparse.ArgumentParser) -> None:
    """No arguments of its own."""


@dataclass(frozen=True)
class Command:
    """One sub-command. ``arguments`` adds its own to a parser; ``run`` takes what was parsed and returns the exit status."""

    name: str
    about: str
    example: str
    run: Callable[[argparse.Namespace], int]
    arguments: Callable[[argparse.ArgumentParser], None] = _none

    def add_to(self, commands: Any) -> argparse.ArgumentParser:
        """Join the sub-commands of a parser; every one can print JSON and import modules of the user's."""
        made: argparse.ArgumentParser = commands.add_parser(
            self.name,
            help=self.about,
            description=f"{self.about[0].upper()}{self.about[1:]}.",
            epilog=f"example:\n  {self.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.add_argument("--json", action="store_true", help="print JSON")
        made.add_argument(
            "--import", dest="imports", type=text, action="append", default=[], metavar="MODULE",
            help="a module of yours that registers models, data or components",
        )  # fmt: skip
        self.arguments(made)
        made.set_defaults(run=self.run)
        return made
