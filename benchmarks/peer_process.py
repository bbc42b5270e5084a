"""The process in which others' quantizers and pruners run, in an environment of their own."""

from __future__ import annotations

import json
import select
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

__all__ = ["PeerError", "Peers"]


class PeerError(Exception):
    """A peer is not installed, or failed."""


class Peers:
    """Commands to ``benchmarks/peers.py``, run by the interpreter ``python`` in a folder that both sides see.

    Used as a context; without an interpreter every command raises PeerError that says so. A command that takes longer than
    ``patience`` seconds ends the process.
    """

    def __init__(self, python: Path | None, threads: int = 1, patience: float = 300.0) -> None:
        self.python = None if python is None else python.absolute()  # not resolved: an environment is found by its link
        self.threads, self.patience = threads, patience
        self._place = TemporaryDirectory(prefix="peers-")
        self.folder = Path(self._place.name)
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        if self.python is not None:
            command = [str(self.python), "-W", "ignore", str(Path(__file__).with_name("peers.py").resolve())]
            with (self.folder / "peers.log").open("w", encoding="utf-8") as log:
                self._process = subprocess.Popen(
                    [*command, str(self.folder), str(self.threads)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    cwd=self.folder,
                )
        return self

    def ask(self, do: str, name: str = "") -> dict[str, Any]:
        """The answer to one command."""
        if self._process is None:
            raise PeerError("no environment of peers was named (--peers PYTHON)")
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, "name": name}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(self._end()) from None
        if not select.select([self._process.stdout], [], [], self.patience)[0]:
            self._process.kill()
            raise PeerError(f"ended: {do!r} took more than {self.patience:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(self._end())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def seconds(self, do: str, name: str) -> float:
        """What the peer took."""
        return float(self.ask(do, name)["seconds"])

    def _end(self) -> str:
        said = (self.folder / "peers.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"the peers' process ended: {said[-1] if said else 'it said nothing'}"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process is not None:
            self._process.__exit__(kind, error, trace)
        self._place.cleanup()
