"""Files are written whole or not at all."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from gencore import files

ROOT = Path(__file__).parent.parent


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


def test_a_link_stays_and_what_it_names_is_written(tmp_path):
    target, link = tmp_path / "deep" / "target.txt", tmp_path / "link.txt"
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to(os.path.join("deep", "target.txt"))
    files.write_atomically(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    target.unlink()
    files.write_atomically(link, "again")
    assert (link.is_symlink(), target.read_text()) == (True, "again")
    assert os.listdir(target.parent) == ["target.txt"]


def test_a_link_to_itself_is_an_error(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        files.write_atomically(tmp_path / "a", "text")
    assert (tmp_path / "a").is_symlink()


def test_a_pipe_is_written_through(tmp_path):
    fifo, content = tmp_path / "fifo", os.urandom(1 << 18)  # more than a pipe holds
    os.mkfifo(fifo)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()))
    reader.start()
    files.write_atomically(fifo, content)
    reader.join(timeout=60)
    assert read == [content]
    assert stat.S_ISFIFO(fifo.stat().st_mode)


def test_a_device_is_written_through(tmp_path):
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        device.write_bytes(b"")
    except OSError as error:
        pytest.skip(f"no device can be made here: {error}")
    files.write_atomically(device, "text")
    assert stat.S_ISCHR(device.stat().st_mode)
    assert os.listdir(tmp_path) == ["null"]


def test_a_socket_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the address of a socket has a hundred characters at most
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        with pytest.raises(OSError, match="socket"):
            files.write_atomically("socket", "text")
        assert stat.S_ISSOCK(os.stat("socket").st_mode)


@pytest.mark.parametrize("redirected", ["| cat >", ">"])
def test_stdout_is_written_through(tmp_path, redirected):
    program = "from gencore import files; files.write_atomically('/dev/stdout', 'text'); print('more')"
    command = f'(echo before; {sys.executable} -c "{program}") {redirected} out'
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (tmp_path / "out").read_text() == "before\ntextmore\n"
    assert os.listdir(tmp_path) == ["out"]


def test_permissions_and_long_names_are_kept(tmp_path):
    path = tmp_path / ("n" * 250)
    files.write_atomically(path, "one")
    path.chmod(0o600)
    files.write_atomically(path, "two")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("two", 0o600)


def test_pieces_are_one_file_or_none(tmp_path):
    path = tmp_path / "pieces"
    path.write_text("old")

    def fail() -> None:
        with files.writing(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (path.read_text(), os.listdir(tmp_path)) == ("old", ["pieces"])
    with files.writing(path) as file:
        file.write(b"n")
        file.write(b"ew")
    assert path.read_text() == "new"


def test_a_reader_that_goes_away_is_told(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: os.close(os.open(fifo, os.O_RDONLY)))
    reader.start()
    with pytest.raises(OSError, match="whoever read it has gone") as caught:
        files.write_atomically(fifo, bytes(1 << 20))
    reader.join(timeout=60)
    assert caught.value.filename == str(fifo)
    assert not isinstance(caught.value, BrokenPipeError)


def test_what_cannot_be_written_is_known_before(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "new" / "target")
    os.mkfifo(tmp_path / "fifo")
    for good in ("file", "link", "fifo", "new/deep/file"):
        files.check_writable(tmp_path / good)
    assert sorted(os.listdir(tmp_path)) == ["fifo", "file", "link"]
    for bad, error in ((tmp_path, IsADirectoryError), (tmp_path / "file" / "x", NotADirectoryError)):
        with pytest.raises(error) as caught:
            files.check_writable(bad)
        assert caught.value.filename == str(bad)


def test_errors_of_other_files_are_theirs(tmp_path):
    def fail() -> None:
        with files.writing(tmp_path / "a"):
            (tmp_path / "missing" / "b").read_bytes()

    with pytest.raises(FileNotFoundError) as caught:
        fail()
    assert caught.value.filename == str(tmp_path / "missing" / "b")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_lock_ends_with_the_process_that_took_it(tmp_path):
    # One that it has forked, such as a worker that reads images, may live a little longer.
    code = f"""
        import os, signal, sys, time
        from pathlib import Path
        from gencore.files import locked
        with locked(Path({str(tmp_path / ".lock")!r})):
            child = os.fork()
            if child == 0:
                os.close(1)
                time.sleep(60)
                os._exit(0)
            print(child, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    child = int(done.stdout)
    try:
        os.kill(child, 0)
        with files.locked(tmp_path / ".lock"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
