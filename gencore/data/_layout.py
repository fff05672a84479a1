"""What the folders of images mean: which are splits, which are classes."""

from __future__ import annotations

import hashlib
import posixpath
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


# One of two domains, or of the two sides of pairs: trainA, test_B; or A and B beside the splits or inside them.
_SIDED = re.compile(rf"({'|'.join((*_TRAIN, *_TEST, *_VAL))})[ _-]?([AB])", re.IGNORECASE)
_SIDES = ("a", "b")


class Item(NamedTuple):
    """An image and its class; None where it has none."""

    name: str
    class_name: str | None


class Layout(NamedTuple):
    """The images of both splits, the names of their classes, and what is to be said of it."""

    splits: dict[Split, list[Item]]
    class_names: list[str]
    notes: list[str]


# The parts of a file's name, below what lies around all files.
_Parts = Mapping[str, tuple[str, ...]]


class Sides(NamedTuple):
    """The images of two domains, A and B, by split, each with what its name has in common with that of its pair."""

    splits: dict[Split, tuple[dict[str, str], dict[str, str]]]
    notes: list[str]


def laid_out(source: Source, classes: Mapping[str, str | None] | None = None) -> Layout:
    """Which images of the source are in which split and class.

    Args:
        classes: the class of every image, or None for none; by default folders are classes.

    Raises:
        DataError: there are no images, or their folders do not fit together; the message names them.
    """
    notes = _notes(source)
    parts = _without_wrapper(source.names)
    halves, said = _halves(source, parts)
    splits = _given(source, parts, halves, classes) if halves else _divided(_classed(source, parts, classes), parts)
    class_names = sorted({item.class_name for both in splits.values() for item in both if item.class_name is not None})
    folded: dict[str, list[str]] = {}
    for name in class_names:
        folded.setdefault(name.casefold(), []).append(name)
    same = [" and ".join(names) for names in folded.values() if len(names) > 1]
    if same:
        notes.append(f"classes differ in upper and lower case alone: {', '.join(same)}")
    return Layout(splits, class_names, notes + said)


def two_sided(source: Source) -> Sides | None:
    """The images of ``trainA``, ``trainB`` and so on, or of ``A`` and ``B``; None if no folder is called like these.

    Raises:
        DataError: there are no images, or their folders do not fit together; the message names them.
    """
    notes = _notes(source)
    sides: tuple[list[str], list[str]] = ([], [])
    parts: dict[str, tuple[str, ...]] = {}
    alone = []
    for name, part in _without_wrapper(source.names).items():
        side, parts[name] = _side_of(part)
        if side is None:
            alone.append(name)
        else:
            sides[side].append(name)
    if len(alone) == len(parts):
        return None
    if alone:
        raise source.error(f": {counted(len(alone), 'image')} in neither A nor B: {listed(alone, LISTED)}", alone)
    if not all(sides):
        missing, there = ("A", "B") if not sides[0] else ("B", "A")
        raise source.error(f" has no images of {missing}, but {counted(len(parts), 'image')} of {there}")
    halves, said = _halves(source, parts)
    splits: dict[Split, tuple[dict[str, str], dict[str, str]]] = {}
    if halves:
        for half, folder in halves.items():
            splits[half] = _stems(sides, {name: part[1:] for name, part in parts.items() if part[0] == folder})
    else:
        first, second = _stems(sides, parts)
        # Of pairs, both halves get the same side of the split: what is equal of their names decides alone.
        stems = {*first.values(), *second.values()}
        chosen = tenth({stem: tuple(stem.split("/")) for stem in sorted(stems)})
        splits["train"] = _among(first, stems - chosen), _among(second, stems - chosen)
        splits["test"] = _among(first, chosen), _among(second, chosen)
    return Sides(splits, notes + said)


def _side_of(part: tuple[str, ...]) -> tuple[int | None, tuple[str, ...]]:
    """Which side an image is of, 0 or 1, and its name's parts without that."""
    if len(part) > 1 and (found := _SIDED.fullmatch(part[0])):
        return _SIDES.index(found[2].casefold()), (found[1], *part[1:])
    for at in (0, 1):
        inside_split = at == 0 or part[0].casefold() in (*_TRAIN, *_TEST, *_VAL)
        if len(part) > at + 1 and part[at].casefold() in _SIDES and inside_split:
            return _SIDES.index(part[at].casefold()), (*part[:at], *part[at + 1 :])
    return None, part


def _stems(sides: tuple[list[str], list[str]], parts: _Parts) -> tuple[dict[str, str], dict[str, str]]:
    first, second = (
        {name: posixpath.splitext("/".join(parts[name]))[0] for name in side if name in parts} for side in sides
    )
    return first, second


def _among(side: Mapping[str, str], stems: set[str]) -> dict[str, str]:
    return {name: stem for name, stem in side.items() if stem in stems}


def _notes(source: Source) -> list[str]:
    """What is to be said of the files, if there are images."""
    notes = list(source.notes)
    if source.others:
        kinds = [f"{shown(kind)} {count}" for kind, count in source.others.most_common()]
        more = f" and {counted(len(kinds) - NAMED, 'other kind')}" if len(kinds) > NAMED else ""
        number = counted(source.others.total(), "file")
        notes.append(f"skipped {number} without an image suffix: {', '.join(kinds[:NAMED])}{more}")
    if not source.names:
        raise source.error(" has no images" + "".join(f"; {note}" for note in notes))
    return [*notes, *_without_images(source)]


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
    train, test, validation = split_names(tops)
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


def split_names(names: Iterable[str]) -> tuple[list[str], list[str], list[str]]:
    """Those of the names that mean the split train, the split test, and a validation split."""
    found = list(names)
    train, test, validation = ([name for name in found if name.casefold() in of] for of in (_TRAIN, _TEST, _VAL))
    return train, test, validation


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


def _given(
    source: Source, parts: _Parts, halves: dict[Split, str], classes: Mapping[str, str | None] | None
) -> dict[Split, list[Item]]:
    """The splits that folders are."""
    found: dict[Split, list[Item]] = {}
    for half, folder in halves.items():
        inside = {name: part[1:] for name, part in parts.items() if part[0] == folder}
        found[half] = _classed(source, inside, classes)
    flat = [folder for half, folder in halves.items() if found[half][0].class_name is None]
    if classes is None and len(flat) == 1:
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
        chosen = tenth({item.name: parts[item.name] for item in members})
        test += [item for item in members if item.name in chosen]
        train += [item for item in members if item.name not in chosen]
    return {"train": train, "test": test}


def tenth(parts: _Parts) -> set[str]:
    """A tenth of the names, at least one of two."""
    hashed = sorted(parts, key=lambda name: _digest(parts[name]))
    return set(hashed[: max(1, round(len(hashed) / _TEST_SHARE))]) if len(hashed) > 1 else set()


def _digest(parts: tuple[str, ...]) -> bytes:
    # Bytes that are no UTF-8 are surrogates in a name.
    return hashlib.blake2b("/".join(parts).encode("utf-8", "surrogatepass")).digest()


def _classed(source: Source, parts: _Parts, classes: Mapping[str, str | None] | None) -> list[Item]:
    if classes is not None:
        return [Item(name, classes[name]) for name in parts]
    flat = [name for name, part in parts.items() if len(part) == 1]
    if flat and len(flat) < len(parts):
        raise source.error(
            f": {counted(len(flat), 'image')} beside the class folders, in none of them: {listed(flat, LISTED)}",
            flat,
        )
    return [Item(name, None if flat else shown(part[0])) for name, part in parts.items()]
