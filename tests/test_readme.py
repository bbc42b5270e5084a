"""The READMEs, English and Chinese: every block runs, what is printed is printed, what is named exists."""

from __future__ import annotations

import ast
import itertools
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxcompress import library
from fxcompress.__main__ import main, parser

ROOT = Path(__file__).parent.parent
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("README*.md"))}
ENGLISH = TEXTS["README.md"]
every_readme = pytest.mark.parametrize("text", TEXTS.values(), ids=list(TEXTS))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def code(block: str) -> str:
    """A Python block without its comments and layout."""
    return ast.dump(ast.parse(block))


PYTHON = {code(block): block for text in TEXTS.values() for block in blocks(text, "python")}
"""Every Python block of any README, once."""


@pytest.mark.parametrize("block", PYTHON.values(), ids=range(len(PYTHON)))
def test_every_python_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "torchvision" in block:
        pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "block.py").write_text(block, encoding="utf-8")
    runpy.run_path(str(tmp_path / "block.py"))


def test_the_ledger_shown_is_the_ledger_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchvision")
    block = next(block for block in blocks(ENGLISH, "python") if "print(manager.ledger)" in block)
    assert len(block.splitlines()) == 12
    (tmp_path / "block.py").write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(tmp_path / "block.py"))
    printed = _steady(capsys.readouterr().out)
    for name, text in TEXTS.items():
        (shown,) = blocks(text, "text")
        assert _steady(shown) == printed, name


def _steady(table: str) -> list[list[str]]:
    """The words of every line, without what depends on the machine: zeros, SNR, seconds and the last bits of results."""
    table = re.sub(r"by \S+ at most, of \S+ \(\S+ dB\)", "a little", table)
    lines = [line.split() for line in table.splitlines() if line and not line.startswith("---")]
    return [words[:-3] if len(words) == 8 else words for words in lines]


def test_what_is_said_to_run_on_many_processes_does(tmp_path: Path) -> None:
    (block,) = (block for block in PYTHON.values() if block.startswith("# mine.py"))
    (tmp_path / "mine.py").write_text(block, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "mine.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(launch, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert (tmp_path / "mine" / "graph.json").is_file()


def test_there_are_two_commands_and_they_run(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    commands = {name: blocks(text, "sh") for name, text in TEXTS.items()}
    measure, check = commands["README.md"]
    assert all(found == [measure, check] for found in commands.values())
    assert all(command.startswith("python3 -m venv ") and "pip install " in command for command in (measure, check))
    assert check.endswith("-m pytest\n")  # which runs this
    module, *words = shlex.split(measure.split(" -m ")[-1])
    assert module == "fxcompress.bench"
    threads = torch.get_num_threads()
    assert main(["bench", *words, "--shape", "64", "64", "--runs", "2", "--no-progress"]) == 0
    torch.set_num_threads(threads)
    assert "int8" in capsys.readouterr().out


@every_readme
def test_what_is_named_exists(text: str) -> None:
    for path in re.findall(r"`((?:benchmarks|fxcompress|passes|tests)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path


def test_every_pass_has_a_row() -> None:
    rows = [row for row in ENGLISH.splitlines() if row.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([a-z-]+)`", row.split(" | ")[0])}
    assert set(library.passes()) <= named


@every_readme
def test_commands_in_the_text_parse(text: str) -> None:
    commands = [c for c in re.findall(r"`fxcompress ([^`]+)`", text) if not c.isidentifier()]
    assert len(commands) >= 4
    for command in commands:
        parser().parse_args(shlex.split(command))


# the two in step

CHINESE = TEXTS["README.zh-CN.md"]


def prose(text: str) -> str:
    """The text without its code blocks."""
    return re.sub(r"```.*?```\n", "", text, flags=re.S)


def tables(text: str) -> list[list[str]]:
    """Table by table, the names in code of every row's first cell."""
    found = re.findall(r"(?:^\|.*\n)+", prose(text), re.M)
    return [
        [" ".join(sorted(re.findall(r"`[^`]+`", row.split(" | ")[0]))) for row in table.splitlines()[2:]] for table in found
    ]


def test_both_have_the_same_headings() -> None:
    levels = [re.findall(r"^(#+) (.*)$", prose(text), re.M) for text in (ENGLISH, CHINESE)]
    pairs = list(itertools.zip_longest(*levels, fillvalue=("", "nothing")))
    odd = [f"{a[1]!r} against {b[1]!r}" for a, b in pairs if a[0] != b[0]]
    assert not odd, f"README.md and README.zh-CN.md have other headings from here on: {odd[0]}"


def test_both_have_the_same_rows_in_their_tables() -> None:
    english, chinese = tables(ENGLISH), tables(CHINESE)
    assert len(english) == len(chinese), "one of README.md and README.zh-CN.md has a table that the other lacks"
    for ours, theirs in zip(english, chinese, strict=True):
        lacking = {"README.zh-CN.md": [row for row in ours if row not in theirs]}
        lacking["README.md"] = [row for row in theirs if row not in ours]
        for name, rows in lacking.items():
            assert not rows, f"{name} lacks a row that the other has: {', '.join(rows)}"
        assert ours == theirs, "the rows of a table stand in another order"


def test_both_have_the_same_blocks() -> None:
    for language in ("python", "sh", "text", "yaml"):
        english, chinese = blocks(ENGLISH, language), blocks(CHINESE, language)
        kind = f"{language} block"
        assert len(english) == len(chinese), f"README.md has {len(english)} {kind}s, README.zh-CN.md has {len(chinese)}"
        for number, (ours, theirs) in enumerate(zip(english, chinese, strict=True), 1):
            same = code(ours) == code(theirs) if language == "python" else ours == theirs
            assert same, f"{kind} {number} of README.zh-CN.md is not that of README.md (comments may differ):\n{ours}"


def test_both_name_the_same_things_in_code() -> None:
    english, chinese = (set(re.findall(r"`([^`\n]+)`", prose(text))) for text in (ENGLISH, CHINESE))
    assert not english - chinese, f"README.zh-CN.md does not mention {sorted(english - chinese)}"
    assert not chinese - english, f"README.md does not mention {sorted(chinese - english)}"


def test_every_file_of_the_package_has_a_row() -> None:
    package = ROOT / "fxcompress"
    files = {f"`fxcompress/{path.name}`" for path in package.glob("*.py")} - {"`fxcompress/__init__.py`"}
    folders = {f"`fxcompress/{path.parent.name}/`" for path in package.glob("*/__init__.py")} - {"`fxcompress/passes/`"}
    rows = {name for table in tables(ENGLISH) for row in table for name in row.split(" ")}
    assert not (files | folders) - rows, f"README.md lacks a row for {sorted((files | folders) - rows)}"
