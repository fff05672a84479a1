"""How images of any size become images of one, and what a key changes of them."""

import pytest
import torch
from data.pictures import png, write_folder

from gencore import Key, data
from gencore.config import ConfigError
from gencore.data import ImageDataset
from gencore.data.images import ImageSettings, load_images


def stripes(width, height):
    """A PNG whose gray is its column, from left to right, or its row in the second half."""
    import numpy as np
    from data.pictures import encoded
    from PIL import Image

    row = np.arange(width, dtype=np.uint8)
    return encoded(Image.fromarray(np.tile(row, (height, 1))))


def files(count=6, size=(12, 4)):
    return {f"{split}/{i}.png": stripes(*size) for split in ("train", "test") for i in range(count)}


def lefts(images):
    """The columns at which windows of stripes begin, and whether they are mirrored."""
    values = (images[:, 0, 0] * 255).round().long()
    mirrored = values[:, 0] > values[:, -1]
    assert ((values[:, 1:] - values[:, :-1]).abs() == 1).all()
    return values.min(dim=1).values.tolist(), mirrored.tolist()


INDICES = torch.tensor([3, 0, 5, 1, 2, 4, 0, 0])


@pytest.mark.parametrize("cache", [0.0, 4.0], ids=["lazy", "memory"])
def test_a_random_window_is_a_function_of_the_key(make, cache):
    path = make(files())
    train = load_images(path, "train", ImageSettings(size=4, crop="random", cache=cache))
    assert train.spec.image_shape == (1, 4, 4)
    assert lefts(train.batch(INDICES).images) == ([4] * 8, [False] * 8)
    key = Key(1)
    found = [lefts(train.batch(INDICES, key.fold_in(step)).images)[0] for step in range(40)]
    assert found[0] == lefts(train.batch(INDICES, key.fold_in(0)).images)[0]
    assert {left for row in found for left in row} == set(range(9))
    # Each row by its own sample, whatever the batch.
    for row in range(8):
        alone = train.batch(INDICES[row : row + 1], key.fold_in(0).samples(row))
        assert lefts(alone.images)[0] == [found[0][row]]
    test = load_images(path, "test", ImageSettings(size=4, crop="random", cache=cache, flip=True))
    assert lefts(test.batch(INDICES, key).images) == ([4] * 8, [False] * 8)


@pytest.mark.parametrize("cache", [0.0, 4.0], ids=["lazy", "memory"])
def test_half_of_the_training_images_are_mirrored(make, cache):
    path = make(files(size=(4, 4)))
    train = load_images(path, "train", ImageSettings(flip=True, cache=cache))
    assert isinstance(train, ImageDataset) == (cache > 0)
    assert not any(lefts(train.batch(INDICES).images)[1])
    mirrored = [lefts(train.batch(INDICES, Key(step)).images)[1] for step in range(50)]
    assert 150 < sum(map(sum, mirrored)) < 250
    test = load_images(path, "test", ImageSettings(flip=True, cache=cache))
    assert not any(lefts(test.batch(INDICES, Key(0)).images)[1])


def test_lazy_and_in_memory_are_the_same(make):
    path = make({f"{name}/{i}.png": png(size=(5 + i, 9 - i)) for name in ("cat", "dog") for i in range(5)})
    for crop in ("center", "random", "none"):
        settings = {"size": 4, "crop": crop, "flip": True}
        memory, lazy = (data.load(f"images:{path}", "train", {**settings, "cache": cache}) for cache in (4, 0))
        assert (memory.workers, lazy.workers) == (False, True)
        assert memory.spec == lazy.spec
        for key in (None, Key(3)):
            ours, theirs = (images.batch(torch.arange(8), key) for images in (memory, lazy))
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(memory.values("label"), lazy.values("label"))


def test_without_cropping_proportions_change(make):
    path = make({"1.png": stripes(16, 8), "2.png": stripes(16, 16)})
    for split in ("train", "test"):
        image = load_images(path, split, ImageSettings(size=8, crop="none")).images[0, 0]
        assert image.shape == (8, 8)
        assert (image[0, 1:] - image[0, :-1]).float().mean() == pytest.approx(2, abs=0.15)


def test_a_very_long_picture_has_no_random_window(tmp_path):
    write_folder(tmp_path, {"1.png": png("L", (20000, 1)), "2.png": png("L", (9, 9))})
    with pytest.raises(data.DataError, match=r"1.png \(163840000x8192 once resized, over 134217728 pixels"):
        load_images(tmp_path, "train", ImageSettings(size=8192, crop="random"))


@pytest.mark.parametrize("crop", ["random", "none"])
def test_cropping_needs_a_size(tmp_path, crop):
    with pytest.raises(ConfigError, match=rf"data.crop: must be center without a size .data.size., was {crop}"):
        data.load(f"images:{tmp_path}", "train", {"crop": crop})


def test_conditions_in_memory_follow_their_image():
    pixels = torch.arange(5 * 2 * 3, dtype=torch.uint8).reshape(5, 1, 2, 3)
    others = torch.arange(7, dtype=torch.uint8).reshape(7, 1, 1, 1)
    texts = [f"no {i}" for i in range(5)]
    images = ImageDataset(
        "toy", "train", pixels, conditions={"text": texts, "depth": pixels + 100}, unpaired={"photo": others}, flip=True
    )
    kinds = [(c.name, c.kind, c.shape, c.paired) for c in images.spec.conditions]
    assert kinds == [
        ("text", "text", None, True),
        ("depth", "image", (1, 2, 3), True),
        ("photo", "image", (1, 1, 1), False),
    ]
    batch = images.batch(torch.tensor([4, 1]))
    assert batch.conditions["text"] == ("no 4", "no 1")
    assert (batch.conditions["photo"] * 255).flatten().tolist() == [4, 1]
    seen = set()
    for step in range(30):
        batch = images.batch(torch.arange(5), Key(step))
        assert torch.allclose(batch.conditions["depth"] - batch.images, torch.tensor(100 / 255))
        seen |= set((batch.conditions["photo"] * 255).flatten().round().int().tolist())
    assert seen == set(range(7))
    assert images.values("text") == texts
    assert images.values("photo").shape == (5, 1, 1, 1)
    with pytest.raises(KeyError):
        images.values("label")


@pytest.mark.parametrize(
    ("conditions", "error", "message"),
    [
        ({"text": "abcde"}, ValueError, "conditions.'text'. must be one for each of 5 images, got a string"),
        ({"text": ["a"]}, ValueError, "must be one for each of 5 images, got 1"),
        ({"text": ["a", "b", "c", "d", 5]}, TypeError, "must be strings or a tensor, got 5"),
        ({"depth": torch.zeros(5, 1, 2, 3)}, TypeError, "must be uint8, got torch.float32"),
        ({"depth": torch.zeros(5, 1, 9, 3, dtype=torch.uint8)}, ConfigError, "width, 2x3, if paired, was 9x3"),
    ],
)  # fmt: skip
def test_conditions_that_do_not_fit_are_refused(conditions, error, message):
    pixels = torch.zeros(5, 1, 2, 3, dtype=torch.uint8)
    with pytest.raises(error, match=message):
        ImageDataset("toy", "train", pixels, conditions=conditions)
