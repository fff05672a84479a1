"""What the environment says of processes, and how they share rows; tests/train/test_processes.py has real ones."""

from __future__ import annotations

import pytest

from gencore.processes import ALONE, OtherProcessError, Processes, local_size, started


@pytest.mark.parametrize(("count", "size"), [(0, 1), (7, 1), (7, 3), (2, 3), (128, 5)])
def test_rows_are_shared_out(count, size):
    parts = [Processes(rank, size).rows(count) for rank in range(size)]
    assert [row for first, last in parts for row in range(first, last)] == list(range(count))
    lengths = [last - first for first, last in parts]
    assert max(lengths) - min(lengths) <= 1


def test_a_single_process_waits_for_nobody():
    assert ALONE.is_first
    assert ALONE.by_first(lambda: 3) == 3
    assert ALONE.largest(2, 5) == [2, 5]
    assert ALONE.gathered("a") == ["a"]
    with pytest.raises(RuntimeError, match="Connection closed"), ALONE.waiting():
        raise RuntimeError("Connection closed by peer")


def test_a_broken_connection_is_told_with_its_cause():
    two, told = Processes(0, 2), r"another of the processes has ended \(Connection closed by peer\)$"
    with pytest.raises(OtherProcessError, match=told), two.waiting():
        raise RuntimeError("Connection closed by peer\nand a long text")
    with pytest.raises(RuntimeError, match=r"^out of memory$"), two.waiting():
        raise RuntimeError("out of memory")


def test_the_environment_says_how_many_there_are(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert started() == (0, 1, 0)
    assert local_size() == 1
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert started() == (5, 8, 1)
    assert local_size() == 4


@pytest.mark.parametrize(
    ("rank", "size", "fault"),
    [
        ("2", "2", "RANK must be from 0 to WORLD_SIZE - 1 = 1, was 2"),
        ("one", "2", "the environment variable RANK must be a number, was 'one'"),
        ("-1", "2", "the environment variable RANK must be a number, was '-1'"),
    ],
)
def test_what_cannot_be_is_refused(monkeypatch, rank, size, fault):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ValueError, match=fault):
        started()
