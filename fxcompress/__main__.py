"""The ``fxcompress`` command (also ``python -m fxcompress``).

Exit status: 0, done; 1, it ran and the result was refused (a check, a floor, a loss that is not finite); 2, something in
what was given must be mended. The message then says what and where; there is no traceback.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import torch

from fxcompress import __version__
from fxcompress.commands import COMMANDS
from fxcompress.exit_status import exit_status

__all__ = ["main", "parser"]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="fxcompress", description="A compiler for model compression.")
    made.add_argument("--version", action="version", version=f"fxcompress {__version__}")
    commands = made.add_subparsers(required=True, metavar="command")
    for command in COMMANDS:
        command.add_to(commands)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 for success, 1 where the result was refused, 2 for something the caller can mend."""
    options = parser().parse_args(arguments)
    torch._logging.set_logs(all=logging.CRITICAL)  # type: ignore[attr-defined]  # a model that torch.export refuses is an error of ours, or none
    return exit_status(lambda: int(options.run(options)))


if __name__ == "__main__":
    sys.exit(main())
