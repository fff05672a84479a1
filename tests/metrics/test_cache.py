import os

import pytest
import torch

from gencore.metrics import cache


@pytest.fixture
def calls():
    return []


def test_what_was_computed_is_kept(tmp_path, calls):
    def compute():
        calls.append(1)
        return torch.arange(6.0).reshape(2, 3)

    for parts, times in ((("a", "b"), 1), (("a", "b"), 1), (("a", "c"), 2)):
        assert torch.equal(cache.cached(parts, compute, tmp_path), torch.arange(6.0).reshape(2, 3))
        assert len(calls) == times
    assert len(list(tmp_path.iterdir())) == 2
    assert all(path.suffix == ".safetensors" for path in tmp_path.iterdir())


@pytest.mark.parametrize("damage", [b"", b"no tensors", None])
def test_a_damaged_file_is_written_anew(tmp_path, calls, damage):
    def compute():
        calls.append(1)
        return torch.ones(2)

    cache.cached(("a",), compute, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] if damage is None else damage)
    assert torch.equal(cache.cached(("a",), compute, tmp_path), torch.ones(2))
    assert len(calls) == 2
    assert path.read_bytes() == whole


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path):
    (tmp_path / "file").write_text("")
    assert torch.equal(cache.cached(("a",), lambda: torch.ones(2), tmp_path / "file" / "folder"), torch.ones(2))


def test_folder(monkeypatch, tmp_path):
    for name in ("GENCORE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(cache.folder()) == os.path.join(tmp_path, ".cache", "gencore")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache.folder() == tmp_path / "x" / "gencore"
    monkeypatch.setenv("GENCORE_CACHE", str(tmp_path / "own"))
    assert cache.folder() == tmp_path / "own"
