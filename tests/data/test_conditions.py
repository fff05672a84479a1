"""Conditions for samples, taken from a data set."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gencore.data import DataError, ImageDataset
from gencore.data.conditions import conditions_for
from gencore.spec import DataSpec

# Of one class after another, as those of a folder are.
LABELS = torch.arange(40) // 10
IMAGES = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 1, 2, 2).contiguous()


def dataset(names=("a", "b", "c", "d"), **conditions):
    return ImageDataset("set", "test", IMAGES, LABELS, names, conditions=conditions)


def model(takes, spec):
    return SimpleNamespace(takes=takes, spec=spec, plugin_name="taker")


def test_they_are_of_images_of_every_class():
    images = dataset(text=[f"number {i}" for i in range(40)], source=IMAGES)
    takes = {"label": "required", "text": "required", "source": "required"}
    found = conditions_for(model(takes, images.spec), images, 12)
    assert len(found["label"].unique()) > 2
    # All of the same images.
    rows = [int(text.removeprefix("number ")) for text in found["text"]]
    assert found["label"].tolist() == LABELS[rows].tolist()
    assert (found["source"][:, 0, 0, 0] * 255).round().int().tolist() == rows
    again = conditions_for(model(takes, images.spec), images, 12)
    assert again["text"] == found["text"]


def test_the_first_in_their_order_and_classes_in_turns():
    images = dataset()
    taker = model({"label": "optional"}, images.spec)
    assert conditions_for(taker, images, 42, in_order=True)["label"].tolist() == [*LABELS.tolist(), 0, 0]
    assert conditions_for(taker, images, 6, in_turns=True)["label"].tolist() == [0, 1, 2, 3, 0, 1]
    assert conditions_for(taker, images, 6, required=True) == {}


@pytest.mark.parametrize(
    ("other", "fault"),
    [
        (dataset(("a", "b", "c", "e")), "data set set: its label has other classes than the model was trained with"),
        (ImageDataset("set", "test", IMAGES), "data set set has no label, which model taker needs"),
        (
            ImageDataset("set", "test", IMAGES, conditions={"label": ["x"] * 40}),
            "data set set: its label is of another kind, text, than the model was trained with",
        ),
    ],
)
def test_others_than_the_models_are_refused(other, fault):
    taker = model({"label": "required"}, DataSpec((1, 2, 2), dataset().spec.conditions))
    with pytest.raises(DataError, match=fault):
        conditions_for(taker, other, 3, required=True)
