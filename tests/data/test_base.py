from pathlib import Path

import pytest
import torch

from gencore import plugins
from gencore.data import DataError, DatasetPlugin, ImageDataset, load

PIXELS = torch.arange(5 * 2 * 3, dtype=torch.uint8).reshape(5, 1, 2, 3)
LABELS = torch.tensor([0, 1, 1, 0, 1])


def test_batch_and_items():
    data = ImageDataset("toy", "train", PIXELS, LABELS, ("a", "b"))
    batch = data.batch(torch.tensor([4, 0, 4]))
    assert batch.images.dtype == torch.float32
    assert torch.equal(batch.images, PIXELS[[4, 0, 4]].float() / 255)
    assert batch.labels.tolist() == [1, 0, 1]
    assert (data.image_shape, data.num_classes, len(data)) == ((1, 2, 3), 2, 5)
    image, label = data[1]
    assert torch.equal(image, PIXELS[1].float() / 255)
    assert label == 1
    assert repr(data) == "<toy train: 5 images 1x2x3, 2 classes>"


def test_without_labels():
    data = ImageDataset("toy", "test", PIXELS)
    assert data.batch(torch.tensor([1])).labels is None
    assert data.num_classes == 0
    assert data[0][1] is None


def test_pixels_span_zero_to_one():
    data = ImageDataset("toy", "test", torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 1, 2))
    assert data.batch(torch.tensor([0])).images.flatten().tolist() == [0.0, 1.0]


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
        monkeypatch.setattr(plugins, "load_dataset", lambda name: plugin)

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
    with pytest.raises(plugins.PluginError, match="load must return an ImageDataset, got str"):
        load("toy:x", "train")
    with pytest.raises(TypeError, match="spec must be a string"):
        load(None, "train")


def test_operating_system_errors_name_the_file(offer, tmp_path):
    offer(DatasetPlugin("toy", lambda path, split: (path / "a").read_bytes()))
    with pytest.raises(DataError, match=r"data set toy: cannot read .*nowhere/a: No such file") as info:
        load(f"toy:{tmp_path}/nowhere", "train")
    assert isinstance(info.value.__cause__, FileNotFoundError)
