"""Data sets through the library ``datasets``: ``huggingface:owner/name`` from the Hub, or ``huggingface:some/folder``.

The folder is one that ``save_to_disk`` wrote, or any that ``load_dataset`` reads. Images come from the first column of
them, classes from the first column of the type ClassLabel, captions from the string column ``text``; settings name
others. Splits are called and chosen as those of the data set ``images``.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gencore.config import field
from gencore.data._assembly import PictureSettings, assembled
from gencore.data._layout import Item, Layout, split_names, tenth
from gencore.data._metadata import DEFAULT_TEXT, Known, without_caption
from gencore.data._sources import Source
from gencore.data.base import DataError, DatasetPlugin, NamedDataset, Split
from gencore.data.images import check_pillow, planned
from gencore.text import LISTED, listed, shown

_NAME = "huggingface"
# What save_to_disk writes at the top of a folder, of several splits or of one.
_SAVED = ("dataset_dict.json", "state.json")


@dataclass(frozen=True)
class HubSettings(PictureSettings):
    """How images are read."""

    subset: str | None = field(None, doc="which of the data sets of that name, where there are several")
    image: str | None = field(None, doc="the column of the images; by default the first one that holds images")
    text: str = field(DEFAULT_TEXT, doc="the column of the captions")
    label: str | None = field(None, doc="the column of the classes; by default the first one of the type ClassLabel")


class _Rows:
    """The images of a column as files, by the name ``split/row``."""

    def __init__(self, splits: Mapping[str, Any], column: str):
        self._splits, self._column = splits, column

    def open(self, name: str) -> IO[bytes]:
        split, _, row = name.rpartition("/")
        value = self._splits[split][int(row)][self._column]
        if value is None or (value["bytes"] is None and value["path"] is None):
            raise OSError("no image in this row")
        if value["bytes"] is not None:
            return io.BytesIO(value["bytes"])
        import fsspec

        # It may lie in an archive or on a server: zip://1.png::/some/archive.zip.
        with fsspec.open(value["path"], "rb") as stream:
            return io.BytesIO(stream.read())

    def close(self) -> None:
        pass

    def keep(self) -> None:
        pass


def load_huggingface(path: Path, split: Split, settings: HubSettings | None = None) -> NamedDataset:
    """The images of a data set of the Hub, or of a folder.

    Args:
        path: the folder, or the name on the Hub, which is downloaded to the cache of ``datasets`` if it is not there.
        split: ``"train"`` or ``"test"``.
        settings: which columns are read and how, and whether images that cannot be read are skipped.

    Raises:
        MissingSplitError: there are no images of this split.
        DataError: no such data set or column, or images that cannot be read; the message names them.
    """
    check_pillow(_NAME)
    settings = settings or HubSettings()
    tables = _tables(path, settings)
    source = _source(path, tables, _image_column(path, tables, settings))
    halves, said = _splits(path, list(tables))
    names: dict[Split, list[str]] = {of: [f"{key}/{i}" for i in range(len(tables[key]))] for of, key in halves.items()}
    if "test" not in names:
        chosen = tenth({name: tuple(name.split("/")) for name in names["train"]})
        names = {
            "train": [name for name in names["train"] if name not in chosen],
            "test": [name for name in names["train"] if name in chosen],
        }
    classes, class_names = _classes(source, tables, halves, settings)
    texts = _texts(source, tables, halves, settings)
    items = {of: [Item(name, classes.get(name) if classes else None) for name in both] for of, both in names.items()}
    layout = Layout(items, class_names, said)
    known = Known(texts, classes, without_caption([name for both in names.values() for name in both], texts))
    return assembled(source, split, settings, planned(source, layout, known, settings.label, settings.skip_bad))


def _tables(path: Path, settings: HubSettings) -> dict[str, Any]:
    """The tables of all splits by their names."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"data set {_NAME} needs the library datasets: pip install 'gencore[huggingface]'") from error
    try:
        if path.is_dir() and any((path / name).is_file() for name in _SAVED):
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(str(path), settings.subset)
    except MemoryError:
        raise
    except Exception as error:
        # Of the network, the server, and of every format that it reads.
        said = " ".join(str(error).split())[:500]
        raise DataError(f"data set {_NAME}: cannot load {shown(str(path))}: {shown(said)}") from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def _splits(path: Path, there: list[str]) -> tuple[dict[Split, str], list[str]]:
    """The names of the tables of both splits, or of train alone; and what is to be said."""
    train, test, validation = split_names(there)
    if not train:
        raise DataError(f"data set {_NAME}: {shown(str(path))} has no split train, but {listed(there, LISTED)}")
    others = (test or validation)[:1]
    notes = (
        [f"skipped the splits {listed(left)}"] if (left := [n for n in there if n not in train[:1] + others]) else []
    )
    if not others:
        return {"train": train[0]}, [*notes, f"a tenth of {shown(train[0])} is the test split, as there is no other"]
    return {"train": train[0], "test": others[0]}, notes


def _image_column(path: Path, tables: Mapping[str, Any], settings: HubSettings) -> str:
    import datasets

    features = next(iter(tables.values())).features
    columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    column: str | None = settings.image or next(iter(columns), None)
    if column is None or column not in columns:
        wanted = "column of images" if settings.image is None else f"column of images {shown(settings.image)}"
        there = listed(columns or list(features), LISTED)
        raise DataError(f"data set {_NAME}: {shown(str(path))} has no {wanted} (data.image); there are {there}")
    return column


def _source(path: Path, tables: Mapping[str, Any], column: str) -> Source:
    import datasets

    # As bytes: they are decoded as files are.
    images = {
        name: table.select_columns([column]).cast_column(column, datasets.Image(decode=False)).with_format(None)
        for name, table in tables.items()
    }
    files = [file["filename"] for table in tables.values() for file in table.cache_files]
    shapes = [(name, len(table), table.features) for name, table in tables.items()]
    state = hashlib.blake2b(repr((column, shapes)).encode())
    for file in files:
        info = os.stat(file)
        state.update(repr((file, info.st_size, info.st_mtime_ns)).encode())
    names = [f"{name}/{i}" for name, table in tables.items() for i in range(len(table))]
    source = Source(_NAME, path, state.hexdigest(), names, {}, [], {}, Counter(), set(), [], _Rows(images, column))
    others = [name for name, table in tables.items() if table.features != next(iter(tables.values())).features]
    if others:
        raise source.error(f": the splits {listed([next(iter(tables)), *others])} have different columns")
    return source


def _values(table: Any, column: str) -> list[Any]:
    return list(table.select_columns([column]).with_format(None)[:][column])


def _column(source: Source, tables: Mapping[str, Any], setting: str, column: str) -> None:
    """Raises DataError unless there is such a column."""
    features = next(iter(tables.values())).features
    if column not in features:
        raise source.error(
            f": data.{setting}: there is no column {shown(column)}, but {listed(list(features), LISTED)}"
        )


def _classes(
    source: Source, tables: Mapping[str, Any], halves: Mapping[Split, str], settings: HubSettings
) -> tuple[dict[str, str | None] | None, list[str]]:
    """The class of every image, and the names of all; None where there is no column of them."""
    import datasets

    features = next(iter(tables.values())).features
    label = settings.label
    if label is None:
        label = next((name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)), None)
        if label is None:
            return None, []
    _column(source, tables, "label", label)
    names = getattr(features[label], "names", None)
    found: dict[str, str | None] = {}
    for key in halves.values():
        for row, value in enumerate(_values(tables[key], label)):
            if value is not None and not isinstance(value, (str, int)):
                what = f"must be strings or integers, {key}/{row} is {shown(repr(value)[:60])}"
                raise source.error(f": data.label: the values of {shown(label)} {what}")
            if names is None:
                found[f"{key}/{row}"] = None if value is None else shown(str(value)) or None
            else:
                # Hidden labels of test splits are -1.
                found[f"{key}/{row}"] = names[value] if isinstance(value, int) and value >= 0 else None
    return found, list(names or sorted({value for value in found.values() if value is not None}))


def _texts(
    source: Source, tables: Mapping[str, Any], halves: Mapping[Split, str], settings: HubSettings
) -> dict[str, str] | None:
    """The caption of every image; None where there is no column of them."""
    if settings.text == DEFAULT_TEXT and DEFAULT_TEXT not in next(iter(tables.values())).features:
        return None
    _column(source, tables, "text", settings.text)
    found = {}
    for key in halves.values():
        for row, value in enumerate(_values(tables[key], settings.text)):
            if value is not None and not isinstance(value, str):
                what = f"must be strings, {key}/{row} is {shown(repr(value)[:60])}"
                raise source.error(f": data.text: the values of {shown(settings.text)} {what}")
            found[f"{key}/{row}"] = value or ""
    return found


plugin = DatasetPlugin(
    name=_NAME,
    load=load_huggingface,
    needs_path=True,
    remote=True,
    summary="a data set of the library datasets, from the Hub or a folder: huggingface:OWNER/NAME or huggingface:PATH",
    settings=HubSettings,
)
