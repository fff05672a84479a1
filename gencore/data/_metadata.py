"""What files beside images say of them: ``metadata.jsonl`` and ``metadata.csv``, or a caption in a text file each.

The first two are those of the library ``datasets``: each row has the column ``file_name``, a path relative to the
folder of the metadata file, and columns of any name. The last is that of trainers of text-to-image models: ``1.txt``
holds the caption of ``1.png``.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gencore.data._sources import METADATA, Source
from gencore.text import LISTED, counted, listed, shown

# The setting data.label of this value takes folders for classes, also where there is metadata.
FOLDER = "folder"

# The column of captions, where none is named.
DEFAULT_TEXT = "text"

_FILE = "file_name"
_MAX_BYTES = 1 << 30
_MAX_CAPTION_BYTES = 1 << 20


class Known(NamedTuple):
    """What is known of images by their names.

    Attributes:
        texts: the caption of each image, empty where it has none; None if no image has one.
        classes: the class of each image, None where it has none; None if folders are the classes.
        notes: what is to be said.
    """

    texts: dict[str, str] | None
    classes: dict[str, str | None] | None
    notes: list[str]


class _Row(NamedTuple):
    where: str
    values: Mapping[str, Any]


def known(source: Source, text: str, label: str | None, skip_bad: bool) -> Known:
    """What the source says of its images beside them.

    Args:
        text: the column of captions.
        label: the column of classes, or :data:`FOLDER`.
        skip_bad: leaves out images without a class, and rows whose image is not there.

    Raises:
        DataError: a file cannot be read, or does not go with the images; the message names it.
    """
    rows, notes = _rows(source, skip_bad)
    captions = [name for name in source.texts if posixpath.basename(name) not in METADATA]
    if not rows:
        if text != DEFAULT_TEXT or label not in (None, FOLDER):
            setting = f"data.text={text}" if text != DEFAULT_TEXT else f"data.label={label}"
            raise source.error(f" has no rows in a metadata.jsonl or metadata.csv, of which {setting} names a column")
        texts = _beside(source, captions) if captions else None
        return Known(texts, None, [*notes, *without_caption(source.names, texts)])
    columns = sorted({column for row in rows.values() for column in row.values if column != _FILE})
    by_folder = label == FOLDER and label not in columns
    for setting, column in (("text", text), ("label", label)):
        missing = column is not None and column not in columns and not (setting == "label" and by_folder)
        if missing and column != (DEFAULT_TEXT if setting == "text" else None):
            there = listed(columns, LISTED) or f"none beside {_FILE}"
            raise source.error(f": data.{setting}: the metadata has no column {shown(str(column))}; there are {there}")
    texts, used = None, {label} if label and not by_folder else set()
    if text in columns:
        texts = {name: _text(source, rows.get(name), text) for name in source.names}
        used.add(text)
        if captions:
            notes.append(f"{counted(len(captions), 'caption file')} beside images not read: the metadata has captions")
    elif captions:
        texts = _beside(source, captions)
    if unused := [column for column in columns if column not in used]:
        notes.append(f"columns of the metadata that are not read: {listed(unused)}")
    classes: dict[str, str | None] | None = None
    if not by_folder:
        classes = dict.fromkeys(source.names)
        if label is not None:
            classes = {name: _class(source, rows.get(name), label) for name in source.names}
    return Known(texts, classes, [*notes, *without_caption(source.names, texts)])


def without_caption(names: Sequence[str], texts: Mapping[str, str] | None) -> list[str]:
    """The note of images without a caption, where others have one."""
    without = [name for name in names if not texts[name]] if texts is not None else []
    return [f"{counted(len(without), 'image has', 'images have')} no caption: {listed(without)}"] if without else []


def _beside(source: Source, captions: list[str]) -> dict[str, str]:
    """The caption of every image by the file of its name."""
    by_stem = {posixpath.splitext(name)[0]: name for name in captions}
    found = {}
    for name in source.names:
        caption = by_stem.get(posixpath.splitext(name)[0])
        found[name] = " ".join(_read(source, caption, _MAX_CAPTION_BYTES).split()) if caption is not None else ""
    return found


def _rows(source: Source, skip_bad: bool) -> tuple[dict[str, _Row], list[str]]:
    """The row of every image that has one, and what is to be said."""
    files = [name for name in source.texts if posixpath.basename(name) in METADATA]
    for first, second in itertools.pairwise(files):
        if posixpath.dirname(first) == posixpath.dirname(second):
            raise source.error(f" has both {shown(first)} and {shown(second)}; keep one of them")
    rows: dict[str, _Row] = {}
    images = set(source.names)
    gone: dict[str, str] = {}
    for file in files:
        folder = posixpath.dirname(file)
        for row in _jsonl(source, file) if file.endswith(".jsonl") else _csv(source, file):
            name = row.values.get(_FILE)
            if not isinstance(name, str) or not name.strip():
                said = f"was {shown(repr(name))}" if _FILE in row.values else "is not there"
                raise source.error(f": {row.where}: {_FILE} must be the path of an image, {said}", [file])
            path = posixpath.normpath(posixpath.join("/", folder, name.replace("\\", "/"))).lstrip("/")
            if path in rows:
                raise source.error(f": {row.where}: {shown(path)} is there twice, first in {rows[path].where}", [file])
            if path in images:
                rows[path] = row
            else:
                gone[path] = row.where
    if gone and not skip_bad:
        what = f"{counted(len(gone), 'file')} of the metadata not there, or no image"
        raise source.error(f": {what}: {listed(gone, LISTED)}; --set data.skip_bad=true skips them", gone)
    notes = [f"skipped {counted(len(gone), 'row')} of the metadata without an image: {listed(gone)}"] if gone else []
    return rows, notes


def _jsonl(source: Source, file: str) -> Iterator[_Row]:
    for number, line in enumerate(_read(source, file, _MAX_BYTES).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{shown(file)}, line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            said = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            raise source.error(f": {where} is not JSON: {said}", [file]) from error
        if not isinstance(values, dict):
            raise source.error(f": {where} must be an object, with {_FILE}, was {shown(line[:60].strip())}", [file])
        yield _Row(where, values)


def _csv(source: Source, file: str) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(_read(source, file, _MAX_BYTES), newline=""), strict=True)
    header: list[str] = []
    try:
        for row in reader:
            where = f"{shown(file)}, line {reader.line_num}"
            if not row:
                continue
            if not header:
                header = [column.strip() for column in row]
                if _FILE not in header or len(set(header)) < len(header):
                    columns = shown(", ".join(header)[:200])
                    what = f"must name the columns, each once, {_FILE} among them, was {columns}"
                    raise source.error(f": {where} {what}", [file])
                continue
            if len(row) != len(header):
                what = f"{counted(len(row), 'value')} for {counted(len(header), 'column')}"
                raise source.error(f": {where} has {what}", [file])
            # An empty value is what this format has for none.
            yield _Row(where, {column: value or None for column, value in zip(header, row, strict=True)})
    except csv.Error as error:
        raise source.error(f": {shown(file)}, line {reader.line_num} is not CSV: {error}", [file]) from error


def _text(source: Source, row: _Row | None, column: str) -> str:
    if row is None or row.values.get(column) is None:
        return ""
    if not _is_text(value := row.values[column]):
        raise source.error(f": {row.where}: {shown(column)} must be a string, was {shown(repr(value)[:60])}")
    return str(value)


def _class(source: Source, row: _Row | None, column: str) -> str | None:
    """The class that the row says; numbers are names too."""
    if row is None or row.values.get(column) is None:
        return None
    if not (isinstance(value := row.values[column], int) or _is_text(value)):
        what = f"must be a string or an integer, was {shown(repr(value)[:60])}"
        raise source.error(f": {row.where}: {shown(column)} {what}")
    return shown(str(value)) or None


def _is_text(value: Any) -> bool:
    """Whether it is a string without halves of characters, which JSON can spell."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _read(source: Source, name: str, most: int) -> str:
    """The text of a file, in UTF-8, with or without its mark.

    Raises:
        DataError: it cannot be read, or is too long, or in another encoding.
    """
    try:
        with source.files.open(name) as stream:
            content = stream.read(most + 1)
    except MemoryError:
        raise
    except Exception as error:
        # Damaged archives raise nearly anything.
        raise source.error(f": cannot read {shown(name)}: {shown(str(error))}", [name]) from error
    if len(content) > most:
        raise source.error(f": {shown(name)} must be at most {most} bytes long, is longer", [name])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise source.error(f": {shown(name)} must be in UTF-8, is not at byte {error.start}", [name]) from error
