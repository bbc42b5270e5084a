"""The sub-commands of ``fxcompress``: a file each, with its arguments and what it does."""

from fxcompress.commands.bench import BENCH
from fxcompress.commands.command import Command
from fxcompress.commands.compress import COMPRESS
from fxcompress.commands.export import EXPORT
from fxcompress.commands.inspect import INSPECT
from fxcompress.commands.library import PASSES, SCHEMA
from fxcompress.commands.plan import PLAN
from fxcompress.commands.replay import REPLAY
from fxcompress.commands.sensitivity import SENSITIVITY

__all__ = ["COMMANDS", "Command"]

COMMANDS = (COMPRESS, PLAN, INSPECT, EXPORT, SENSITIVITY, BENCH, PASSES, SCHEMA, REPLAY)
"""In the order in which ``fxcompress --help`` lists them."""
