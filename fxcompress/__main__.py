"""The ``fxcompress`` command (also ``python -m fxcompress``)."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence

from fxcompress import library, reproducer
from fxcompress.bench import __main__ as bench
from fxcompress.errors import FxCompressError
from fxcompress.manager import PassManager

__all__ = ["main"]


def _replay(options: argparse.Namespace) -> int:
    model, plan, call = reproducer.read(options.folder)
    data = [call] if call is not None else None
    manager = PassManager(plan, show="changes" if options.changes else None, reproducer=False)
    manager.run(model, call, data)
    print(manager.ledger)
    return 0


def _passes(options: argparse.Namespace) -> int:
    for name, cls in library.passes().items():
        print(f"{name:20} {(inspect.getdoc(cls) or '').splitlines()[0]}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="fxcompress", description="A compiler for model compression.")
    commands = made.add_subparsers(required=True, metavar="command")
    commands.add_parser("bench", help="measure compressed models (see python -m fxcompress.bench --help)", add_help=False)
    replay = commands.add_parser("replay", help="run the plan of a reproducer folder again")
    replay.add_argument("folder")
    replay.add_argument("--changes", action="store_true", help="print what every pass changes")
    replay.set_defaults(run=_replay)
    passes = commands.add_parser("passes", help="list the library of passes")
    passes.set_defaults(run=_passes)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 for success, 2 for something the caller can mend."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["bench"]:
        return bench.main(arguments[1:])
    options = parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except FxCompressError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
