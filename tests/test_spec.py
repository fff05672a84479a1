"""What a data set says that it gives, and the minibatches that it gives."""

import json

import pytest
import torch

from gencore import Key
from gencore.config import ConfigError
from gencore.spec import Batch, Condition, Dataset, DataSpec

LABEL = Condition("label", "class", ("cat", "dog"))
TEXT = Condition("text", "text")
SOURCE = Condition("source", "image", shape=(1, 4, 6))
DOMAIN = Condition("domain", "image", shape=(3, 5, 5), paired=False)
SPEC = DataSpec((3, 4, 6), (LABEL, TEXT, SOURCE, DOMAIN))


def faults_of(make):
    with pytest.raises(ConfigError) as info:
        make()
    return info.value.faults


@pytest.mark.parametrize(
    ("make", "faults"),
    [
        (lambda: Condition("", "text"), ["name: must not be empty"]),
        (lambda: Condition("a", "sound"), ["kind: must be one of 'class', 'image', 'text', was 'sound'"]),
        (
            lambda: Condition("a", "class"),
            ["names: must be given for kind='class' and for no other, was () for 'class'"],
        ),
        (
            lambda: Condition("a", "text", ("x",)),
            ["names: must be given for kind='class' and for no other, was ('x',) for 'text'"],
        ),
        (lambda: Condition("a", "class", ("x", "y", "x")), ["names: must be distinct, was 'x' 2 times"]),
        (lambda: Condition("a", "class", "xy"), ["names: must be a tuple, each item a string, was 'xy'"]),
        (
            lambda: Condition("a", "image"),
            ["shape: must be given for kind='image' and for no other, was None for 'image'"],
        ),
        (
            lambda: Condition("a", "text", shape=(1, 2, 2)),
            ["shape: must be given for kind='image' and for no other, was (1, 2, 2) for 'text'"],
        ),
        (lambda: Condition("a", "image", shape=(1, 0, 2)), ["shape[1]: must be >= 1, was 0"]),
        (
            lambda: Condition("a", "image", shape=(2, 2)),
            ["shape: must be a tuple of 3: an integer, an integer, an integer or none, was (2, 2)"],
        ),
        (lambda: Condition("a", "class", ("x",), paired=False), ["paired: must be true for kind='class'"]),
        (lambda: Condition("a", "text", paired=False), ["paired: must be true for kind='text'"]),
        (
            lambda: Condition("", "text", ("x",), (1, 1, 1), paired=False),
            [
                "name: must not be empty",
                "names: must be given for kind='class' and for no other, was ('x',) for 'text'",
                "shape: must be given for kind='image' and for no other, was (1, 1, 1) for 'text'",
                "paired: must be true for kind='text'",
            ],
        ),
    ],
)
def test_faults_of_a_condition(make, faults):
    assert faults_of(make) == faults


@pytest.mark.parametrize(
    ("make", "faults"),
    [
        (lambda: DataSpec((3, 4, 0)), ["image_shape[2]: must be >= 1, was 0"]),
        (
            lambda: DataSpec((4, 6)),
            ["image_shape: must be a tuple of 3: an integer, an integer, an integer, was (4, 6)"],
        ),
        (
            lambda: DataSpec((3, 4, 6), (LABEL, TEXT, Condition("label", "text"))),
            ["conditions: must have distinct names, was 'label' 2 times"],
        ),
        (
            lambda: DataSpec((3, 4, 4), (TEXT, SOURCE)),
            ["conditions[1]: must have the images' height and width, 4x4, if paired, was 4x6"],
        ),
        (
            lambda: DataSpec((3, 4, 4), (SOURCE, SOURCE)),
            [
                "conditions: must have distinct names, was 'source' 2 times",
                "conditions[0]: must have the images' height and width, 4x4, if paired, was 4x6",
                "conditions[1]: must have the images' height and width, 4x4, if paired, was 4x6",
            ],
        ),
        (
            lambda: DataSpec.from_dict({"image_shape": [1, 2, 2], "conditions": [{"name": "", "kind": "text"}]}),
            ["conditions[0].name: must not be empty"],
        ),
        (
            lambda: DataSpec.from_dict({"image_shape": [1, 2, 2], "conditions": [{"kind": "text", "nam": "a"}]}),
            ["conditions[0].nam: is not a setting; did you mean name or names?", "conditions[0].name: must be given"],
        ),
    ],
)
def test_faults_of_a_spec(make, faults):
    assert faults_of(make) == faults


def test_an_unpaired_image_may_have_any_size():
    assert DataSpec((1, 4, 6), (DOMAIN,))["domain"].shape == (3, 5, 5)


def test_looking_up():
    assert SPEC["source"] is SOURCE
    assert "source" in SPEC
    assert "target" not in SPEC
    assert LABEL not in SPEC, "a spec holds names"
    with pytest.raises(KeyError, match="target"):
        SPEC["target"]
    assert SPEC.first("image") is SOURCE
    assert SPEC.first("class") is LABEL
    assert DataSpec((1, 2, 2)).first("class") is None


def test_classes_are_those_of_the_first_condition_of_that_kind():
    second = Condition("breed", "class", ("a", "b", "c"))
    assert SPEC.class_names == ("cat", "dog")
    assert SPEC.num_classes == 2
    assert DataSpec((1, 2, 2), (TEXT, second, LABEL)).class_names == ("a", "b", "c")
    assert (DataSpec((1, 2, 2), (TEXT,)).class_names, DataSpec((1, 2, 2)).num_classes) == ((), 0)


def test_a_spec_is_the_same_after_json():
    """As a run keeps it."""
    again = DataSpec.from_dict(json.loads(json.dumps(SPEC.to_dict())))
    assert again == SPEC
    assert hash(again) == hash(SPEC)
    assert repr(again) == repr(SPEC)
    assert DataSpec((3, 4, 6), SPEC.conditions[:3]) != SPEC


def batch_of(n=5):
    images, sources = torch.rand(n, 3, 4, 6), torch.rand(n, 1, 4, 6)
    return Batch(images, {"label": torch.arange(n), "text": tuple("vwxyz"[:n]), "source": sources})


def test_a_batch_is_as_long_as_its_images():
    assert len(batch_of(3)) == 3
    assert len(Batch(torch.zeros(0, 1, 2, 2))) == 0
    assert Batch(torch.zeros(1, 1, 2, 2)).conditions == {}


def test_labels_of_a_batch():
    assert torch.equal(batch_of().labels, torch.arange(5))
    assert Batch(torch.zeros(1, 1, 2, 2)).labels is None
    assert Batch(torch.zeros(1, 1, 2, 2), {"text": ("a",), "breed": torch.zeros(1)}).labels is None
    # Texts that happen to be called so are no classes.
    assert Batch(torch.zeros(1, 1, 2, 2), {"label": ("a",)}).labels is None


def test_a_part_of_a_batch_is_a_view_of_it():
    batch = batch_of()
    part = batch.part(1, 3)
    assert len(part) == 2
    assert torch.equal(part.images, batch.images[1:3])
    assert part.labels.tolist() == [1, 2]
    assert part.conditions["text"] == ("w", "x")
    assert torch.equal(part.conditions["source"], batch.conditions["source"][1:3])
    part.images.zero_()
    assert not batch.images[1:3].any(), "nothing is copied"
    assert batch.images[0].any()
    assert len(batch.part(4, 9)) == 1


def test_a_batch_moves_with_all_its_tensors():
    batch = batch_of()
    moved = batch.to("meta")
    assert moved.images.device.type == moved.labels.device.type == moved.conditions["source"].device.type == "meta"
    assert moved.conditions["text"] == batch.conditions["text"]
    assert batch.images.device.type == "cpu"
    same = batch.to(torch.device("cpu"))
    assert torch.equal(same.images, batch.images)
    assert same.conditions.keys() == batch.conditions.keys()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_batch_can_be_pinned():
    pinned = batch_of().pin_memory()
    assert pinned.images.is_pinned()
    assert pinned.labels.is_pinned()
    assert pinned.conditions["source"].is_pinned()
    assert pinned.conditions["text"] == tuple("vwxyz")
    assert torch.equal(pinned.to("cuda").labels.cpu(), torch.arange(5))


def test_pinning_pins_every_tensor(monkeypatch):
    """What the test above asks a device for, by what is called."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    batch = batch_of()
    again = batch.pin_memory()
    wanted = [batch.images, batch.conditions["label"], batch.conditions["source"]]
    assert sorted(map(id, pinned)) == sorted(map(id, wanted))
    assert again.conditions["text"] == tuple("vwxyz")


class Ones:
    """The three members that make a data set."""

    spec = DataSpec((1, 2, 2))

    def __len__(self):
        return 3

    def batch(self, indices, key=None):
        return Batch(torch.ones(len(indices), 1, 2, 2))


class NoSpec:
    __len__ = Ones.__len__
    batch = Ones.batch


def test_what_is_a_data_set():
    assert isinstance(Ones(), Dataset)
    assert len(Ones().batch(torch.arange(2), Key(0))) == 2
    assert not isinstance(NoSpec(), Dataset)
    assert not isinstance([1, 2], Dataset)
