"""What the folders of images mean: which are splits, which are classes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from gencore.data._formats import shown
from gencore.data._sources import NAMED, Source, counted, listed
from gencore.data.base import Split

# What a folder of a split is called, in any case.
_TRAIN = ("train", "training")
_TEST = ("test", "testing")
_VAL = ("val", "valid", "validation", "dev")

# Folders that are called nearly so: train2017, test_images, trainA.
_LIKE_TRAIN = re.compile(r"(?i:train(ing)?)(?![a-z])")
_LIKE_TEST = re.compile(r"(?i:test(ing)?|val(id(ation)?)?)(?![a-z])")

_TEST_SHARE = 10


class Item(NamedTuple):
    """An image and its class; None where folders are no classes."""

    name: str
    class_name: str | None


class Layout(NamedTuple):
    """The images of both splits, the names of their classes, and what is to be said of it."""

    splits: dict[Split, list[Item]]
    class_names: list[str]
    notes: list[str]


# The parts of a file's name, below what lies around all files.
_Parts = Mapping[str, tuple[str, ...]]


def laid_out(source: Source) -> Layout:
    """Which images of the source are in which split and class.

    Raises:
        DataError: there are no images, or their folders do not fit together; the message names them.
    """
    notes = list(source.notes)
    if source.left_out:
        kinds = [f"{shown(kind)} {count}" for kind, count in source.left_out.most_common()]
        others = f" and {counted(len(kinds) - NAMED, 'other kind')}" if len(kinds) > NAMED else ""
        number = counted(source.left_out.total(), "file")
        notes.append(f"left out {number} not called like an image: {', '.join(kinds[:NAMED])}{others}")
    if not source.names:
        raise source.error(" holds no images" + "".join(f"; {note}" for note in notes))
    notes += _without_images(source)
    parts = _without_wrapper(source.names)
    halves, more = _halves(source, parts)
    splits = _given(source, parts, halves) if halves else _divided(_classed(source, parts), parts)
    class_names = sorted({item.class_name for both in splits.values() for item in both if item.class_name is not None})
    folded: dict[str, list[str]] = {}
    for name in class_names:
        folded.setdefault(name.casefold(), []).append(name)
    same = [" and ".join(names) for names in folded.values() if len(names) > 1]
    if same:
        notes.append(f"classes differ in upper and lower case alone: {', '.join(same)}")
    return Layout(splits, class_names, notes + more)


def _without_images(source: Source) -> list[str]:
    """The note of folders in which nothing is an image, each without what lies below it."""
    full = {""}
    for name in source.names:
        folder = name.rpartition("/")[0]
        while folder not in full:
            full.add(folder)
            folder = folder.rpartition("/")[0]
    empty = sorted(f for f in source.folders if f not in full and f.rpartition("/")[0] in full)
    return [f"found no image in {counted(len(empty), 'folder')}: {listed(dict.fromkeys(empty, ''))}"] if empty else []


def _without_wrapper(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Every image's parts below the one folder, if any, that holds all classes or splits."""
    parts = {name: tuple(name.split("/")) for name in names}
    while len({part[0] for part in parts.values()}) == 1 and min(map(len, parts.values())) > 2:
        parts = {name: part[1:] for name, part in parts.items()}
    return parts


def _halves(source: Source, parts: _Parts) -> tuple[dict[Split, str] | None, list[str]]:
    """The folders of the two splits, or None if the folders are classes; and what is to be said of it."""
    tops = sorted({part[0] for part in parts.values() if len(part) > 1})
    train, test, validation = ([top for top in tops if top.casefold() in called] for called in (_TRAIN, _TEST, _VAL))
    for same in (train, test, validation):
        if len(same) > 1:
            raise source.error(f" has folders that mean the same split: {', '.join(map(shown, same))}")
    if not train:
        _refuse_what_looks_like_splits(source, tops, {part[1] for part in parts.values() if len(part) > 2})
    if not train or any(len(part) == 1 for part in parts.values()):
        return None, []
    others = [shown(top) for top in tops if top not in train + test + validation]
    if others:
        allowed = ", ".join(_TEST + _VAL)
        raise source.error(
            f" has folders beside {shown(train[0])} that may be classes or splits: {', '.join(others)}; "
            f"beside it there may be {allowed}"
        )
    if not test + validation:
        return None, []
    notes = []
    if test and validation:
        number = sum(part[0] == validation[0] for part in parts.values())
        notes.append(f"left out {shown(validation[0])}, {counted(number, 'image')}: {shown(test[0])} is the test split")
    return {"train": train[0], "test": (test or validation)[0]}, notes


def _refuse_what_looks_like_splits(source: Source, tops: list[str], inner: Iterable[str]) -> None:
    """Test images are not to be trained on because of how their folder is called or where it lies."""
    if len(tops) > 1 and all(top.casefold() in _TEST + _VAL for top in tops):
        raise source.error(f" has the folders {', '.join(map(shown, tops))}, but none that is called train")
    for folders, where in ((tops, ""), (sorted(inner), " inside other folders")):
        like_train = [shown(folder) for folder in folders if _LIKE_TRAIN.match(folder)]
        like_test = [shown(folder) for folder in folders if _LIKE_TEST.match(folder)]
        if like_train and like_test:
            raise source.error(
                f" has folders{where} that look like splits: {', '.join(like_train + like_test)}; call them train and "
                "test, with the classes in them"
            )


def _given(source: Source, parts: _Parts, halves: dict[Split, str]) -> dict[Split, list[Item]]:
    """The splits that folders are."""
    found: dict[Split, list[Item]] = {}
    for half, folder in halves.items():
        found[half] = _classed(source, {name: part[1:] for name, part in parts.items() if part[0] == folder})
    flat = [folder for half, folder in halves.items() if found[half][0].class_name is None]
    if len(flat) == 1:
        raise source.error(f" has class folders in one split, but not in {shown(flat[0])}")
    return found


def _divided(items: list[Item], parts: _Parts) -> dict[Split, list[Item]]:
    """A tenth of every class to test, chosen by a hash of the names: the same wherever the files lie."""
    by_class: dict[str | None, list[Item]] = {}
    for item in items:
        by_class.setdefault(item.class_name, []).append(item)
    train: list[Item] = []
    test: list[Item] = []
    for members in by_class.values():
        hashed = sorted(members, key=lambda item: _digest(parts[item.name]))
        chosen = set(hashed[: max(1, round(len(hashed) / _TEST_SHARE))]) if len(hashed) > 1 else set()
        test += [item for item in members if item in chosen]
        train += [item for item in members if item not in chosen]
    return {"train": train, "test": test}


def _digest(parts: tuple[str, ...]) -> bytes:
    # Bytes that are no UTF-8 are surrogates in a name.
    return hashlib.blake2b("/".join(parts).encode("utf-8", "surrogatepass")).digest()


def _classed(source: Source, parts: _Parts) -> list[Item]:
    flat = [name for name, part in parts.items() if len(part) == 1]
    if flat and len(flat) < len(parts):
        raise source.error(
            f": {counted(len(flat), 'image')} beside the class folders, in none of them: "
            f"{listed(dict.fromkeys(flat, ''))}"
        )
    return [Item(name, None if flat else shown(part[0])) for name, part in parts.items()]
