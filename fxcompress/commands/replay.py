"""replay: the plan of a reproducer folder, run again."""

from __future__ import annotations

import argparse

from fxcompress import reproducer
from fxcompress.commands.command import Command
from fxcompress.commands.given import print_json
from fxcompress.commands.values import text
from fxcompress.errors import ConfigError
from fxcompress.manager import PassManager

__all__ = ["REPLAY"]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=text, help="what a failing run left")
    parser.add_argument("--changes", action="store_true", help="print what every pass changes")


def run(options: argparse.Namespace) -> int:
    """Run the plan again."""
    if options.changes and options.json:
        raise ConfigError("--changes prints text, and --json data: choose one of them.")
    model, steps, call = reproducer.read(options.folder)
    data = [call] if call is not None else None
    manager = PassManager(steps, show="changes" if options.changes else None, reproducer=False)
    manager.run(model, call, data)
    if options.json:
        print_json(manager.ledger.as_data())
    else:
        print(manager.ledger)
    return 0


REPLAY = Command(
    "replay", "run the plan of a reproducer folder again", "fxcompress replay failure --changes", run, arguments
)
