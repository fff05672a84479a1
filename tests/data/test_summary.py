"""What is said of a data set, and the images that stand for it."""

import json

import pytest
import torch

from gencore.data import ImageDataset, NamedDataset
from gencore.data.summary import examples, summary
from gencore.spec import Batch, Condition, DataSpec

PIXELS = torch.arange(5 * 2 * 3, dtype=torch.uint8).reshape(5, 1, 2, 3)
LABELS = torch.tensor([0, 2, 2, 0, 2])
TEXTS = ["one", "", "three", "one", "five"]


def whole(**options):
    return ImageDataset("toy", "train", PIXELS, LABELS, list("abc"), ["odd"], conditions={"text": TEXTS}, **options)


def test_counts_and_texts():
    told = summary(whole())
    assert (told.name, told.split, told.images, told.notes) == ("toy", "train", 5, ("odd",))
    assert told.class_counts == {"label": {"a": 2, "b": 0, "c": 3}}
    assert told.texts == {"text": (4, 3, ["one", "three", "one"])}
    assert told.fingerprint == whole().fingerprint
    assert str(told) == "5 train images 1x2x3, 3 classes, text"
    plain = json.loads(json.dumps(told.to_dict()))
    assert plain["class_counts"]["label"]["c"] == 3
    assert plain["texts"]["text"] == {"given": 4, "different": 3, "first": ["one", "three", "one"]}
    assert plain["image_shape"] == [1, 2, 3]
    assert [condition["kind"] for condition in plain["conditions"]] == ["class", "text"]


class Foreign(NamedDataset):
    """A data set that knows no more than its batches."""

    def __init__(self):
        spec = DataSpec((1, 1, 1), (Condition("label", "class", ("a", "b")), Condition("text", "text")))
        super().__init__("foreign", "test", spec)

    def __len__(self):
        return 600

    def batch(self, indices, key=None):
        images = (indices.float() / 600).reshape(-1, 1, 1, 1)
        return Batch(images, {"label": indices % 2, "text": [f"{i}" for i in indices.tolist()]})


def test_any_data_set():
    told = summary(Foreign())
    assert told.class_counts == {"label": {"a": 300, "b": 300}}
    assert told.texts["text"] == (600, 600, ["0", "1", "2"])


def test_examples_come_from_all_over():
    images, captions = examples(Foreign(), 3)
    assert (images.flatten() * 600).round().tolist() == [0, 200, 400]
    assert captions == ["a: 0", "a: 200", "a: 400"]
    assert len(examples(whole(), 99)[0]) == 5
    assert examples(whole(), 99)[1] == ["a: one", "c", "c: three", "a: one", "c: five"]
    assert examples(ImageDataset("toy", "train", PIXELS), 1)[1] == [""]


def test_image_conditions_stand_left_of_the_image():
    color = torch.full((5, 3, 2, 3), 255, dtype=torch.uint8)
    images, _ = examples(ImageDataset("toy", "train", PIXELS, conditions={"source": color}), 5)
    assert images.shape == (5, 3, 2, 6)
    assert (images[..., :3] == 1).all()
    assert torch.equal(images[:, 1, :, 3:], PIXELS[:, 0].float() / 255)
    taller = torch.zeros(2, 1, 4, 1, dtype=torch.uint8)
    images, _ = examples(ImageDataset("toy", "train", PIXELS, unpaired={"source": taller}), 5)
    assert images.shape == (5, 1, 4, 4)
    assert (images[:, :, 2:, 1:] == 1).all()
    five = torch.zeros(5, 5, 2, 3, dtype=torch.uint8)
    assert examples(ImageDataset("toy", "train", five, conditions={"source": PIXELS}), 5)[0].shape == (5, 5, 2, 3)


def test_values_of_a_condition():
    assert whole().values("label") is LABELS
    assert list(whole().values("text")) == TEXTS
    assert Foreign().values("label")[:3].tolist() == [0, 1, 0]
    with pytest.raises(KeyError, match="other"):
        Foreign().values("other")
