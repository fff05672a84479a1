"""Where images lie, a folder or a zip archive: what is in it is listed first, and read in place.

What is listed can be pickled and read from other processes: each opens the files, or the archive, for itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import posixpath
import stat
import struct
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, cast

from gencore.data._formats import is_image, suffix
from gencore.data.base import DataError
from gencore.text import LISTED, counted, listed, shown

# A picture of more pixels is an accident or an attack, and so is a file of more bytes.
MAX_PIXELS = 1 << 27
_MAX_FILE_BYTES = 4 * MAX_PIXELS

# What systems and programs put beside the images of their users.
_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")

# A folder may be linked to from several places. From so many it only is where links go round.
_MAX_VISITS = 100

# What follows the last dot of a name and is longer is no suffix.
_LONGEST_SUFFIX = 12

_BUFFER = 1 << 16

_UTF8_NAME, _ENCRYPTED = 0x800, 0x1
# The record at the end of an archive: its fifth field is the number of files, of which it can say so many.
_END, _END_SIGNATURE = struct.Struct("<4s4H2LH"), b"PK\5\6"
_MANY = 0xFFFF

# What is said of images beside them: in one file for many, or in one with the name of the image and this suffix.
METADATA = ("metadata.jsonl", "metadata.csv")
CAPTION = ".txt"


class Files(Protocol):
    """Files that are opened by their names. It can be pickled, and used in any process."""

    def open(self, name: str) -> IO[bytes]: ...

    def close(self) -> None:
        """Closes what is held open, unless it is kept; it is opened again when a file is asked for."""

    def keep(self) -> None:
        """Many files will be asked for, also by processes that are forked from here: what is open stays open."""


@dataclass(frozen=True)
class Source:
    """The files of a folder or an archive. Two are equal if they are of one place and nothing has changed there.

    Attributes:
        kind: the name of the data set plugin that reads them, for messages.
        where: the folder or the archive.
        state: a hash of the names, sizes and times of all images, and of what else is listed here.
        names: the images, relative to ``where``, with ``/``, in the order of their parts.
        sizes: their bytes.
        texts: the files that say something of images: ``metadata.jsonl``, ``metadata.csv``, and captions beside them.
        faults: those of the images that cannot be opened, and why.
        others: the number of other files, by kind.
        folders: every folder.
        notes: what else is to be said.
        files: opens an image or a text by its name.
    """

    kind: str
    where: Path
    state: str
    names: list[str] = field(compare=False)
    sizes: dict[str, int] = field(compare=False)
    texts: list[str] = field(compare=False)
    faults: dict[str, str] = field(compare=False)
    others: Counter[str] = field(compare=False)
    folders: set[str] = field(compare=False)
    notes: list[str] = field(compare=False)
    files: Files = field(compare=False, repr=False)

    def error(self, what: str, files: Iterable[str] = (), kind: type[DataError] = DataError) -> DataError:
        """The error that names this source; ``files`` are those at fault."""
        return kind(f"data set {self.kind}: {shown(str(self.where))}{what}", tuple(files))


@contextlib.contextmanager
def opened(path: Path, kind: str) -> Iterator[Source]:
    """The images below a folder, or in a zip archive, for the data set plugin of the name ``kind``.

    Its files are closed at the end; whoever reads on opens them again by it.

    Raises:
        DataError: neither is there, or a folder cannot be read; the message names it.
    """
    where = f"data set {kind}: {shown(str(path))}"
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{where} does not exist") from error
    if stat.S_ISDIR(mode):
        yield _folder(path, kind)
        return
    # A pipe is not opened: that would wait for who writes into it.
    if not stat.S_ISREG(mode):
        raise DataError(f"{where} is {_kind(mode)}, neither a folder nor a zip archive")
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            what = "a truncated zip archive" if file.read(4) == b"PK\3\4" else "neither a folder nor a zip archive"
            raise DataError(f"{where} is {what}")
        said = _members(file)
    files = _ArchiveFiles(path)
    try:
        archive = files.archive()
    except MemoryError:
        raise
    except Exception as error:
        # Damaged tables make it raise nearly anything.
        raise DataError(f"{where} is a damaged zip archive: {shown(str(error))}") from error
    with contextlib.closing(files):
        found = len(archive.infolist())
        if said is not None and said != found & _MANY:
            raise DataError(f"{where} is a damaged zip archive: {found} of {counted(said, 'file')} are listed in it")
        yield _archive(path, kind, archive, files)


def _members(file: IO[bytes]) -> int | None:
    """The number of files that the end of an archive says there are, modulo 65536; None if it is said elsewhere.

    Python's reader does not compare it with its list, and one wrong length there hides files.
    """
    file.seek(max(0, os.fstat(file.fileno()).st_size - _END.size - _MANY))
    tail = file.read()
    at = tail.rfind(_END_SIGNATURE)
    if at < 0 or len(tail) - at < _END.size:
        return None
    number: int = _END.unpack_from(tail, at)[4]
    return None if number == _MANY else number


class _Listing:
    """What is found in a source, as it is found."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.sizes: dict[str, int] = {}
        self.texts: dict[str, tuple[int, ...]] = {}
        self.faults: dict[str, str] = {}
        self.others: Counter[str] = Counter()
        self.hidden = 0
        self.folders: set[str] = set()
        self.closed: dict[str, str] = {}
        self.notes: list[str] = []
        self.state = hashlib.blake2b(digest_size=16)

    def add(self, name: str, size: int, *marks: int) -> None:
        """An image of ``size`` bytes; another one of that size and name has other ``marks``."""
        self.names.add(name)
        self.sizes[name] = size
        self.state.update(repr((name, size, marks)).encode())
        if size > _MAX_FILE_BYTES:
            self.faults[name] = f"{size} bytes, over the {_MAX_FILE_BYTES} that an image may have"

    def refuse(self, name: str, reason: str) -> None:
        """What is called like an image and is no file that can be read."""
        self.names.add(name)
        self.faults[name] = reason

    def say(self, name: str, size: int, *marks: int) -> None:
        """A file that may say something of images."""
        self.texts[name] = (size, *marks)

    def leave(self, name: str) -> None:
        """A file that is no image."""
        end = suffix(name)
        kind = "no suffix" if len(end) < 2 else end if len(end) <= _LONGEST_SUFFIX else "other suffixes"
        self.others[kind] += 1

    def source(self, kind: str, where: Path, files: Files) -> Source:
        names = sorted(self.names, key=lambda name: name.split("/"))
        stems = {posixpath.splitext(name)[0] for name in names}
        texts = sorted(name for name in self.texts if _is_metadata(name) or posixpath.splitext(name)[0] in stems)
        for name in self.texts.keys() - set(texts):
            self.leave(name)
        if self.hidden:
            self.notes.append(f"skipped {counted(self.hidden, 'hidden file or folder', 'hidden files and folders')}")
        marks = [(name, self.texts[name]) for name in texts]
        others = (sorted(self.faults.items()), sorted(self.others.items()), sorted(self.folders), self.notes, marks)
        self.state.update(repr(others).encode())
        listed_here = (names, self.sizes, texts, self.faults, self.others, self.folders, self.notes)
        source = Source(kind, where, self.state.hexdigest(), *listed_here, files)
        if self.closed:
            raise source.error(f": cannot read {listed(self.closed, LISTED)}", self.closed)
        return source


class _FolderFiles:
    def __init__(self, where: Path):
        self._where = where

    def open(self, name: str) -> IO[bytes]:
        return open(self._where / name, "rb")

    def close(self) -> None:
        pass

    def keep(self) -> None:
        pass


class _ArchiveFiles:
    """The files of an archive, which is opened when it is needed, and again in another process."""

    def __init__(self, where: Path):
        self._where = where
        self._stamp = self._stamped()
        self._kept = False
        self._archive: zipfile.ZipFile | None = None
        self._members: dict[str, zipfile.ZipInfo] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None, "_members": {}}

    def archive(self) -> zipfile.ZipFile:
        if self._archive is None:
            if self._stamped() != self._stamp:
                raise OSError(f"{self._where} has changed since its files were listed")
            self._archive = zipfile.ZipFile(_Positioned(self._where) if hasattr(os, "pread") else self._where)
            self._members = {_member_name(member): member for member in self._archive.infolist()}
        return self._archive

    def open(self, name: str) -> IO[bytes]:
        # Headers are read a few bytes at a time, for which the archive's own reader is slow.
        archive = self.archive()
        return io.BufferedReader(cast("io.RawIOBase", archive.open(self._members[name])), _BUFFER)

    def keep(self) -> None:
        self._kept = True

    def close(self) -> None:
        if self._archive is not None and not self._kept:
            file = self._archive.fp
            self._archive.close()
            if file is not None:
                file.close()
            self._archive, self._members = None, {}

    def _stamped(self) -> tuple[int, int]:
        info = os.stat(self._where)
        return info.st_size, info.st_mtime_ns


class _Positioned(io.RawIOBase):
    """A file that knows itself where it is read: the system's position is one for all processes that were forked."""

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_RDONLY)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: os.fstat(self._descriptor).st_size}[whence]
        if base + offset < 0:
            raise OSError("a place before the beginning of the file")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        found = os.pread(self._descriptor, len(buffer), self._at)
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def _folder(where: Path, kind: str) -> Source:
    listing = _Listing()
    visits: Counter[tuple[int, int]] = Counter()
    loops: list[str] = []
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while waiting:
        prefix, above = waiting.pop()
        try:
            info = os.stat(where / prefix)
            place = (info.st_dev, info.st_ino)
            with os.scandir(where / prefix) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            listing.closed[prefix.rstrip("/") or "the folder"] = error.strerror or str(error)
            continue
        visits[place] += 1
        if place in above:
            loops.append(prefix.rstrip("/"))
            continue
        if visits[place] > _MAX_VISITS:
            raise DataError(
                f"data set {kind}: {shown(str(where))}: more than {_MAX_VISITS} ways lead to the folder {shown(prefix)}"
            )
        listing.folders.add(prefix.rstrip("/"))
        for entry in entries:
            name = prefix + entry.name
            if _is_private(entry.name):
                listing.hidden += 1
                continue
            try:
                if entry.is_dir():
                    waiting.append((f"{name}/", (*above, place)))
                elif not is_image(name) and not may_say(name) and not entry.is_symlink():
                    listing.leave(name)
                else:
                    _add_file(listing, name, entry.stat())
            except OSError as error:
                gone = isinstance(error, FileNotFoundError)
                reason = "a link to what does not exist" if gone else error.strerror or str(error)
                if is_image(name):
                    listing.refuse(name, reason)
                elif gone and suffix(name):
                    listing.leave(name)
                else:  # it may lead to a folder of images
                    listing.closed[name] = reason
    if loops:
        listing.notes.append(f"skipped {counted(len(loops), 'link')} to a folder above: {listed(loops)}")
    return listing.source(kind, where, _FolderFiles(where))


def _add_file(listing: _Listing, name: str, info: os.stat_result) -> None:
    marks = (info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino)
    regular = stat.S_ISREG(info.st_mode)
    if may_say(name) and regular:
        listing.say(name, *marks)
    elif not is_image(name):
        listing.leave(name)
    elif regular:
        listing.add(name, *marks)
    else:
        listing.refuse(name, _kind(info.st_mode))


def may_say(name: str) -> bool:
    """Whether a file of this name may say something of images."""
    return _is_metadata(name) or suffix(name) == CAPTION


def _is_metadata(name: str) -> bool:
    return posixpath.basename(name) in METADATA


def _archive(where: Path, kind: str, archive: zipfile.ZipFile, files: Files) -> Source:
    listing = _Listing()
    info = os.stat(where)
    listing.state.update(repr((info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino)).encode())
    hidden: set[str] = set()
    twice: Counter[str] = Counter()
    for member in archive.infolist():
        name = _member_name(member)
        parts = name.split("/")
        private = next((i for i, part in enumerate(parts) if _is_private(part)), None)
        if private is not None:
            hidden.add("/".join(parts[: private + 1]))
            continue
        is_folder = member.filename.endswith(("/", "\\")) and not member.file_size
        folder = name if is_folder else posixpath.dirname(name)
        while folder and folder not in listing.folders:
            listing.folders.add(folder)
            folder = posixpath.dirname(folder)
        if is_folder:
            continue
        is_link = stat.S_ISLNK(member.external_attr >> 16)
        if is_link and not suffix(name):  # it may lead to a folder of images
            listing.closed[name] = "a link, which is not followed in an archive"
        elif may_say(name) and not is_link:
            listing.say(name, member.file_size, member.CRC, member.header_offset)
        elif not is_image(name):
            listing.leave(name)
        else:
            if name in listing.names:
                twice[name] += 1
            listing.faults.pop(name, None)
            listing.add(name, member.file_size, member.CRC, member.header_offset)
            if is_link:
                listing.refuse(name, "a link, which is not followed in an archive")
            elif member.flag_bits & _ENCRYPTED:
                listing.refuse(name, "encrypted")
    listing.hidden = len(hidden)
    if twice:
        number = counted(sum(twice.values()), "file of the archive", "files of the archive")
        listing.notes.append(f"skipped {number}: a later one has the same name: {listed(list(twice))}")
    return listing.source(kind, where, files)


def _member_name(member: zipfile.ZipInfo) -> str:
    """The name with ``/`` between its parts, as a way below the archive's top, whatever made the archive."""
    name = member.filename
    if not member.flag_bits & _UTF8_NAME:
        # Most programs write UTF-8 without saying so, and Python then takes it for the character set of DOS.
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return posixpath.normpath("/" + name.replace("\\", "/")).lstrip("/")


def _is_private(part: str) -> bool:
    return part.startswith(".") or part in _SYSTEM_FOLDERS


def _kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return kinds.get(stat.S_IFMT(mode), "no regular file")
