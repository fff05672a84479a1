"""Captions and classes from metadata.jsonl, metadata.csv, and text files beside images."""

import json
import os
from pathlib import Path

import pytest
from data.pictures import png

from gencore.data import DataError
from gencore.data.images import ImageSettings, load_images


def jsonl(*rows):
    return "\n".join(json.dumps(row) for row in rows).encode()


def row(name, text=None, **others):
    return {"file_name": name, **({} if text is None else {"text": text}), **others}


def images_of(count=4, folder=""):
    return {f"{folder}{i}.png": png(value=10 * i) for i in range(count)}


def texts_of(path, split="train", **settings):
    """The caption of each image by its value."""
    data = load_images(path, split, ImageSettings(**settings))
    return dict(zip((data.images[:, 0, 0, 0] // 10).tolist(), data.values("text"), strict=True))


def test_captions_in_lines_of_json(make):
    rows = [row(f"{i}.png", f"a picture of {i}") for i in range(4)]
    path = make({**images_of(), "metadata.jsonl": b"\xef\xbb\xbf" + jsonl(*rows) + b"\r\n\n"})
    train, test = texts_of(path), texts_of(path, "test")
    assert train | test == {i: f"a picture of {i}" for i in range(4)}
    assert len(test) == 1
    data = load_images(path, "train")
    assert [(c.name, c.kind) for c in data.spec.conditions] == [("text", "text")]
    assert data.notes == ()


def test_csv_in_each_split_with_quotes_and_paths_of_folders(make):
    files = {**images_of(folder="train/pictures/"), **images_of(2, folder="val/")}
    train = 'text,file_name\n"two, words",pictures/0.png\n"a ""q""\nb",pictures\\1.png\n'
    train += ",./pictures/2.png\nx,pictures/3.png\n"
    path = make(
        {**files, "train/metadata.csv": train.encode(), "val/metadata.csv": b"file_name,text\n0.png,a\n1.png,b\n"}
    )
    assert texts_of(path) == {0: "two, words", 1: 'a "q"\nb', 2: "", 3: "x"}
    assert texts_of(path, "test") == {0: "a", 1: "b"}
    assert load_images(path, "train").notes == ("1 image has no caption: train/pictures/2.png",)


def test_a_column_of_classes_and_another_of_captions(make):
    rows = [row(f"{i}.png", kind="cat" if i % 2 else "dog", said=f"no {i}", n=i) for i in range(4)]
    path = make({**images_of(), "metadata.jsonl": jsonl(*rows)})
    data = load_images(path, "train", ImageSettings(label="kind", text="said"))
    assert data.spec.class_names == ("cat", "dog")
    values = (data.images[:, 0, 0, 0] // 10).tolist()
    assert data.labels.tolist() == [0 if value % 2 else 1 for value in values]
    assert list(data.values("text")) == [f"no {value}" for value in values]
    assert data.notes == ("columns of the metadata that are not read: n",)
    # A tenth of each class is the test split.
    assert load_images(path, "test", ImageSettings(label="kind")).labels.sort().values.tolist() == [0, 1]
    numbers = load_images(path, "train", ImageSettings(label="n", skip_bad=True))
    assert numbers.spec.class_names == ("0", "1", "2", "3")


def test_with_metadata_folders_are_classes_only_if_asked_for(make):
    files = {f"{split}/{name}/{i}.png": png() for split in ("train", "test") for name in ("ape", "cat") for i in "01"}
    path = make({**files, "metadata.jsonl": jsonl(*(row(name, name) for name in files))})
    assert load_images(path, "train").labels is None
    data = load_images(path, "train", ImageSettings(label="folder"))
    assert (data.spec.class_names, data.labels.tolist()) == (("ape", "cat"), [0, 0, 1, 1])
    assert data.values("text")[2] == "train/cat/0.png"


def test_with_metadata_images_may_lie_anywhere(make):
    files = {"1.png": png(), "2.png": png(), "deep/er/3.png": png()}
    path = make({**files, "metadata.csv": b"file_name,text\n1.png,a\n2.png,b\ndeep/er/3.png,c\n"})
    assert len(load_images(path, "train")) + len(load_images(path, "test")) == 3


def test_a_caption_beside_each_image(make):
    files = {f"{name}/{i}.png": png() for name in ("cat", "dog") for i in "123"}
    captions = {
        "cat/1.txt": "grüne\n Katze \n".encode(),
        "cat/2.txt": b"\xef\xbb\xbfcat two",
        "dog/3.txt": b"",
        "dog/x.txt": b"-",
    }
    path = make({**files, **captions})
    data = load_images(path, "train"), load_images(path, "test")
    assert data[0].spec.class_names == ("cat", "dog")
    texts = [text for half in data for text in half.values("text")]
    assert sorted(texts) == ["", "", "", "", "cat two", "grüne Katze"]
    assert data[0].notes == (
        "skipped 1 file without an image suffix: .txt 1",
        "4 images have no caption: cat/3.png, dog/1.png, dog/2.png, dog/3.png",
    )


def test_metadata_without_a_column_of_captions_leaves_them_to_text_files(make):
    captions = {"0.txt": b"zero", "1.txt": b"one"}
    path = make({**images_of(2), **captions, "metadata.jsonl": jsonl(row("0.png", n=1))})
    assert texts_of(path) | texts_of(path, "test") == {0: "zero", 1: "one"}
    path = make({"metadata.jsonl": jsonl(row("0.png", "a"), row("1.png", "b")), **images_of(2), **captions})
    assert "2 caption files beside images not read: the metadata has captions" in load_images(path, "train").notes


def test_captions_are_part_of_the_fingerprint(make):
    marks = []
    for text in ("a", "b"):
        path = make({**images_of(2), "metadata.jsonl": jsonl(row("0.png", text), row("1.png", text))})
        marks += [
            load_images(path, "train").fingerprint,
            load_images(path, "train", ImageSettings(cache=0)).fingerprint,
        ]
    assert len(set(marks)) == 4


GOOD = row("0.png", "a")


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        ({"metadata.jsonl": b'{"file_name": "0.png"'}, {}, r"metadata.jsonl, line 1 is not JSON: Expecting"),
        ({"metadata.jsonl": jsonl(GOOD) + b"\n[1]"}, {}, r"line 2 must be an object, with file_name, was \[1\]"),
        ({"metadata.jsonl": b"[" * 9999}, {}, "line 1 is not JSON"),
        ({"metadata.jsonl": b'{"file_name": "0.png", "n": ' + b"9" * 5000 + b"}"}, {}, "line 1 is not JSON"),
        ({"metadata.jsonl": jsonl({"text": "a"})}, {}, "line 1: file_name must be the path of an image, is not there"),
        ({"metadata.jsonl": jsonl(row(7))}, {}, "line 1: file_name must be the path of an image, was 7"),
        ({"metadata.jsonl": jsonl(GOOD, row("./0.png"))}, {}, r"line 2: 0.png is there twice, first in .*line 1"),
        ({"metadata.jsonl": jsonl(row("0.png", ["a"]))}, {}, r"line 1: text must be a string, was \['a'\]"),
        ({"metadata.jsonl": b'{"file_name": "0.png", "text": "\\ud800"}'}, {}, "line 1: text must be a string, was"),
        ({"metadata.jsonl": jsonl(row("9.png"), row("../0.png"))}, {}, "1 file of the metadata not there, .*: 9.png"),
        ({"metadata.jsonl": jsonl(GOOD)}, {"text": "said"}, "data.text: the metadata has no column said; there"),
        ({"metadata.jsonl": jsonl(GOOD)}, {"label": "kind"}, "data.label: the metadata has no column kind; there"),
        ({"metadata.jsonl": jsonl(row("0.png", k=0.5))}, {"label": "k"}, "k must be a string or an integer, was 0.5"),
        ({"metadata.jsonl": jsonl(row("0.png", k="x"))}, {"label": "k"}, "1 image has no class where .* k: 1.png"),
        ({"metadata.jsonl": jsonl(GOOD), "metadata.csv": b""}, {}, "has both metadata.csv and metadata.jsonl"),
        ({"metadata.jsonl": b"\xff\xfe"}, {}, "metadata.jsonl must be in UTF-8, is not at byte 0"),
        ({"metadata.csv": b"file,text\n0.png,a\n"}, {}, "line 1 must name the columns, .* was file, text"),
        ({"metadata.csv": b"file_name,a,a\n"}, {}, "must name the columns, each once"),
        ({"metadata.csv": b"file_name,text\n0.png\n"}, {}, "metadata.csv, line 2 has 1 value for 2 columns"),
        ({"metadata.csv": b'file_name,text\n0.png,"a\n'}, {}, "metadata.csv, line 2 is not CSV: unexpected end"),
        ({"metadata.csv": b"file_name,text\n0.png," + b"a" * 200000}, {}, "line 2 is not CSV: field larger"),
        ({"0.txt": b"a\xff"}, {}, "0.txt must be in UTF-8, is not at byte 1"),
        ({"0.txt": b"a" * (1 << 20) + b"b"}, {}, "0.txt must be at most 1048576 bytes long, is longer"),
        ({}, {"text": "said"}, "has no rows in a metadata.jsonl or metadata.csv, of which data.text=said names"),
        ({}, {"label": "kind"}, "of which data.label=kind names a column"),
    ],
)  # fmt: skip
def test_faults_are_named(make, files, settings, message):
    path = make({**images_of(2), **files})
    with pytest.raises(DataError, match=message) as info:
        load_images(path, "train", ImageSettings(**settings))
    assert str(path) in str(info.value)
    assert "\n" not in str(info.value)


def test_rows_and_images_that_do_not_go_together_are_skipped_if_wished(make):
    rows = [row("0.png", "a", k="x"), row("1.png", "b", k="x"), row("9.png", "c", k="y")]
    path = make({**images_of(3), "metadata.jsonl": jsonl(*rows)})
    data = load_images(path, "train", ImageSettings(label="k", skip_bad=True))
    assert (len(data), data.spec.class_names) == (1, ("x",))
    assert "skipped 1 row of the metadata without an image: 9.png (metadata.jsonl, line 3)" in data.notes
    assert "skipped, as 1 image has no class where others have one, in the column k: 2.png" in data.notes


@pytest.mark.skipif("GENCORE_DATA" not in os.environ, reason="GENCORE_DATA is not set: no pictures of emoji")
def test_real_captions():
    path = Path(os.environ["GENCORE_DATA"]) / "emoji" / "emoji-twitter.zip"
    if not path.is_file():
        pytest.skip("GENCORE_DATA holds no emoji/emoji-twitter.zip")
    train = load_images(path, "train", ImageSettings(label="category"))
    test = load_images(path, "test", ImageSettings(label="category", cache=0))
    assert (len(train), len(test), train.spec.image_shape) == (1720, 191, (3, 64, 64))
    assert train.spec == test.spec
    assert (len(train.spec.class_names), train.labels.bincount().min() > 0) == (10, True)
    flags = [text for text, label in zip(train.values("text"), train.labels, strict=True)
             if train.spec.class_names[label] == "Flags"]  # fmt: skip
    assert sum(text.endswith("flag") for text in flags) > 200
    assert all(train.values("text"))
