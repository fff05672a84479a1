"""Files are written whole or not at all."""

from __future__ import annotations

import os

import pytest

from gencore import files


def test_folders_are_made_and_content_is_replaced(tmp_path):
    path = tmp_path / "a" / "b.txt"
    files.write_atomically(path, "one")
    files.write_atomically(path, b"two")
    assert path.read_text() == "two"
    assert os.listdir(path.parent) == ["b.txt"]


def test_a_failure_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "b.txt"
    files.write_atomically(path, "one")

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left on device") as caught:
        files.write_atomically(path, "two")
    assert caught.value.filename == str(path)
    assert path.read_text() == "one"
    assert os.listdir(tmp_path) == ["b.txt"]


def test_a_folder_in_the_way_is_an_error(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        files.write_atomically(tmp_path / "folder", "text")


def test_a_lock_is_held_once(tmp_path):
    pytest.importorskip("fcntl")
    with files.locked(tmp_path / "lock"), pytest.raises(BlockingIOError), files.locked(tmp_path / "lock"):
        pass
    with files.locked(tmp_path / "lock"):
        pass
