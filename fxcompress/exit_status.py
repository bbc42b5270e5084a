"""How a command ends: a number for the shell, and one line about what was wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch

from fxcompress.errors import FxCompressError, PassError, TrainingError, VerificationError, brief

__all__ = ["exit_status"]

_REFUSED = (VerificationError, PassError, TrainingError)


def exit_status(run: Callable[[], int]) -> int:
    """What ``run`` returns; 1 where a result was refused, 2 for something the caller can mend, with a line that says it."""
    try:
        return run()
    except FxCompressError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, _REFUSED) else 2
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a folder that may not be written to
        where = f"{str(error.filename)!r}: " if error.filename is not None else ""
        print(f"error: {where}{error.strerror or error}.", file=sys.stderr)
        return 2
    except (MemoryError, torch.OutOfMemoryError) as error:
        print(f"error: out of memory: {brief(error)}; give smaller batches or shapes.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
