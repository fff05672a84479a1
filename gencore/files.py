"""Files that are written whole or not at all: to a temporary name beside the target, synced, then renamed.

What is no regular file (a device, a pipe) would be destroyed by a rename, so it is written through. Where a name is a
link, the file behind it is the target.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def write_synced(path: Path, data: bytes) -> None:
    """Writes and syncs ``data`` to ``path``, in place. Its ``OSError`` names the file."""
    try:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_directory(path: Path) -> None:
    """Makes renames within ``path`` durable, where the system can (a directory cannot be opened on Windows)."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: Path | str, data: bytes | str) -> None:
    """Writes ``path``, its parent folders too: whoever reads sees the old content or the new, never a part.

    A device or a pipe gets the bytes written to it; a link stays, and the file that it names is written.

    Raises:
        OSError: a full disk, a folder without permission, a path that is a folder or a socket; ``path`` keeps its old
            content.
    """
    with writing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[BinaryIO]:
    """A binary file to write ``path`` by, as :func:`write_atomically` does, piece by piece.

    If the body raises, ``path`` keeps its old content.

    Raises:
        OSError: as :func:`write_atomically`; it names ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        stream = _opened_through(path)
        if stream is not None:
            with stream:
                yield stream
            return
        # A link stays where it is.
        target = Path(os.path.realpath(path))
        # A long name is cut, so that this one is not too long.
        temporary = target.with_name(f".{target.name[:50]}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileNotFoundError):
                os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode))
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    sync_directory(target.parent)


def is_output_stream(path: Path, descriptor: int) -> bool:
    """Whether ``path`` is what this process has open as its stdout (1) or stderr (2), such as /dev/stdout."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def _opened_through(path: Path) -> BinaryIO | None:
    """A file for what is written to and not replaced: a device, a pipe, an output of this process. None for others."""
    for descriptor in (1, 2):
        # To open it anew would cut off what the shell or an earlier process wrote.
        if is_output_stream(path, descriptor):
            return open(os.dup(descriptor), "wb")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    return open(path, "wb")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock on the file ``path`` (made if it is not there); the system lets go of it when a process dies.

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
