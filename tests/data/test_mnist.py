import gzip
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from gencore import data
from gencore.config import ConfigError
from gencore.data import DataError, MissingSplitError
from gencore.data.mnist import load_mnist, read_idx

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (7, 5, 4), dtype=np.uint8)
LABELS = RNG.integers(0, 10, 7, dtype=np.uint8)


def idx(array):
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def folder(tmp_path):
    for prefix in ("train", "t10k"):
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(idx(IMAGES))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(LABELS))
    return tmp_path


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("split", ["train", "test"])
def test_reads(folder, compressed, split):
    if compressed:
        for file in list(folder.iterdir()):
            Path(f"{file}.gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
    images = load_mnist(folder, split)
    assert images.spec.image_shape == (1, 5, 4)
    assert np.array_equal(images.images.squeeze(1).numpy(), IMAGES)
    assert np.array_equal(images.labels.numpy(), LABELS)
    assert images.spec.class_names == tuple("0123456789")


def test_names_of_classes(folder):
    spec = f"mnist:{folder}"
    (folder / "classes.txt").write_bytes(
        b"\xef\xbb\xbf" + "\n".join(f" name {i}" for i in range(10)).encode() + b"\r\n\n"
    )
    assert data.load(spec, "train").spec.class_names == tuple(f"name {i}" for i in range(10))
    names = tuple("abcdefghijkl")
    assert data.load(spec, "test", {"classes": names}).spec.class_names == names
    with pytest.raises(
        DataError, match=r"must be below 2, but is \d .*; data.classes or classes.txt names the classes"
    ):
        data.load(spec, "train", {"classes": ["a", "b"]})
    with pytest.raises(ConfigError, match=r"data.classes: must be distinct, was 'a' 2 times"):
        data.load(spec, "train", {"classes": ["a", "a"]})
    assert data.settings_type(spec).from_settings({"classes": "T-shirt/top, Trouser"}).classes == (
        "T-shirt/top",
        "Trouser",
    )
    (folder / "classes.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"classes.txt must be in UTF-8, is not at byte 0"):
        data.load(spec, "train")


def test_a_test_split_of_other_size_is_found_before_training(folder):
    spec = f"mnist:{folder}"
    assert data.check(data.load(spec, "train"), spec) == ()
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(IMAGES[:, :4]))
    with pytest.raises(DataError, match=r"splits train and test differ: images are 1x5x4 in train, 1x4x4 in test"):
        data.check(data.load(spec, "train"), spec)


def test_reads_the_name_with_a_dot_and_gzip_without_suffix(folder):
    file = folder / "train-images-idx3-ubyte"
    file.rename(folder / "train-images.idx3-ubyte")
    (folder / "train-labels-idx1-ubyte").write_bytes(gzip.compress(idx(LABELS)))
    assert len(load_mnist(folder, "train")) == 7


def test_environment_variable(folder, tmp_path, monkeypatch):
    root = tmp_path / "root"
    root.mkdir()
    monkeypatch.delenv("GENCORE_DATA", raising=False)
    with pytest.raises(DataError, match=r"needs a path .mnist:FOLDER., or GENCORE_DATA set"):
        load_mnist(None, "train")
    monkeypatch.setenv("GENCORE_DATA", str(root))
    with pytest.raises(DataError, match=r"root/mnist is not a folder"):
        load_mnist(None, "train")
    (root / "mnist").symlink_to(folder)
    assert len(load_mnist(None, "train")) == 7


# Without the time, which would be another in each process that collects these tests.
GZ = gzip.compress(idx(IMAGES), mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must begin with 00000803, not with nothing"),
        (b"\x89PNG\r\n\x1a\n" + bytes(30), "must begin with 00000803, not with 89504e47"),
        (idx(LABELS), "of 3 dimensions must begin with 00000803, not with 00000801"),
        (bytes((0, 0, 13, 3)) + bytes(40), "must begin with 00000803, not with 00000d03"),
        (idx(IMAGES)[:11], "header is truncated after 11 of 16 bytes"),
        (idx(IMAGES)[:-1], "truncated: the header says 7 x 5 x 4 values, but 139 follow"),
        (idx(IMAGES) + b"x", "too long: more follows the 7 x 5 x 4 values"),
        (bytes((0, 0, 8, 3)) + b"\xff" * 12 + bytes(9), "the header claims 4294967295 x 4294967295 x 4294967295 "),
        # 2^34 values would fit the limit; memory must be taken for what is there only.
        (bytes((0, 0, 8, 3)) + struct.pack(">3I", 1 << 14, 1 << 10, 1 << 10) + bytes(9), "but 9 follow"),
        (GZ[: len(GZ) // 2], "gzip data are damaged or truncated"),
        (GZ[:40] + bytes(20) + GZ[60:], "gzip data are damaged or truncated"),
    ],
)
def test_bad_image_files_are_named(folder, content, message):
    file = folder / "train-images-idx3-ubyte"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message) as info:
        load_mnist(folder, "train")
    assert str(file) in str(info.value)
    assert len(load_mnist(folder, "test")) == 7


def test_counts_and_labels_must_fit(folder):
    labels = folder / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(LABELS[:6]))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte holds 7 images, but .*labels.* holds 6 labels"):
        load_mnist(folder, "train")
    labels.write_bytes(idx(np.array([0, 1, 2, 10, 4, 200, 6], dtype=np.uint8)))
    with pytest.raises(DataError, match=r"labels-idx1-ubyte: label 3 must be below 10, but is 10 \(2 such labels\)"):
        load_mnist(folder, "train")
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(IMAGES[:0]))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(LABELS[:0]))
    with pytest.raises(DataError, match=r"holds no pixels: its dimensions are \(0, 5, 4\)"):
        load_mnist(folder, "test")


def test_missing_file(folder):
    (folder / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"holds no train-labels-idx1-ubyte ") as info:
        load_mnist(folder, "train")
    assert not isinstance(info.value, MissingSplitError)
    (folder / "train-images-idx3-ubyte").unlink()
    with pytest.raises(MissingSplitError, match=r"holds no train-images-idx3-ubyte "):
        load_mnist(folder, "train")
    assert len(load_mnist(folder, "test")) == 7


def moved(folder, root, *places):
    for place in places:
        shutil.copytree(folder, root / place)
    return root


@pytest.mark.parametrize("place", ["raw", "MNIST/raw", "FashionMNIST/raw", "KMNIST/raw"])
def test_the_layout_of_torchvision(tmp_path_factory, folder, place):
    root = moved(folder, tmp_path_factory.mktemp("root"), place)
    data = load_mnist(root, "train")
    assert np.array_equal(data.images.squeeze(1).numpy(), IMAGES)
    assert data.notes == (f"read from {root / place}",)
    assert load_mnist(root / place, "test").notes == ()


def test_several_data_sets_below_one_root(tmp_path_factory, folder):
    root = moved(folder, tmp_path_factory.mktemp("root"), "FashionMNIST/raw", "KMNIST/raw")
    with pytest.raises(DataError, match=r"several data sets, name one: \S*/FashionMNIST/raw, \S*/KMNIST/raw"):
        load_mnist(root, "train")
    moved(folder, root, "MNIST/raw")
    assert load_mnist(root, "train").notes == (f"read from {root / 'MNIST/raw'}",)


def test_a_folder_without_files_says_where_it_looked(tmp_path):
    with pytest.raises(DataError, match=r"holds none of .*t10k-images-idx3-ubyte.* nor does \S*/raw, \S*/MNIST/raw or"):
        load_mnist(tmp_path, "train")


def test_read_idx_of_one_dimension(folder):
    assert np.array_equal(read_idx(folder / "t10k-labels-idx1-ubyte", 1), LABELS)


@pytest.mark.skipif("GENCORE_DATA" not in os.environ, reason="GENCORE_DATA is not set: no MNIST files")
def test_the_real_files():
    train, test = load_mnist(None, "train"), load_mnist(None, "test")
    assert (len(train), len(test)) == (60000, 10000)
    assert train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert abs(train.images.float().mean().item() / 255 - 0.1307) < 1e-4
