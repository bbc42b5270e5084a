"""Every figure of fxcompress, measured, beside what was asked of it.

    python -m benchmarks                             all of them
    python -m benchmarks --list                      what there is
    python -m benchmarks int8 qat --quick            two of them, roughly
    python -m benchmarks --peers PYTHON --json F     with others' tools in their own environment, saved

Every benchmark runs in a process of its own and prints its figures as they are found; the file is complete after each one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks import machine
from benchmarks.figure import shown, text
from benchmarks.peer_process import PeerError, Peers
from benchmarks.record import record
from benchmarks.run import Run
from benchmarks.suite import BENCHMARKS, Benchmark
from fxcompress.errors import did_you_mean

ROOT = Path(__file__).parent.parent


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("names", nargs="*", metavar="NAME", help="benchmarks; all where none is named")
    made.add_argument("--list", action="store_true", help="print the table of benchmarks")
    made.add_argument("--quick", action="store_true", help="few rounds, small cases: to see that it works, not to quote")
    made.add_argument("--json", type=Path, metavar="FILE", help="save the figures, the tables and the machine's description")
    made.add_argument("--record", type=Path, nargs="+", metavar="FILE", help="write saved tables into benchmarks/README.md")
    made.add_argument("--peers", type=Path, metavar="PYTHON", help="the Python of an environment with others' tools")
    made.add_argument("--models", nargs="+", default=[], help="only these models, where a benchmark takes several")
    made.add_argument("--sample", type=int, metavar="N", help="of the zoo, only N models drawn with --seed")
    made.add_argument("--seed", type=int, default=0)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every benchmark ran, 1 when one failed, 2 for what the caller can mend. Figures that miss do not fail."""
    options = parser().parse_args(arguments)
    known = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    for name in options.names:
        if name not in known:
            print(f"error: there is no benchmark {name!r}.{did_you_mean(name, known)}", file=sys.stderr)
            return 2
    if options.list:
        rows = [(b.name, b.measures, b.asked, b.peers, f"{b.minutes:g}") for b in known.values()]
        print(tabulate(rows, ("name", "measures", "asked", "peers", "minutes"), disable_numparse=True))
        return 0
    if options.record:
        record(options.record)
        return 0
    chosen = [known[name] for name in options.names] or list(known.values())
    try:
        report = described(options, arguments)
    except PeerError as error:
        print(f"error: --peers {options.peers}: {error}", file=sys.stderr)
        return 2
    for benchmark in chosen:
        result = measured(benchmark, options) if len(chosen) == 1 else apart(benchmark, options)
        report["benchmarks"].append(result)
        report["load"]["end"], report["finished"] = machine.load(), _now()
        if options.json:
            _write(options.json, report)
    if len(chosen) > 1:
        _conclude(report["benchmarks"])
    return int(any(result["error"] for result in report["benchmarks"]))


def described(options: argparse.Namespace, arguments: Sequence[str] | None) -> dict[str, Any]:
    """What is known before anything is measured."""
    torch.set_num_threads(1)
    places = {str(path): path.name for path in (options.peers, options.json) if path is not None}
    words = [places.get(word, word) for word in (sys.argv[1:] if arguments is None else arguments)]
    return {
        "command": shlex.join(["python", "-m", "benchmarks", *words]),
        "commit": machine.commit(),
        "started": _now(),
        "finished": None,
        "quick": options.quick,
        "load": {"start": machine.load(), "end": None},
        "machine": machine.describe(threads=1, peers=_peer_versions(options.peers)),
        "benchmarks": [],
    }


def _peer_versions(python: Path | None) -> dict[str, str]:
    if python is None:
        return {}
    if not python.exists():
        raise PeerError("there is no such file")
    with Peers(python) as peers:
        found: dict[str, str] = peers.ask("versions")["versions"]
        return found


def measured(benchmark: Benchmark, options: argparse.Namespace) -> dict[str, Any]:
    """One benchmark in this process: its figures, its tables, and the error that ended it."""
    run = Run(options.quick, options.peers, tuple(options.models), options.sample, options.seed)
    rows: list[dict[str, Any]] = []
    error, started = "", time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    print(f"\n== {benchmark.name}: {benchmark.measures}", flush=True)
    try:
        for figure in benchmark.function()(run):
            rows.append(figure.row())
            run.tell(" ".join(filter(None, text(rows[-1])[:3])))
    except Exception as reason:  # the figures of the others are worth having
        traceback.print_exc()
        error = f"{type(reason).__name__}: {reason}"
    print(shown(rows), *([f"FAILED {error}"] if error else []), sep="\n", flush=True)
    seconds = round(time.perf_counter() - started, 1)
    return {"name": benchmark.name, "seconds": seconds, "error": error, "figures": rows, "tables": run.tables}


def apart(benchmark: Benchmark, options: argparse.Namespace) -> dict[str, Any]:
    """One benchmark in a process of its own, so that its memory, threads and end are its own."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "figures.json"
        words = [benchmark.name, "--json", str(path), "--seed", str(options.seed)]
        words += ["--quick"] if options.quick else []
        words += ["--peers", str(options.peers.absolute())] if options.peers else []
        words += ["--models", *options.models] if options.models else []
        words += ["--sample", str(options.sample)] if options.sample is not None else []
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "benchmarks", *words], cwd=ROOT, check=False)
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["benchmarks"][0]
            return found
        seconds = round(time.perf_counter() - started, 1)
        error = f"its process ended with status {done.returncode}"
        return {"name": benchmark.name, "seconds": seconds, "error": error, "figures": [], "tables": []}


def _conclude(results: list[dict[str, Any]]) -> None:
    """What was asked and missed, and what did not run."""
    figures = [(result["name"], row) for result in results for row in result["figures"]]
    asked = [(name, row) for name, row in figures if row["asked"]]
    for title, met in (("missed", False), ("not measured", None)):
        rows = [{**row, "figure": f"{name}: {row['figure']}"} for name, row in asked if row["met"] is met]
        if rows:
            print(f"\n== {title}", shown(rows), sep="\n")
    for result in results:
        if result["error"]:
            print(f"\n{result['name']} FAILED: {result['error']}")
    print(f"\n{sum(row['met'] is True for _, row in asked)} of {len(asked)} figures that something was asked of hold")


def _write(path: Path, report: dict[str, Any]) -> None:
    """The file appears whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
    draft.replace(path)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    sys.exit(main())
