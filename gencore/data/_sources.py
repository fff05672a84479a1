"""Where images lie, a folder or a zip archive: what is in it is listed first, and read in place."""

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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

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


@dataclass(frozen=True)
class Source:
    """The files of a folder or an archive. Two are equal if they are of one place and nothing has changed there.

    Attributes:
        where: the folder or the archive.
        state: a hash of the names, sizes and times of all images, and of what else is listed here.
        names: the images, relative to ``where``, with ``/``, in the order of their parts.
        faults: those of them that cannot be opened, and why.
        others: the number of other files, by kind.
        folders: every folder.
        notes: what else is to be said.
        open: opens an image by its name.
    """

    where: Path
    state: str
    names: list[str] = field(compare=False)
    faults: dict[str, str] = field(compare=False)
    others: Counter[str] = field(compare=False)
    folders: set[str] = field(compare=False)
    notes: list[str] = field(compare=False)
    open: Callable[[str], IO[bytes]] = field(compare=False, repr=False)

    def error(self, what: str, files: Iterable[str] = (), kind: type[DataError] = DataError) -> DataError:
        """The error that names this source; ``files`` are those at fault."""
        return kind(f"data set images: {shown(str(self.where))}{what}", tuple(files))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Source]:
    """The images below a folder, or in a zip archive.

    Raises:
        DataError: neither is there, or a folder cannot be read; the message names it.
    """
    where = f"data set images: {shown(str(path))}"
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{where} does not exist") from error
    if stat.S_ISDIR(mode):
        yield _folder(path)
        return
    # A pipe is not opened: that would wait for who writes into it.
    if not stat.S_ISREG(mode):
        raise DataError(f"{where} is {_kind(mode)}, neither a folder nor a zip archive")
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            what = "a truncated zip archive" if file.read(4) == b"PK\3\4" else "neither a folder nor a zip archive"
            raise DataError(f"{where} is {what}")
        try:
            archive = zipfile.ZipFile(file)
        except MemoryError:
            raise
        except Exception as error:
            # Damaged tables make it raise nearly anything.
            raise DataError(f"{where} is a damaged zip archive: {shown(str(error))}") from error
        with archive:
            said, found = _members(file), len(archive.infolist())
            if said not in (None, found & _MANY):
                raise DataError(
                    f"{where} is a damaged zip archive: {found} of {counted(said, 'file')} are listed in it"
                )
            yield _archive(path, archive)


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
        self.state.update(repr((name, size, marks)).encode())
        if size > _MAX_FILE_BYTES:
            self.faults[name] = f"{size} bytes, over the {_MAX_FILE_BYTES} that an image may have"

    def refuse(self, name: str, reason: str) -> None:
        """What is called like an image and is no file that can be read."""
        self.names.add(name)
        self.faults[name] = reason

    def leave(self, name: str) -> None:
        """A file that is no image."""
        end = suffix(name)
        kind = "no suffix" if len(end) < 2 else end if len(end) <= _LONGEST_SUFFIX else "other suffixes"
        self.others[kind] += 1

    def source(self, where: Path, opener: Callable[[str], IO[bytes]]) -> Source:
        names = sorted(self.names, key=lambda name: name.split("/"))
        if self.hidden:
            self.notes.append(f"skipped {counted(self.hidden, 'hidden file or folder', 'hidden files and folders')}")
        others = (sorted(self.faults.items()), sorted(self.others.items()), sorted(self.folders), self.notes)
        self.state.update(repr(others).encode())
        state = self.state.hexdigest()
        source = Source(where, state, names, self.faults, self.others, self.folders, self.notes, opener)
        if self.closed:
            raise source.error(f": cannot read {listed(self.closed, LISTED)}", self.closed)
        return source


def _folder(where: Path) -> Source:
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
                f"data set images: {shown(str(where))}: more than {_MAX_VISITS} ways lead to the folder {shown(prefix)}"
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
                elif not is_image(name) and not entry.is_symlink():
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
    return listing.source(where, lambda name: open(where / name, "rb"))


def _add_file(listing: _Listing, name: str, info: os.stat_result) -> None:
    if not is_image(name):
        listing.leave(name)
    elif stat.S_ISREG(info.st_mode):
        listing.add(name, info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino)
    else:
        listing.refuse(name, _kind(info.st_mode))


def _archive(where: Path, archive: zipfile.ZipFile) -> Source:
    listing = _Listing()
    info = os.stat(where)
    listing.state.update(repr((info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino)).encode())
    members: dict[str, zipfile.ZipInfo] = {}
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
        elif not is_image(name):
            listing.leave(name)
        else:
            if name in members:
                twice[name] += 1
            members[name] = member
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

    def opener(name: str) -> IO[bytes]:
        # Headers are read a few bytes at a time, for which the archive's own reader is slow.
        return io.BufferedReader(cast("io.RawIOBase", archive.open(members[name])), _BUFFER)

    return listing.source(where, opener)


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
