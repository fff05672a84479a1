"""Folders and archives as they come: the right pixels, or one line that names the file."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from data.pictures import encoded, write_archive, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gencore import Key, data
from gencore.config import ConfigError
from gencore.data import DataError, MissingSplitError
from gencore.data.images import ImageSettings, load_images
from gencore.text import shown

# Lossless, so that an image of one gray is known by it.
KINDS = [
    *(("PNG", mode, ".png") for mode in ("L", "LA", "RGB", "RGBA", "P", "I;16")),
    *(("TIFF", mode, ".TIF") for mode in ("L", "RGB", "I;16", "I")),
    *(("GIF", "P", ".gif"), ("BMP", "RGB", ".bmp"), ("BMP", "L", ".jpg"), ("PPM", "L", ".pgm"), ("TGA", "RGB", ".tga")),
    *(("PCX", "L", ".pcx"), ("SGI", "RGB", ".rgb"), ("JPEG2000", "L", ".jp2"), ("PNG", "L", ".jfif")),
]
ODD = "aZ0 .\\\n\t\r'\"%*?:é漢\u202e\U0001f600\x7f\x01"
LAYOUTS = [
    ("{i}",),
    ("cat/{i}", "dog/{i}"),
    ("data/cat/{i}", "data/dog/deep/{i}"),
    ("train/{i}", "test/{i}"),
    ("Training/cat/{i}", "Training/dog/{i}", "VAL/cat/{i}", "VAL/dog/{i}"),
]


class File(NamedTuple):
    content: bytes
    suffix: str
    good: bool


def of_one_gray(value: int, kind: tuple[str, str, str], size: tuple[int, int]) -> bytes:
    format, mode, _ = kind
    image = Image.new("L", size, value)
    if mode.startswith("I"):
        wide = np.full(size[::-1], value * 257, np.uint16 if mode == "I;16" else np.int32)
        return encoded(Image.fromarray(wide), format)
    return encoded(image.convert(mode), format)


@st.composite
def files(draw: st.DrawFn, value: int, size: tuple[int, int]) -> File:
    kind = draw(st.sampled_from(KINDS))
    content = of_one_gray(value, kind, size)
    damage = draw(st.sampled_from(("none", "none", "none", "cut", "bits", "noise")))
    if damage == "cut":
        content = content[: draw(st.integers(0, len(content) - 1))]
    elif damage == "bits":
        changed = bytearray(content)
        for at in draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
            changed[at] ^= draw(st.integers(1, 255))
        content = bytes(changed)
    elif damage == "noise":
        content = draw(st.binary(max_size=40))
    return File(content, kind[2], damage == "none")


@st.composite
def sets(draw: st.DrawFn) -> tuple[dict[str, File], bool]:
    """Files by name, and whether as an archive."""
    layout = draw(st.sampled_from(LAYOUTS))
    archive = draw(st.booleans())
    # In an archive a backslash parts folders; and a name that is no UTF-8 cannot be written.
    odd = ODD.replace("\\", "") if archive else ODD + "\udcff"
    size = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    found = {}
    for i in range(draw(st.integers(2, 12))):
        name = layout[i % len(layout)].format(i=f"{i}{draw(st.text(odd, max_size=4))}")
        file = draw(files(10 * i + 5, size))
        found[name + file.suffix] = file
    return found, archive


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow fewer names")
@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(sets(), st.booleans(), st.sampled_from((None, 4)))
def test_right_pixels_or_an_error_that_names_the_file(given_files, skip, size):
    found, archive = given_files
    with tempfile.TemporaryDirectory() as folder:
        write = write_archive if archive else write_folder
        path = write(Path(folder) / "set", {name: file.content for name, file in found.items()})
        check(path, found, ImageSettings(skip_bad=skip, size=size))


def check(path: Path, found: dict[str, File], chosen: ImageSettings) -> None:
    good = {10 * i + 5 for i, file in enumerate(found.values()) if file.good}
    damaged = [name for name, file in found.items() if not file.good]
    seen: list[int] = []
    for split in ("train", "test"):
        try:
            images = load_images(path, split, chosen)
        except MissingSplitError:
            continue
        except DataError as error:
            said = str(error)
            break
        for image in images.images:
            values = set(image.flatten().tolist())
            assert len(values) == 1 or damaged  # what is damaged may be decoded all the same
            seen += values if len(values) == 1 else ()
    else:
        assert good <= set(seen)
        return
    assert shown(said) == said
    named = any(shown(name) in said for name in damaged)
    # A damaged header may say another size; and with what is skipped, all images of a split or a class may be gone.
    assert named or (damaged and "one size" in said) or (damaged and chosen.skip_bad and "can be read" in said), said


CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=6)
SKIPPED = re.compile(r"skipped (\d+)|^(\d+) folders? holds? no image")


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(CHANGES, st.booleans())
def test_a_damaged_archive_is_read_or_named(changes, skip):
    with tempfile.TemporaryDirectory() as folder:
        images = {f"{name}/{i}.png": of_one_gray(9, KINDS[0], (4, 3)) for name in ("cat", "dog") for i in range(4)}
        path = write_archive(Path(folder) / "set.zip", images)
        content = bytearray(path.read_bytes())
        for place, change in changes:
            content[int(place * len(content))] ^= change
        path.write_bytes(content)
        read = 0
        bad: set[str] = set()
        notes: set[str] = set()
        for split in ("train", "test"):
            try:
                found = load_images(path, split, ImageSettings(skip_bad=skip))
            except DataError as error:
                said, bad = str(error), bad | set(error.files)
                stopped = not isinstance(error, MissingSplitError)
            else:
                assert found.images.unique().tolist() == [9]
                said, stopped = str(path), False
                read += len(found)
                notes |= set(found.notes)
            assert str(path) in said
            assert "\n" not in said
            if stopped:
                return
        skipped = sum(int(number[1] or number[2]) for number in map(SKIPPED.search, notes) if number)
        assert read + len(bad) + skipped == len(images), (read, bad, notes)


# What else a data set may be called, what lies in it, and how it is read.
PLACES = {
    "images": ("{i}", "cat/{i}", "train/{i}", "test/{i}", "train/cat/{i}", "val/dog/{i}"),
    "pairs": (
        "{i}",
        "train/{i}",
        "test/{i}",
        "trainA/{i}",
        "trainB/{i}",
        "testA/{i}",
        "testB/{i}",
        "A/{i}",
        "B/train/{i}",
    ),
    "domains": ("trainA/{i}", "trainB/{i}", "test_a/{i}", "valB/{i}", "A/{i}", "B/{i}", "train/A/{i}", "x/{i}"),
}
# Those of one set; others are mixed.
SETS = {
    "images": [
        ("{i}",),
        ("cat/{i}", "dog/{i}"),
        ("train/{i}", "val/{i}"),
        ("train/cat/{i}", "train/dog/{i}", "test/cat/{i}"),
    ],
    "pairs": [("train/{i}", "test/{i}"), ("trainA/{i}", "trainB/{i}", "testA/{i}", "testB/{i}"), ("A/{i}", "B/{i}")],
    "domains": [
        ("trainA/{i}", "trainB/{i}"),
        ("A/train/{i}", "A/val/{i}", "B/train/{i}", "B/val/{i}"),
        ("A/{i}", "B/{i}"),
    ],
}
COLUMNS = ("file_name", "text", "kind", "file_name ", "", "file_name,text", '"')
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
OPTIONS = st.fixed_dictionaries(
    {"skip_bad": st.booleans(), "flip": st.booleans(), "cache": st.sampled_from((0.0, 1e-8, 4.0))},
    optional={
        "size": st.sampled_from((1, 4, 7)),
        "crop": st.sampled_from(("center", "random", "none")),
        "text": st.sampled_from(("text", "kind", "no such column")),
        "label": st.sampled_from(("kind", "text", "folder", "no such column")),
        "direction": st.sampled_from(("AtoB", "BtoA")),
    },
)


@st.composite
def metadata(draw: st.DrawFn, names: list[str]) -> tuple[str, bytes]:
    """A file that says something of the images, or nothing that can be understood."""
    inside = draw(st.sampled_from(("", "train/", "cat/")))
    how = draw(st.sampled_from(("jsonl", "csv", "captions", "noise")))
    named = st.sampled_from([name.removeprefix(inside) for name in names])
    if how == "captions":
        return f"{draw(st.sampled_from(names)).rpartition('.')[0]}.txt", draw(st.binary(max_size=9))
    if how == "noise":
        return f"{inside}metadata.{draw(st.sampled_from(('csv', 'jsonl')))}", draw(st.binary(max_size=40))
    if how == "jsonl":
        rows = st.fixed_dictionaries({}, optional={"file_name": named | JSON, "text": JSON, "kind": JSON})
        lines = draw(st.lists(rows | JSON, max_size=6))
        return f"{inside}metadata.jsonl", "\n".join(map(json.dumps, lines)).encode()
    lines = [",".join(draw(st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=3)))]
    lines += [",".join(draw(st.lists(named | st.text(max_size=4), max_size=3))) for _ in range(draw(st.integers(0, 5)))]
    return f"{inside}metadata.csv", "\n".join(lines).encode("utf-8", "surrogatepass")


@st.composite
def any_sets(draw: st.DrawFn) -> tuple[str, dict[str, bytes]]:
    """The name of a data set and files by name, of which it may make something."""
    kind = draw(st.sampled_from(sorted(PLACES)))
    found: dict[str, bytes] = {}
    mixed = st.lists(st.sampled_from(PLACES[kind]), min_size=1, max_size=4, unique=True)
    places = draw(st.one_of(st.sampled_from(SETS[kind]), st.sampled_from(SETS[kind]), mixed))
    # Names are the same in all places, for pairs; and mostly there are no other sizes.
    sizes = st.just((4, 3)) if draw(st.booleans()) else st.tuples(st.integers(1, 9), st.integers(1, 9))
    for i in range(draw(st.integers(1, 4))):
        for place in places:
            file = draw(files(10 * i, draw(sizes)))
            found[f"{place.format(i=i)}{file.suffix}"] = file.content
    for _ in range(draw(st.sampled_from((0, 0, 0, 1, 2)))):
        name, content = draw(metadata(list(found)))
        found[name] = content
    return kind, found


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(any_sets(), st.booleans(), OPTIONS)
def test_nothing_but_errors_of_data_and_settings(given_set, archive, options):
    kind, found = given_set
    known = data.settings_type(kind).setting_names()
    options = {name: value for name, value in options.items() if name in known}
    with tempfile.TemporaryDirectory() as folder:
        path = (write_archive if archive else write_folder)(Path(folder) / "set", found)
        for split in ("train", "test"):
            try:
                dataset = data.load(f"{kind}:{path}", split, options)
                batch = dataset.batch(torch.arange(len(dataset)), Key(0))
                assert batch.images.shape == (len(dataset), *dataset.spec.image_shape)
                assert batch.conditions.keys() == {condition.name for condition in dataset.spec.conditions}
                assert dataset.fingerprint == dataset.fingerprint
                data.check(dataset, f"{kind}:{path}", options)
                said = "".join(dataset.notes)
            except DataError as error:
                said = str(error)
                assert str(path) in said or "splits train and test differ" in said
            except ConfigError as error:
                said = error.faults[0]
                assert said.startswith("data.crop: must be center without a size")
            assert shown(said) == said
