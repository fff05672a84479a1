import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gencore.data import DataError, load
from gencore.data.images import load_images, plugin

RNG = np.random.default_rng(0)


def png(mode="RGB", size=(4, 3), value=None):
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}[mode]
    pixels = RNG.integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    if value is not None:
        pixels[:] = value
    stream = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels, mode).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(params=["folder", "zip"])
def make(request, tmp_path):
    """Writes the files {name: bytes} as a folder or as an archive."""

    def make(files):
        if request.param == "zip":
            path = tmp_path / "pictures.zip"
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, content in files.items():
                    archive.writestr(name, content)
            return path
        path = tmp_path / "pictures"
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
        return path

    return make


def decoded(content):
    return torch.from_numpy(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).copy()).permute(2, 0, 1)


def test_train_and_test_folders(make):
    files = {f"{split}/{name}/{i}.png": png() for split in ("train", "test") for name in ("cat", "ape") for i in "01"}
    data = load_images(make(files), "test")
    assert data.class_names == ("ape", "cat")
    assert data.image_shape == (3, 3, 4)
    assert data.labels.tolist() == [0, 0, 1, 1]
    expected = [files[f"test/{name}/{i}.png"] for name in ("ape", "cat") for i in "01"]
    assert torch.equal(data.images, torch.stack([decoded(content) for content in expected]))
    assert data.name == "pictures"


@pytest.mark.parametrize("wrapper", ["", "top/", "top/deeper/"])
def test_split_is_disjoint_stratified_and_stable(make, wrapper):
    files = {f"{wrapper}{name}/{i:02}.png": png("L") for name in ("a", "b") for i in range(20)}
    path = make(files)
    train, test = load_images(path, "train"), load_images(path, "test")
    assert train.labels.bincount().tolist() == [18, 18]
    assert test.labels.bincount().tolist() == [2, 2]
    assert train.image_shape == (1, 3, 4)
    both = {image.numpy().tobytes() for data in (train, test) for image in data.images}
    assert len(both) == 40
    # The same files, whatever lies around them and wherever.
    names = {name for name, content in files.items()
             if any(torch.equal(decoded(content)[:1], image) for image in test.images)}  # fmt: skip
    assert names == {f"{wrapper}{name}" for name in ("a/04.png", "a/14.png", "b/03.png", "b/10.png")}


def test_classes_are_those_of_both_splits(make):
    data = load_images(make({"train/b/1.png": png(), "test/a/1.png": png(), "test/b/1.png": png()}), "train")
    assert data.class_names == ("a", "b")
    assert data.labels.tolist() == [1]


@pytest.mark.parametrize("prefix", ["", "one folder/"])
def test_flat_images_have_no_classes(make, prefix):
    data = load_images(make({f"{prefix}{i}.png": png() for i in range(10)}), "train")
    assert (len(data), data.num_classes, data.labels) == (9, 0, None)


def test_flat_splits(make):
    path = make({"train/1.png": png(), "train/2.png": png(), "test/1.png": png()})
    assert len(load_images(path, "train")) == 2
    assert load_images(path, "test").labels is None


@pytest.mark.parametrize("wrapper", ["", "imagenet/"])
@pytest.mark.parametrize("folder", ["val", "valid", "validation"])
def test_validation_images_are_the_test_split_where_there_is_no_other(make, wrapper, folder):
    files = {f"{wrapper}{split}/{name}/1.png": png() for split in ("train", folder) for name in ("cat", "ape")}
    data = load_images(make(files), "test")
    assert data.class_names == ("ape", "cat")
    expected = [files[f"{wrapper}{folder}/{name}/1.png"] for name in ("ape", "cat")]
    assert torch.equal(data.images, torch.stack([decoded(content) for content in expected]))


def test_validation_images_beside_a_test_split_are_left_out(make):
    files = {f"{split}/{name}/1.png": png() for split in ("train", "val", "test") for name in ("cat", "ape")}
    path = make(files)
    assert len(load_images(path, "train")) == 2
    expected = [files[f"test/{name}/1.png"] for name in ("ape", "cat")]
    assert torch.equal(load_images(path, "test").images, torch.stack([decoded(content) for content in expected]))


def test_labels_can_be_left_out(make):
    path = make({f"{name}/{i}.png": png() for name in "ab" for i in range(3)})
    assert plugin.load(path, "train").num_classes == 2
    data = load_images(path, "train", labelled=False)
    assert (len(data), data.labels, data.num_classes) == (4, None, 0)


def test_other_files_are_passed_over(make):
    files = {"a/1.png": png(), "b/1.PNG": png(), "a/.2.png": b"", "__MACOSX/a/1.png": b"", "notes.txt": b"", "a/x": b""}
    path = make(files)
    assert len(load_images(path, "train")) == 2


def test_gray_among_color_and_across_splits(make):
    gray = png("L")
    path = make({"train/a/1.png": gray, "train/b/1.png": gray, "test/a/1.png": png("RGB")})
    data = load_images(path, "train")
    assert data.image_shape == (3, 3, 4)
    assert torch.equal(data.images[0], decoded(gray))


def test_transparency_is_laid_on_white(make):
    path = make({"a.png": png("RGBA", value=(10, 20, 30, 0)), "b.png": png("RGBA", value=(10, 20, 30, 255))})
    images = torch.cat([load_images(path, split).images for split in ("train", "test")])
    assert {tuple(image[:, 0, 0].tolist()) for image in images} == {(255, 255, 255), (10, 20, 30)}


def sixteen_bits():
    stream = io.BytesIO()
    Image.fromarray(np.full((3, 4), 40000, dtype=np.uint16)).save(stream, "PNG")
    return stream.getvalue()


BROKEN = bytearray(png(size=(40, 30)))
BROKEN[len(BROKEN) // 2] ^= 0xFF


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"a/1.png": png(), "a/2.png": png(size=(5, 3)), "b/1.png": png()},
            "all images must have one size, but a/1.png is 4x3 and a/2.png is 5x3",
        ),
        ({"a/1.png": png(), "a/2.png": b"GIF89 no", "b/1.png": png()}, "a/2.png is not an image, or is damaged"),
        ({f"{i}.png": png(size=(40, 30))[:2000] for i in "12"}, "cannot read [12].png: .*truncated"),
        ({"1.png": bytes(BROKEN), "2.png": bytes(BROKEN)}, "cannot read [12].png: "),
        ({"1.png": sixteen_bits()}, "1.png has mode I;16, which is not 8 bits per channel"),
        ({"notes.txt": b"x"}, "holds no images"),
        ({"1.png": png(), "a/1.png": png()}, "1.png lies beside the class folders"),
        ({"train/a/1.png": png(), "train/b/1.png": png(), "test/1.png": png()}, "one split, but not in test"),
        ({"train/a/1.png": png(), "train/b/1.png": png(), "val/1.png": png()}, "one split, but not in val"),
        (
            {"train/a/1.png": png(), "test/a/1.png": png(), "extra/a/1.png": png(), "cat/1.png": png()},
            "folders beside train that may be classes or splits: cat, extra; beside train there may be test, val",
        ),
    ],
)
def test_faults_name_the_file(make, files, message):
    path = make(files)
    with pytest.raises(DataError, match=message) as info:
        load_images(path, "train")
    assert str(path) in str(info.value)


def test_one_image_has_no_test_split(make):
    with pytest.raises(DataError, match="holds no images to test with"):
        load_images(make({"1.png": png()}), "test")


def test_other_paths(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        load_images(tmp_path / "nowhere", "train")
    (tmp_path / "file").write_bytes(b"hello")
    with pytest.raises(DataError, match="file is neither a folder nor a zip archive"):
        load_images(tmp_path / "file", "train")
    with pytest.raises(DataError, match="needs a path"):
        load("images", "train")


def test_archive_that_unpacks_too_large(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("a/1.png", bytes(300 << 20))
    with pytest.raises(DataError, match=r"a/1.png claims to unpack \d+ bytes to 314572800"):
        load_images(path, "train")


def test_damaged_archive_is_named(tmp_path):
    path = tmp_path / "bad.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/1.png", png())
    content = path.read_bytes()
    path.write_bytes(content.replace(b"PK\x01\x02", b"PK\x00\x00"))
    with pytest.raises(DataError, match=r"bad.zip is a damaged zip archive: "):
        load_images(path, "train")


def test_damaged_archive_member_is_named(tmp_path):
    path = tmp_path / "bad.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/1.png", png(size=(40, 30)))
        archive.writestr("b/1.png", png(size=(40, 30)))
    content = bytearray(path.read_bytes())
    content[200] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot unpack a/1.png: Bad CRC"):
        load_images(path, "train")


def test_links_to_folders_are_followed_but_not_for_ever(tmp_path):
    (tmp_path / "store/cats").mkdir(parents=True)
    (tmp_path / "store/cats/1.png").write_bytes(png())
    (tmp_path / "data/dogs").mkdir(parents=True)
    (tmp_path / "data/dogs/1.png").write_bytes(png())
    (tmp_path / "data/cats").symlink_to(tmp_path / "store/cats")
    (tmp_path / "data/dogs/loop").symlink_to(tmp_path / "data")
    assert load_images(tmp_path / "data", "train").class_names == ("cats", "dogs")


@pytest.mark.skipif("GENCORE_DATA" not in os.environ, reason="GENCORE_DATA is not set: no CIFAR-10 archive")
def test_a_real_archive():
    path = Path(os.environ["GENCORE_DATA"]) / "cifar10" / "cifar10-imagefolder.zip"
    if not path.is_file():
        pytest.skip("GENCORE_DATA holds no cifar10/cifar10-imagefolder.zip")
    data = load_images(path, "test")
    assert data.image_shape == (3, 32, 32)
    assert data.labels.bincount().tolist() == [500] * 10
