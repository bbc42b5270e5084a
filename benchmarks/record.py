"""Saved figures as Markdown, and as the last part of benchmarks/README.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figure import COLUMNS, text

__all__ = ["markdown", "record"]

README = Path(__file__).with_name("README.md")
HEADING = "## The last figures\n"


def record(saved: Sequence[Path], readme: Path = README) -> None:
    """Put the figures of saved files, one after another, under the heading of ``readme``, in place of what was there."""
    before, heading, _ = readme.read_text(encoding="utf-8").partition(HEADING)
    if not heading:
        raise ValueError(f"{readme} has no heading {HEADING.strip()!r}")
    tables = "\n".join(markdown(json.loads(path.read_text(encoding="utf-8"))) for path in saved)
    readme.write_text(f"{before}{heading}\n{tables}", encoding="utf-8")


def markdown(report: dict[str, Any]) -> str:
    """The machine, then a table for every benchmark."""
    return "\n".join([*_header(report), *(line for result in report["benchmarks"] for line in _section(result))])


def _header(report: dict[str, Any]) -> list[str]:
    machine = report["machine"]
    flags = (
        ", ".join(flag for flag in ("AVX2", "AVX512", "VNNI", "AMX") if machine[flag]) or "none of AVX2, AVX512, VNNI, AMX"
    )
    packages = {"ours": machine["versions"], "peers": machine["peers"]}
    loads = " to ".join(f"{report['load'][when][0]:g}" for when in ("start", "end"))
    return [
        f"`{report['command']}`, commit {report['commit'][:12]}, {report['started']} to {report['finished']}"
        + (", quick: rough values" if report["quick"] else ""),
        "",
        f"- {machine['CPU']}, {flags}; {machine['cores']} cores, {machine['memory GB']} GB; GPU: {machine['GPU'] or 'none'}",
        f"- Python {machine['Python']}, {machine['system']}; load average {loads}",
        *(f"- {who}: {', '.join(f'{p} {v}' for p, v in found.items())}" for who, found in packages.items() if found),
        "",
    ]


def _section(result: dict[str, Any]) -> list[str]:
    lines = [
        f"### {result['name']}",
        "",
        f"{result['seconds']:g} s" + (f"; **failed**: {result['error']}" * bool(result["error"])),
    ]
    lines += ["", "| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    return [*lines, *("| " + " | ".join(_escaped(cell) for cell in text(row)) + " |" for row in result["figures"]), ""]


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
