"""Files that are written whole or not at all: to a temporary name beside the target, synced, then renamed.

What is no regular file (a device, a pipe) would be destroyed by a rename, so it is written through. Where a name is a
link, the file behind it is the target.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

# The descriptors of stdout and stderr.
_OUTPUTS = (1, 2)


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
    """Makes renames within ``path`` durable, where the system can: not on Windows, and not on every network."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP):
            raise


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
    # A link stays where it is.
    target = Path(os.path.realpath(path))
    # A long name is cut, so that this one is not too long.
    temporary = target.with_name(f".{target.name[:50]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with _named(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = _opened_through(path)
        if stream is not None:
            with stream:
                yield stream
            return
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
    sync_directory(target.parent)


def check_writable(path: Path | str) -> None:
    """Raises what :func:`writing` would, as far as can be told without opening ``path``: before long work, not after.

    Raises:
        OSError: ``path`` is a folder or a socket, or nothing can be written there; it names ``path``.
    """
    path = Path(path)
    with _named(path):
        if any(is_output_stream(path, descriptor) for descriptor in _OUTPUTS):
            return
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            mode = None
        if mode is not None and stat.S_ISDIR(mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if mode is not None and stat.S_ISSOCK(mode):
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        place = Path(os.path.realpath(path))
        if mode is None or stat.S_ISREG(mode):
            # A file is replaced, so its folder counts, or the first that is there of those to be made.
            place = next(parent for parent in place.parents if os.path.lexists(parent))
            if not place.is_dir():
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(place, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))


@contextlib.contextmanager
def _named(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Lets an ``OSError`` that names no file, or the ``temporary`` one, name ``path``."""
    try:
        yield
    except BrokenPipeError as error:
        # Not the error of a stdout whose reader has gone, which ends a program in silence.
        raise OSError(errno.EIO, "whoever read it has gone", str(path)) from error
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def is_output_stream(path: Path, descriptor: int) -> bool:
    """Whether ``path`` is what this process has open as its stdout (1) or stderr (2), such as /dev/stdout."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


class _Through(io.FileIO):
    """A file that is written from where it stands, also if others write to its end."""

    def seekable(self) -> bool:
        return False

    def tell(self) -> int:
        raise io.UnsupportedOperation("it is written through")


def _opened_through(path: Path) -> BinaryIO | None:
    """A file for what is written to and not replaced: a device, a pipe, an output of this process. None for others."""
    for descriptor in _OUTPUTS:
        # To open it anew would cut off what the shell or an earlier process wrote.
        if is_output_stream(path, descriptor):
            return io.BufferedWriter(_Through(os.dup(descriptor), "wb"))
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    return io.BufferedWriter(_Through(path, "wb"))


# The files of the locks that this process holds.
_locks: set[IO[str]] = set()


def _let_go() -> None:
    """In a process that was forked: a lock is held until the last one that has the file open is gone."""
    for file in _locks:
        file.close()
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock on the file ``path`` (made if it is not there); the system lets go of it when this process dies,
    whatever becomes of those that it has forked.

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
        _locks.add(file)
        try:
            yield
        finally:
            _locks.discard(file)
