"""What the folders of images mean: which are splits, which are classes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from gencore.data._sources import Source
from gencore.data.base import Split
from gencore.text import LISTED, NAMED, counted, listed, shown

# What a folder of a split is called, in any case.
_TRAIN = ("train", "training")
_TEST = ("test", "testing")
_VAL = ("val", "valid", "validation", "dev")
# Those that are no class either where there is no train: "valid" may be one, beside "invalid".
_NO_CLASS = ("test", "testing", "val", "validation")

# Words in the names of folders that look like splits, as in train2017, my_test, TrainSet, xtrain, traindata.
_LIKE_TRAIN = (*_TRAIN, "trainval", "trn")
_LIKE_TEST = (*_TEST, *_VAL, "tst", "eval", "evaluation", "holdout", "heldout")
_MAYBE_TEST = re.compile("test|tst|val|dev|hold|held", re.IGNORECASE)
_AFFIX = r"(?:x|y|set|data|image|img|pic|picture|photo|sample|split|file|folder|dir)s?"

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
    if source.others:
        kinds = [f"{shown(kind)} {count}" for kind, count in source.others.most_common()]
        more = f" and {counted(len(kinds) - NAMED, 'other kind')}" if len(kinds) > NAMED else ""
        number = counted(source.others.total(), "file")
        notes.append(f"skipped {number} without an image suffix: {', '.join(kinds[:NAMED])}{more}")
    if not source.names:
        raise source.error(" has no images" + "".join(f"; {note}" for note in notes))
    notes += _without_images(source)
    parts = _without_wrapper(source.names)
    halves, said = _halves(source, parts)
    splits = _given(source, parts, halves) if halves else _divided(_classed(source, parts), parts)
    class_names = sorted({item.class_name for both in splits.values() for item in both if item.class_name is not None})
    folded: dict[str, list[str]] = {}
    for name in class_names:
        folded.setdefault(name.casefold(), []).append(name)
    same = [" and ".join(names) for names in folded.values() if len(names) > 1]
    if same:
        notes.append(f"classes differ in upper and lower case alone: {', '.join(same)}")
    return Layout(splits, class_names, notes + said)


def _without_images(source: Source) -> list[str]:
    """The note of folders in which nothing is an image, each without what lies below it."""
    full = {""}
    for name in source.names:
        folder = name.rpartition("/")[0]
        while folder not in full:
            full.add(folder)
            folder = folder.rpartition("/")[0]
    empty = sorted(f for f in source.folders if f not in full and f.rpartition("/")[0] in full)
    return [f"{counted(len(empty), 'folder holds', 'folders hold')} no image: {listed(empty)}"] if empty else []


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
        _refuse_what_looks_like_splits(source, tops, parts)
    if not train or any(len(part) == 1 for part in parts.values()):
        return None, []
    others = [top for top in tops if top not in train + test + validation]
    if len(others) > 1 and not _MAYBE_TEST.search(" ".join(tops)) and all(len(part) == 2 for part in parts.values()):
        # Trains among buses and cars.
        return None, [f"{shown(train[0])} is a class, as there is no test folder beside it, but {listed(others)}"]
    if others:
        allowed = ", ".join(_TEST + _VAL)
        raise source.error(
            f" has folders beside {shown(train[0])} that may be classes or splits: {listed(others, LISTED)}; "
            f"beside it there may be {allowed}"
        )
    if not test + validation:
        return None, []
    notes = []
    if test and validation:
        number = sum(part[0] == validation[0] for part in parts.values())
        notes.append(
            f"skipped {counted(number, 'image')} in {shown(validation[0])}: {shown(test[0])} is the test split"
        )
    return {"train": train[0], "test": (test or validation)[0]}, notes


def _refuse_what_looks_like_splits(source: Source, tops: list[str], parts: _Parts) -> None:
    """Test images are not to be trained on because of how their folder is called or where it lies."""
    inner = sorted({folder for part in parts.values() for folder in part[1:-1]})
    for folders, where in ((tops, ""), (inner, " inside other folders")):
        like_train = _like(folders, _LIKE_TRAIN)
        like_test = [folder for folder in _like(folders, _LIKE_TEST) if folder not in like_train]
        alike = _alike(folders)
        only_test = like_test if like_test == folders else [top for top in folders if top.casefold() in _NO_CLASS]
        if not where and len(folders) > 1 and only_test and not like_train:
            what = f"{'folder' if len(only_test) == 1 else 'folders'} {listed(only_test, LISTED)}"
            raise source.error(f" has the {what}, but none that is called train; rename classes of such names")
        if (like_train and like_test) or alike:
            names = list(dict.fromkeys([*like_train, *like_test, *alike]))
            raise source.error(
                f" has folders{where} that look like splits: {listed(names, LISTED)}; if they are splits, call them "
                "train and test, with the class folders inside; if they are classes, rename them"
            )


def _like(folders: Iterable[str], words: tuple[str, ...]) -> list[str]:
    """Those of the folders that have one of the words in their name."""
    called = re.compile(rf"(?:{_AFFIX})*(?:{'|'.join(words)})(?:{_AFFIX}|[ab])*")
    return [folder for folder in folders if any(called.fullmatch(word) for word in _words(folder))]


def _words(name: str) -> set[str]:
    """The words of a folder's name in lower case: ``MyTrainSet_1`` gives my, train, set, and mytrainset."""
    runs = re.findall(r"[^\W\d_]+", name)
    camel = [word for run in runs for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[^A-Z]+", run)]
    return {word.casefold() for word in (*runs, *camel)}


def _alike(folders: Iterable[str]) -> list[str]:
    """Folders called the same but for the split, whatever is glued to it: mytrain and mytest."""
    rests: dict[str, dict[str, str]] = {"train": {}, "test": {}}
    for folder in folders:
        name = folder.casefold()
        for found in re.finditer(r"(train)(?!e)|test(?!e)|val(?:id(?:ation)?)?(?!e)", name):
            rest = f"{name[: found.start()]}/{name[found.end() :]}"
            rests["train" if found[1] else "test"][rest] = folder
    return [names[rest] for rest in rests["train"] if rest in rests["test"] for names in rests.values()]


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
            f": {counted(len(flat), 'image')} beside the class folders, in none of them: {listed(flat, LISTED)}",
            flat,
        )
    return [Item(name, None if flat else shown(part[0])) for name, part in parts.items()]
