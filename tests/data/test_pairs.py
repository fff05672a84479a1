"""Paired images and images of two domains: every layout, both directions, and what does not fit together."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from data.pictures import encoded, png, write_folder
from PIL import Image

from gencore import Key, data
from gencore.config import ConfigError
from gencore.data import DataError, MissingSplitError
from gencore.data.domains import load_domains
from gencore.data.pairs import TwoSidedSettings, load_pairs

REVERSE = TwoSidedSettings(direction="BtoA")


def pair(i):
    """The sides of pair number i: its number in gray, and that beyond 100 in red."""
    return png("L", value=i), png("RGB", value=(100 + i, 0, 0))


def beside(i):
    first, second = (np.asarray(Image.open(io.BytesIO(side)).convert("RGB")) for side in pair(i))
    return encoded(Image.fromarray(np.concatenate([first, second], axis=1)))


LAYOUTS = {
    "one file": {
        f"{split}/{i}.png": beside(i) for split, numbers in (("train", (1, 2, 3)), ("val", (4, 5))) for i in numbers
    },
    "trainA": {
        f"top/{split}{side}/{i}.{suffix}": pair(i)[number]
        for split, numbers in (("train", (1, 2, 3)), ("test", (4, 5)))
        for number, (side, suffix) in enumerate((("A", "png"), ("B", "PNG")))
        for i in numbers
    },
    "Train_a": {
        f"{split}_{side}/deep/{i}.png": pair(i)[number]
        for split, numbers in (("Train", (1, 2, 3)), ("valid", (4, 5)))
        for number, side in enumerate("ab")
        for i in numbers
    },
    "A/train": {
        f"{side}/{split}/{i}.png": pair(i)[number]
        for split, numbers in (("train", (1, 2, 3)), ("val", (4, 5)))
        for number, side in enumerate("AB")
        for i in numbers
    },
    "train/A": {
        f"{split}/{side}/{i}.png": pair(i)[number]
        for split, numbers in (("train", (1, 2, 3)), ("test", (4, 5)))
        for number, side in enumerate("AB")
        for i in numbers
    },
}


def numbers(images):
    return ((images * 255).round().long()[:, 0, 0, 0] % 100).tolist()


@pytest.mark.parametrize("cache", [0.0, 4.0], ids=["lazy", "memory"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(make, layout, cache):
    path = make(LAYOUTS[layout])
    for split, expected in (("train", [1, 2, 3]), ("test", [4, 5])):
        for settings in (TwoSidedSettings(cache=cache), TwoSidedSettings(cache=cache, direction="BtoA")):
            pairs = load_pairs(path, split, settings)
            batch = pairs.batch(torch.arange(len(pairs)))
            assert numbers(batch.images) == numbers(batch.conditions["source"]) == expected
            assert (batch.images[0].max() > 0.3) == (settings.direction == "AtoB")
    spec = f"pairs:{path}"
    (source,) = data.load(spec, "train").spec.conditions
    # What lies in one file has the channels of the file.
    assert (source.name, source.kind, source.paired) == ("source", "image", True)
    assert source.shape == ((3, 3, 4) if layout == "one file" else (1, 3, 4))
    assert data.check(data.load(spec, "train"), spec) == ()


def test_without_splits_both_sides_get_the_same_tenth(make):
    path = make(
        {
            f"{side}/{i:02}.{end}": pair(i)[n]
            for n, (side, end) in enumerate((("A", "png"), ("B", "bmp")))
            for i in range(20)
        }
    )
    train, test = load_pairs(path, "train"), load_pairs(path, "test")
    assert (len(train), len(test)) == (18, 2)
    for pairs in (train, test):
        batch = pairs.batch(torch.arange(len(pairs)))
        assert numbers(batch.images) == numbers(batch.conditions["source"])


@pytest.mark.parametrize("cache", [0.0, 4.0], ids=["lazy", "memory"])
def test_both_are_cropped_and_mirrored_alike(make, cache):
    files = {}
    for i in range(4):
        columns = np.tile(np.arange(20, dtype=np.uint8), (8, 1))
        files |= {
            f"trainA/{i}.png": encoded(Image.fromarray(columns)),
            f"trainB/{i}.png": encoded(Image.fromarray(columns + 100)),
        }
    settings = TwoSidedSettings(size=8, crop="random", flip=True, cache=cache)
    pairs = load_pairs(make(files), "train", settings)
    seen = set()
    for step in range(20):
        batch = pairs.batch(torch.arange(len(pairs)), Key(step))
        difference = (batch.images - batch.conditions["source"]) * 255
        assert torch.allclose(difference, torch.tensor(100.0), atol=1e-3)
        seen |= {tuple(image[0, 0].tolist()) for image in batch.images}
    assert len(seen) > 10


def test_images_without_their_pair(make):
    files = {f"trainA/{i}.png": pair(i)[0] for i in range(4)} | {f"trainB/{i}.png": pair(i)[1] for i in range(1, 6)}
    path = make(files)
    with pytest.raises(
        DataError, match=r": 3 images have no image of the same name on the other side: trainA/0.png, "
    ) as info:
        load_pairs(path, "train")
    assert sorted(info.value.files) == ["trainA/0.png", "trainB/4.png", "trainB/5.png"]
    pairs = load_pairs(path, "train", TwoSidedSettings(skip_bad=True))
    both = [load_pairs(path, split, TwoSidedSettings(skip_bad=True)) for split in ("train", "test")]
    assert sum(map(len, both)) == 3
    assert pairs.notes[0].startswith("skipped, as 3 images have no image of the same name")


@pytest.mark.parametrize("cache", [0.0, 4.0], ids=["lazy", "memory"])
def test_a_bad_side_takes_its_pair_with_it(make, cache):
    files = {**LAYOUTS["trainA"], "top/trainA/2.png": b"text"}
    path = make(files)
    with pytest.raises(DataError, match=r"1 of 10 images cannot be read: top/trainA/2.png \("):
        load_pairs(path, "train")
    pairs = load_pairs(path, "train", TwoSidedSettings(skip_bad=True, cache=cache))
    assert numbers(pairs.batch(torch.arange(2)).images) == [1, 3]
    assert "skipped 1 training image that cannot be read: top/trainA/2.png" in pairs.notes[0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"1.png": png(size=(5, 4)), "2.png": png(size=(5, 4))}, r"1.png \(5x4, whose halves have no equal width\)"),
        ({"A/1.png": png(), "B/1.png": png(size=(9, 9))}, "must have one size .* 1 is 9x9 .B/1.png., 1 is 4x3"),
        ({"A/1.png": png(), "A/2.png": png()}, "has no images of B, but 2 images of A"),
        ({"A/1.png": png(), "B/1.png": png(), "C/1.png": png()}, "1 image in neither A nor B: C/1.png"),
        ({"A/1.png": png(), "A/1.bmp": png(), "B/1.png": png()}, "A/1.bmp and A/1.png have the same name but for"),
        ({"notes.md": b""}, "has no images"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together(make, files, message):
    path = make(files)
    with pytest.raises(DataError, match=message) as info:
        load_pairs(path, "train")
    assert str(info.value).startswith(f"data set pairs: {path}")


def test_a_size_takes_sides_of_different_sizes(make):
    path = make(
        {f"{side}/{i}.png": png(size=size) for side, size in (("A", (9, 5)), ("B", (30, 41))) for i in range(3)}
    )
    pairs = load_pairs(path, "train", TwoSidedSettings(size=8))
    assert pairs.spec.image_shape == pairs.spec["source"].shape == (3, 8, 8)


def test_wrong_settings():
    with pytest.raises(ConfigError, match=r"data.direction: must be one of 'AtoB', 'BtoA', was 'BA'"):
        data.load("pairs:x", "train", {"direction": "BA"})


def domains(train=(3, 5), test=(2, 1)):
    return {
        f"{split}{side}/{i}.png": png("L", size=(2, 2), value=100 * n + i)
        for split, counts in (("train", train), ("test", test))
        for n, (side, count) in enumerate(zip("AB", counts, strict=True))
        for i in range(count)
    }


@pytest.mark.parametrize("cache", [0.0, 4.0], ids=["lazy", "memory"])
def test_unpaired_domains(make, cache):
    path = make(domains())
    train = load_domains(path, "train", TwoSidedSettings(cache=cache))
    (source,) = train.spec.conditions
    assert (source.name, source.paired, source.shape, len(train)) == ("source", False, (1, 2, 2), 5)
    batch = train.batch(torch.arange(5))
    assert (batch.images * 255).round()[:, 0, 0, 0].tolist() == [100, 101, 102, 103, 104]
    assert numbers(batch.conditions["source"]) == [0, 1, 2, 0, 1]
    drawn = [tuple(numbers(train.batch(torch.arange(5), Key(step)).conditions["source"])) for step in range(40)]
    assert len(set(drawn)) > 30
    assert {number for row in drawn for number in row} == {0, 1, 2}
    reverse = load_domains(path, "test", TwoSidedSettings(cache=cache, direction="BtoA"))
    batch = reverse.batch(torch.arange(2))
    assert numbers(batch.images) == [0, 1]
    assert (batch.conditions["source"] * 255).round()[:, 0, 0, 0].tolist() == [100, 100]


def test_domains_of_different_channels_and_sizes(make):
    path = make(
        {**{f"A/{i}.png": png("L", (4, 4)) for i in range(3)}, **{f"B/{i}.png": png(size=(8, 6)) for i in range(3)}}
    )
    train = load_domains(path, "train")
    assert (train.spec.image_shape, train.spec["source"].shape) == ((3, 6, 8), (1, 4, 4))


def test_domains_that_are_not_there(make):
    path = make({"train/1.png": png(), "test/2.png": png()})
    with pytest.raises(
        DataError, match=r"data set domains: .* has no folders of two domains, such as trainA and trainB"
    ):
        load_domains(path, "train")
    path = make({**domains(test=(0, 0)), "testA/1.png": png("L", (2, 2))}, "more")
    with pytest.raises(MissingSplitError, match=r"has no test images"):
        load_domains(path, "test")
    path = make({**domains(), "testA/0.png": b"", "testA/1.png": b""}, "bad")
    with pytest.raises(DataError, match=r"no test image of the other domain can be read: testA/0.png"):
        load_domains(path, "test", TwoSidedSettings(skip_bad=True))


@pytest.mark.skipif("GENCORE_DATA" not in os.environ, reason="GENCORE_DATA is not set: no pictures of emoji")
def test_real_pairs(tmp_path):
    import zipfile

    folder = Path(os.environ["GENCORE_DATA"]) / "emoji"
    sides = {"A": folder / "emoji-twitter.zip", "B": folder / "emoji-google.zip"}
    if not all(file.is_file() for file in sides.values()):
        pytest.skip("GENCORE_DATA holds no emoji/emoji-twitter.zip and emoji/emoji-google.zip")
    for side, file in sides.items():
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                split, _, rest = name.rpartition("/")
                if rest.endswith(".png"):
                    write_folder(tmp_path, {f"{split.rpartition('/')[2]}{side}/{rest}": archive.read(name)})
    pairs, unpaired = load_pairs(tmp_path, "train"), load_domains(tmp_path, "test")
    assert (len(pairs), len(unpaired)) == (1720, 191)
    assert pairs.spec.image_shape == pairs.spec["source"].shape == unpaired.spec["source"].shape == (3, 64, 64)
    batch = pairs.batch(torch.arange(256))
    flat = [images.flatten(1) - images.flatten(1).mean(0) for images in (batch.images, batch.conditions["source"])]
    alike = torch.nn.functional.cosine_similarity(*flat).mean()
    others = torch.nn.functional.cosine_similarity(flat[0], flat[1].roll(1, 0)).mean()
    assert alike > 0.5
    assert others < 0.2
