"""Files: written whole or not at all, read up to a size."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxcompress.errors import ConfigError
from fxcompress.files import read_json, read_text, whole, write_text


def test_a_file_is_its_old_self_until_it_is_its_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    with whole(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_fails_leaves_nothing_behind(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")

    def write() -> None:
        with whole(path) as draft:
            draft.write_text("half of the n")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        write_text(tmp_path / "missing" / "a.json", "text")


def test_text_is_utf_8_with_the_line_ends_it_has(tmp_path: Path) -> None:
    write_text(tmp_path / "a.csv", "größe\r\n", newline="")
    assert (tmp_path / "a.csv").read_bytes() == "größe\r\n".encode()


def test_a_file_is_read_up_to_a_size(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("größe".encode())
    assert read_text(tmp_path / "a", 7) == "größe"
    with pytest.raises(ValueError, match="more than 0 MiB"):
        read_text(tmp_path / "a", 6)
    (tmp_path / "a").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"line 1 is not UTF-8 \(byte 0xff\)"):
        read_text(tmp_path / "a")


def test_data_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1]}')
    assert read_json(tmp_path / "a.json") == {"a": [1]}
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(tmp_path / "a.json")
