import os
from pathlib import Path

import pytest
import torch
from data.pictures import decoded, encoded, png, write_folder
from PIL import Image

from gencore import data, progress
from gencore.config import ConfigError
from gencore.data import DataError, MissingSplitError, _assembly, _pixels, _reading
from gencore.data.images import ImageSettings, load_images

SKIP = ImageSettings(skip_bad=True)
CUT = encoded(Image.effect_noise((4, 3), 99))[:-30]


@pytest.fixture
def broken(make):
    """Two of eight images of train are bad, one of them only once it is decoded; and one of test."""
    files = {
        f"{split}/{name}/{i}.png": png() for split in ("train", "test") for name in ("ape", "cat") for i in range(4)
    }
    bad = {"train/ape/0.png": b"text", "train/cat/3.png": CUT, "test/cat/1.png": CUT}
    return make({**files, **bad})


@pytest.mark.parametrize("split", ["train", "test"])
def test_all_bad_files_of_both_splits_are_listed(broken, split):
    with pytest.raises(DataError) as info:
        load_images(broken, split)
    said = str(info.value)
    assert "3 of 16 images cannot be read: " in said
    assert "train/ape/0.png (no image" in said
    assert said.index("train/ape/0.png (") < said.index("train/cat/3.png (") < said.index("test/cat/1.png (")
    assert said.endswith("; --set data.skip_bad=true skips them")
    assert info.value.files == ("train/ape/0.png", "train/cat/3.png", "test/cat/1.png")


def test_bad_files_are_skipped_and_counted(broken):
    train, test = load_images(broken, "train", SKIP), load_images(broken, "test", SKIP)
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1])
    assert train.spec.class_names == test.spec.class_names == ("ape", "cat")
    assert "skipped 2 training images that cannot be read: train/ape/0.png (no" in train.notes[0]
    assert "skipped 1 test image that cannot be read: test/cat/1.png (" in test.notes[0]


def test_what_is_skipped_changes_no_split(make):
    files = {f"{i}.png": png() for i in range(30)}
    whole = {split: load_images(make(files), split).images for split in ("train", "test")}
    path = make({**files, "7.png": CUT, "8.png": b""})
    for split, images in whole.items():
        left = {image.numpy().tobytes() for image in load_images(path, split, SKIP).images}
        lost = {decoded(files[name]).numpy().tobytes() for name in ("7.png", "8.png")}
        assert left == {image.numpy().tobytes() for image in images} - lost


def test_all_bad_files_are_named_up_to_a_hundred(make):
    names = [f"{i:03}.png" for i in range(140)]
    path = make({name: png() if i < 35 else b"text" for i, name in enumerate(names)})
    with pytest.raises(DataError, match=r": 105 of 140 images cannot be read: ") as info:
        load_images(path, "train")
    assert sorted(info.value.files) == names[35:]
    assert str(info.value).count(".png (") == 100
    assert " and 5 more; --set" in str(info.value)
    (note,) = load_images(path, "train", SKIP).notes
    assert note.count(".png (") == 10


@pytest.mark.parametrize("content", [b"text", CUT], ids=["header", "pixels"])
def test_a_class_that_would_be_lost_is_named(make, content):
    path = make({f"{name}/{i}.png": png() if name == "cat" else content for name in ("cat", "dog") for i in range(4)})
    with pytest.raises(DataError, match=r": no training image of class dog can be read: dog/\d.png \(") as info:
        load_images(path, "train", SKIP)
    assert {name.partition("/")[0] for name in info.value.files} == {"dog"}
    assert set(load_images(path, "test", SKIP).labels.tolist()) == {0}  # a class that is known all the same


def test_nothing_that_can_be_read_is_an_error(make):
    with pytest.raises(DataError, match=": none of 2 images can be read: ") as info:
        load_images(make({"1.png": b"text", "2.png": b"text"}), "train", SKIP)
    assert info.value.files == ("1.png", "2.png")
    with pytest.raises(MissingSplitError, match=r": no training image can be read: [12].png \("):
        load_images(make({"1.png": CUT, "2.png": CUT}), "train", SKIP)


def test_sizes_that_differ_are_listed(make):
    sizes = [(4, 3), (5, 3), (4, 3), (3, 4)]
    path = make({f"train/{i}.png": png(size=size) for i, size in enumerate(sizes)} | {"test/1.png": png(size=(9, 9))})
    with pytest.raises(DataError) as info:
        load_images(path, "train")
    assert str(info.value).endswith(
        ": all images must have one size (width x height), but 2 are 4x3 (train/0.png), 1 is 5x3 (train/1.png), "
        "1 is 3x4 (train/3.png), 1 is 9x9 (test/1.png); "
        "--set data.size=64 takes images of any size: it resizes and crops them"
    )
    assert info.value.files == ("train/1.png", "train/3.png", "test/1.png")
    images = load_images(path, "train", ImageSettings(size=4))
    assert images.spec.image_shape == load_images(path, "test", ImageSettings(size=4)).spec.image_shape == (3, 4, 4)
    assert images.notes == (
        "enlarged 4 training images smaller than 4x4: train/0.png (4x3), train/1.png (5x3), train/2.png (4x3), "
        "train/3.png (3x4)",
    )


def test_settings_by_the_name_of_the_data_set(broken):
    spec = f"images:{broken}"
    assert data.settings_type(spec) is ImageSettings
    assert len(data.load(spec, "train", {"skip_bad": True, "size": 2})) == 6
    train = data.load(spec, "train", {"skip_bad": True})
    assert "skipped 1 test image" in data.check(train, spec, {"skip_bad": True})[0]
    with pytest.raises(DataError, match="3 of 16 images cannot be read"):
        data.check(train, spec)
    with pytest.raises(ConfigError) as info:
        data.load(spec, "train", {"size": 0, "skip_bad": "maybe", "scale": 3})
    assert [fault.split(": ")[0] for fault in info.value.faults] == ["data.scale", "data.size", "data.skip_bad"]


def test_headers_are_read_once_for_both_splits_and_pixels_once_each(make, monkeypatch):
    path = make({f"{i:02}.png": png() for i in range(20)})
    read = []
    for module, name in ((_reading, "header"), (_assembly, "decoded")):
        function = getattr(_pixels, name)

        def counting(*arguments, name=name, function=function, **options):
            read.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, counting)
    data.check(data.load(f"images:{path}", "train"), f"images:{path}")
    assert (read.count("header"), read.count("decoded")) == (20, 20)


def test_what_changed_is_read_anew(tmp_path):
    write_folder(tmp_path, {"1.png": png(), "2.png": b"text"})
    with pytest.raises(DataError, match=r"1 of 2 images cannot be read"):
        load_images(tmp_path, "train")
    write_folder(tmp_path, {"2.png": png()})
    assert len(load_images(tmp_path, "train")) == 1
    write_folder(tmp_path, {"3.png": png(), "4.txt": b""})
    images = load_images(tmp_path, "train")
    assert (len(images), len(images.notes)) == (2, 1)


def test_the_fingerprint_is_that_of_the_content(make, tmp_path):
    files = {f"{name}/{i}.png": png() for name in ("cat", "dog") for i in range(3)}
    mark = load_images(make(files), "train").fingerprint
    assert load_images(write_folder(tmp_path / "moved", files), "train").fingerprint == mark
    renamed = {name.replace("dog", "fox"): content for name, content in files.items()}
    assert load_images(write_folder(tmp_path / "renamed", renamed), "train").fingerprint != mark


def test_reading_says_how_far_it_is_where_that_is_wanted(make, monkeypatch, capsys):
    files = {f"{split}/{i}.png": png() for split in ("train", "test") for i in range(4)}
    path = make({**files, "train/5.png": CUT})
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    with data.showing_progress(), pytest.raises(DataError, match="1 of 9 images cannot be read"):
        data.load(f"images:{path}", "train")
    told = capsys.readouterr().err
    for what, count in (("headers", 9), ("train", 5), ("to list all bad files", 4)):
        assert f"reading {path.name}, {what}: image 1 of {count} (" in told
    with pytest.raises(DataError):
        data.load(f"images:{path}", "train")
    assert capsys.readouterr().err == ""


def test_too_little_memory_is_no_fault_of_a_file(make, monkeypatch):
    def full(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(_assembly, "decoded", full)
    path = make({"1.png": png(), "2.png": png()})
    with pytest.raises(MemoryError):
        data.load(f"images:{path}", "train", {"skip_bad": True})


@pytest.mark.skipif("GENCORE_DATA" not in os.environ, reason="GENCORE_DATA is not set: no CIFAR-10 archive")
def test_a_real_archive():
    path = Path(os.environ["GENCORE_DATA"]) / "cifar10" / "cifar10-imagefolder.zip"
    if not path.is_file():
        pytest.skip("GENCORE_DATA holds no cifar10/cifar10-imagefolder.zip")
    images = load_images(path, "test")
    assert images.spec.image_shape == (3, 32, 32)
    assert images.labels.bincount().tolist() == [500] * 10
    assert torch.equal(images.images[0], images.batch(torch.tensor([0])).images[0].mul(255).round().byte())
