"""Files that name classes, one a line."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from gencore.data.base import DataError
from gencore.text import shown

_MAX_BYTES = 1 << 20


def class_names(file: Path) -> tuple[str, ...]:
    """The names of the classes, in their order; empty if there is no such file, or nothing in it.

    Raises:
        DataError: it is not UTF-8, too long, or names a class twice; the message names it.
    """
    try:
        with open(file, "rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return ()
    if len(content) > _MAX_BYTES:
        raise DataError(f"{file} must be at most {_MAX_BYTES} bytes long, is longer")
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file} must be in UTF-8, is not at byte {error.start}") from error
    names = tuple(shown(line.strip()) for line in lines if line.strip())
    for name, count in Counter(names).items():
        if count > 1:
            raise DataError(f"{file} must name each class once, names {name!r} {count} times")
    return names
