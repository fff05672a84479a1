import os
import pickle
import weakref
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from gencore import data, plugins
from gencore.config import Config, ConfigError, field
from gencore.data import DataError, DatasetPlugin, ImageDataset, MissingSplitError, _columns, load

PIXELS = torch.arange(5 * 2 * 3, dtype=torch.uint8).reshape(5, 1, 2, 3)
LABELS = torch.tensor([0, 1, 1, 0, 1])


def test_batch_and_items():
    images = ImageDataset("toy", "train", PIXELS, LABELS, ("a", "b"))
    batch = images.batch(torch.tensor([4, 0, 4]))
    assert batch.images.dtype == torch.float32
    assert torch.equal(batch.images, PIXELS[[4, 0, 4]].float() / 255)
    assert batch.labels.tolist() == [1, 0, 1]
    assert (images.spec.image_shape, images.spec.num_classes, len(images)) == ((1, 2, 3), 2, 5)
    assert repr(images) == "<toy train: 5 images 1x2x3, 2 classes>"


def test_without_labels():
    images = ImageDataset("toy", "test", PIXELS)
    assert images.batch(torch.tensor([1])).labels is None
    assert images.spec.num_classes == 0
    assert repr(images) == "<toy test: 5 images 1x2x3>"
    one = ImageDataset("toy", "test", PIXELS[:1], LABELS[:1], ["a"])
    assert repr(one) == "<toy test: 1 image 1x2x3, 1 class>"


def test_pixels_span_zero_to_one():
    images = ImageDataset("toy", "test", torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 1, 2))
    assert images.batch(torch.tensor([0])).images.flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("toy", "valid", PIXELS), ValueError, "split must be 'train' or 'test', got 'valid'"),
        (("toy", "train", PIXELS.float()), TypeError, "images must be uint8, got torch.float32"),
        (("toy", "train", PIXELS[0]), ValueError, r"images must be of shape \(N, C, H, W\) and not empty, got \(1, 2"),
        (("toy", "train", PIXELS[:0]), ValueError, "not empty"),
        (("toy", "train", PIXELS, None, ("a",)), ValueError, "class_names must be empty without labels, got 1"),
        (("toy", "train", PIXELS, LABELS.int(), ("a", "b")), TypeError, "labels must be int64, got torch.int32"),
        (("toy", "train", PIXELS, LABELS[:2], ("a", "b")), ValueError, r"labels must be of shape \(5,\), got \(2,\)"),
        (("toy", "train", PIXELS, LABELS, [1, 2]), TypeError, "class_names must be strings, got 1 of type int"),
        (
            ("toy", "train", PIXELS, LABELS, ["a", None]),
            TypeError,
            "class_names must be strings, got None of type None",
        ),
        (
            ("toy", "train", PIXELS, LABELS, "ab"),
            TypeError,
            "class_names must be a sequence of names, got the string 'ab'",
        ),
        (
            ("toy", "train", PIXELS, LABELS, ["a", "b", "a"]),
            ValueError,
            "class_names must be distinct, got 'a' 2 times",
        ),
        (("toy", "train", PIXELS, LABELS, ("a",)), ValueError, r"labels must be in \[0, 1\), got 0 to 1"),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        ImageDataset(*arguments)


@pytest.fixture
def offer(monkeypatch):
    """Offers one data set plugin, without a package."""

    def offer(plugin):
        monkeypatch.setattr(data.DATASETS, "load", lambda name: plugin)

    return offer


def test_load_passes_path_and_split(offer):
    seen = []

    def read(path, split):
        seen.append((path, split))
        return ImageDataset("toy", split, PIXELS)

    offer(DatasetPlugin("toy", read))
    assert load("toy", "train").split == "train"
    assert load("toy:some/dir:with colon", "test").split == "test"
    load("toy:~/x", "test")
    assert seen == [(None, "train"), (Path("some/dir:with colon"), "test"), (Path.home() / "x", "test")]


def test_load_refuses(offer):
    offer(DatasetPlugin("toy", lambda path, split: "nothing", needs_path=True))
    with pytest.raises(DataError, match="data set toy needs a path: toy:PATH"):
        load("toy", "train")
    with pytest.raises(DataError, match="the path after toy: must not be empty"):
        load("toy:", "train")
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'all'"):
        load("toy:x", "all")
    with pytest.raises(plugins.PluginError, match=r"load must return a data set with spec, len.. and batch.., got str"):
        load("toy:x", "train")
    with pytest.raises(TypeError, match="spec must be a string"):
        load(None, "train")


def test_operating_system_errors_name_the_file(offer, tmp_path):
    offer(DatasetPlugin("toy", lambda path, split: (path / "a").read_bytes()))
    with pytest.raises(DataError, match=r"data set toy: cannot read .*nowhere/a: No such file") as info:
        load(f"toy:{tmp_path}/nowhere", "train")
    assert isinstance(info.value.__cause__, FileNotFoundError)


@dataclass(frozen=True)
class ToySettings(Config):
    bright: int = field(1, ge=0, le=5)
    dark: bool = False


def configured(path, split, settings):
    if split == "test":
        raise MissingSplitError("toy has no test split")
    return ImageDataset("toy", split, PIXELS * settings.bright, notes=["read"])


def test_settings_are_passed_and_checked(offer):
    offer(DatasetPlugin("toy", configured, settings=ToySettings))
    assert torch.equal(load("toy", "train").images, PIXELS)
    assert torch.equal(load("toy:path", "train", {"bright": 3}).images, PIXELS * 3)
    assert data.settings_type("toy:path") is ToySettings
    with pytest.raises(ConfigError, match="data set toy has 3 faults") as info:
        load("toy", "train", {"bright": 9, "dark": 3, "drak": True})
    assert info.value.faults == [
        "data.drak: is not a setting; did you mean dark?",
        "data.bright: must be <= 5, was 9",
        "data.dark: must be true or false, was 3",
    ]
    with pytest.raises(TypeError, match="settings must be a mapping of names to values, got list"):
        load("toy", "train", [])


def test_a_data_set_without_settings_refuses_them(offer):
    offer(DatasetPlugin("toy", lambda path, split: ImageDataset("toy", split, PIXELS)))
    assert data.settings_type("toy") is None
    assert len(load("toy", "train", {})) == 5
    with pytest.raises(ConfigError) as info:
        load("toy", "train", {"size": 3, "crop": 1})
    assert info.value.faults == [f"data.{name}: is not a setting; data set toy has none" for name in ("size", "crop")]


def test_check_reads_every_other_split(offer):
    seen = []

    def read(path, split):
        seen.append(split)
        return ImageDataset("toy", split, PIXELS, notes=[f"{split} is odd"])

    offer(DatasetPlugin("toy", read))
    assert data.check(load("toy", "train"), "toy") == ("test is odd",)
    assert data.check(load("toy", "test"), "toy") == ("train is odd",)
    assert seen == ["train", "test", "test", "train"]
    with pytest.raises(TypeError, match="train must be a data set that load gave, got str"):
        data.check("toy", {})


def test_check_passes_over_a_missing_split_but_over_no_fault(offer):
    offer(DatasetPlugin("toy", configured, settings=ToySettings))
    train = load("toy", "train")
    assert data.check(train, "toy", {"bright": 2}) == ("toy has no test split",)
    with pytest.raises(MissingSplitError, match="toy has no test split"):
        load("toy", "test")

    def damaged(path, split):
        raise DataError("x.png is damaged")

    offer(DatasetPlugin("toy", damaged))
    with pytest.raises(DataError, match=r"x.png is damaged"):
        data.check(train, "toy")


WIDE = PIXELS.reshape(5, 1, 3, 2)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ((PIXELS,), (WIDE,), "images are 1x2x3 in train, 1x3x2 in test"),
        ((PIXELS,), (PIXELS, LABELS, "ab"), "only test has labels"),
        ((PIXELS, LABELS, "ab"), (PIXELS,), "only train has labels"),
        ((PIXELS, LABELS, "ab"), (PIXELS, LABELS, "ac"), "only train has class b; only test has class c"),
        ((PIXELS, LABELS, "ab"), (PIXELS, LABELS, "abcd"), "only test has the classes c, d"),
        ((PIXELS, LABELS, "abc"), (PIXELS, LABELS, "acb"), "class 1 is b in train, c in test"),
        ((PIXELS, LABELS, "ab"), (WIDE,), "images are 1x2x3 in train, 1x3x2 in test; only train has labels"),
    ],
)
def test_splits_that_differ_are_refused(offer, train, test, message):
    given = {"train": train, "test": test}

    def read(path, split):
        pixels, labels, names = (*given[split], None, ())[:3]
        return ImageDataset("toy", split, pixels, labels, tuple(names))

    offer(DatasetPlugin("toy", read))
    with pytest.raises(DataError) as info:
        data.check(load("toy:path", "train"), "toy:path")
    assert str(info.value) == f"data set toy: the splits train and test differ: {message}"


def test_the_pixels_of_other_splits_are_freed(offer):
    kept = []

    def read(path, split):
        images = ImageDataset("toy", split, PIXELS.clone())
        kept.append(weakref.ref(images))
        return images

    offer(DatasetPlugin("toy", read))
    train = load("toy", "train")
    data.check(train, "toy")
    assert [reference() for reference in kept] == [train, None]


def test_errors_keep_the_files_at_fault():
    error = pickle.loads(pickle.dumps(DataError("two are bad", ["a.png", "b.png"])))
    assert (str(error), error.files) == ("two are bad", ("a.png", "b.png"))
    assert MissingSplitError("toy has no test split").files == ()


def test_the_fingerprint_is_of_pixels_labels_and_class_names():
    def mark(images=PIXELS, labels=LABELS, names=("a", "b"), name="toy", split="train"):
        return ImageDataset(name, split, images, labels, names).fingerprint

    assert mark() == mark(name="other", split="test")
    assert mark() == mark(PIXELS.transpose(2, 3).contiguous().transpose(2, 3))
    changed = PIXELS.clone()
    changed[4, 0, 1, 2] += 1
    others = [
        mark(changed),
        mark(PIXELS.reshape(5, 1, 3, 2)),
        mark(PIXELS.flip(0), LABELS),
        mark(labels=LABELS.flip(0)),
        mark(names=("a", "c")),
        mark(names=("b", "a")),
        mark(names=("a", "b", "c")),
        mark(names=("\udce9", "b")),
        mark(labels=None, names=()),
    ]
    assert len({mark(), *others}) == 10


def test_the_fingerprint_does_not_depend_on_the_pieces(monkeypatch):
    whole = ImageDataset("toy", "train", PIXELS).fingerprint
    monkeypatch.setattr(_columns, "_PIECE", 7)
    assert ImageDataset("toy", "train", PIXELS).fingerprint == whole


def test_too_little_memory_is_no_fault_of_the_plugin(offer):
    def full(path, split):
        raise MemoryError

    offer(DatasetPlugin("toy", full))
    with pytest.raises(MemoryError):
        load("toy", "train")


@pytest.mark.parametrize("path", ["a\0b", "~nobody_of_this_name/x", "a\ud800b"])
def test_paths_that_cannot_be(offer, path):
    offer(DatasetPlugin("toy", lambda path, split: (path / "x").read_bytes()))
    for function in (lambda spec: load(spec, "train"), data.absolute_spec):
        with pytest.raises(DataError, match=r"zero byte|~nobody_of_this_name|characters"):
            function(f"toy:{path}")


def test_absolute_specs_name_the_same_data_set_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    real = os.path.realpath(tmp_path)
    for path, expected in {
        "here": "here",
        "link/x": "here/x",
        "./link/../x:y": "x:y",
        "~/x": "here/x",
        "~": "here",
        "./~nobody_of_this_name": "~nobody_of_this_name",
        "not\nthere\udcff": "not\nthere\udcff",
        "x" * 5000: "x" * 5000,
    }.items():
        spec = data.absolute_spec(f"toy:{path}")
        assert spec == f"toy:{real}/{expected}"
        assert data.absolute_spec(spec) == spec
    assert data.absolute_spec("toy") == "toy"
    with pytest.raises(DataError, match="the path after toy: must not be empty"):
        data.absolute_spec("toy:")
    with pytest.raises(TypeError, match="spec must be a string"):
        data.absolute_spec(None)


def test_links_that_lead_nowhere_have_absolute_specs(tmp_path, offer):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "0").symlink_to("gone")
    for i in range(1500):
        (tmp_path / f"{i + 1}").symlink_to(f"{i}")
    offer(DatasetPlugin("toy", lambda path, split: path.read_bytes()))
    for name in ("loop", "loop/x", "0", "1500"):
        with pytest.raises(DataError):
            load(data.absolute_spec(f"toy:{tmp_path}/{name}"), "train")


def test_a_folder_that_is_gone_has_no_absolute_specs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "getcwd", lambda: os.stat("/nowhere"))
    with pytest.raises(DataError, match=r"data set toy: cannot find the path 'x': .*No such file"):
        data.absolute_spec("toy:x")


def test_class_names_are_those_of_the_spec():
    images = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    assert ImageDataset("set", "train", images, torch.tensor([0, 1]), ("cat", "dog")).class_names == ("cat", "dog")
    assert ImageDataset("set", "train", images).class_names == ()
