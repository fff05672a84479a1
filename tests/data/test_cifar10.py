"""The binary version of CIFAR-10, of a few images."""

import numpy as np
import pytest
import torch
from data.pictures import write_folder

from gencore import Key, data
from gencore.data import DataError, MissingSplitError
from gencore.data.cifar10 import load_cifar10

RNG = np.random.default_rng(0)
NAMES = b"plane\ncar\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n"
TRAIN = {f"data_batch_{i}.bin": RNG.integers(0, 256, (3, 3073), dtype=np.uint8) for i in range(1, 6)}
TEST = {"test_batch.bin": RNG.integers(0, 256, (4, 3073), dtype=np.uint8)}
for _records in (*TRAIN.values(), *TEST.values()):
    _records[:, 0] %= 10
FILES = {name: records.tobytes() for name, records in {**TRAIN, **TEST}.items()}


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-bin/"])
def test_reads(tmp_path, inside):
    write_folder(tmp_path, {inside + name: content for name, content in {**FILES, "batches.meta.txt": NAMES}.items()})
    train, test = load_cifar10(tmp_path, "train"), load_cifar10(tmp_path, "test")
    assert (len(train), len(test), train.spec.image_shape) == (15, 4, (3, 32, 32))
    assert train.spec.class_names == tuple(NAMES.decode().split())
    records = np.concatenate(list(TRAIN.values()))
    assert train.labels.tolist() == records[:, 0].tolist()
    # Red first, row by row.
    assert train.images[4, 0, 0, 1] == records[4, 2]
    assert train.images[4, 2, 31, 31] == records[4, -1]
    assert train.notes == ((f"read from {tmp_path / inside}".rstrip("/"),) if inside else ())
    spec = f"cifar10:{tmp_path}"
    assert len(data.check(data.load(spec, "train"), spec)) == len(train.notes)


def test_without_names_and_with_mirrors(tmp_path):
    write_folder(tmp_path, FILES)
    train = data.load(f"cifar10:{tmp_path}", "train", {"flip": True})
    assert train.spec.class_names[:2] == ("airplane", "automobile")
    images = train.batch(torch.arange(15), Key(0)).images
    plain = train.batch(torch.arange(15)).images
    same = [torch.equal(*both) for both in zip(images, plain, strict=True)]
    turned = [torch.equal(one, other.flip(2)) for one, other in zip(images, plain, strict=True)]
    assert [a or b for a, b in zip(same, turned, strict=True)] == [True] * 15
    assert 2 < sum(turned) < 13
    test = data.load(f"cifar10:{tmp_path}", "test", {"flip": True})
    assert torch.equal(test.batch(torch.arange(4), Key(0)).images, test.batch(torch.arange(4)).images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_batch_3.bin": None}, "holds no data_batch_3.bin"),
        ({"data_batch_3.bin": bytes(3072)}, "data_batch_3.bin must be records of 3073 bytes, is 3072 bytes long"),
        ({"data_batch_1.bin": b""}, "data_batch_1.bin must be records of 3073 bytes, is 0 bytes long"),
        ({"data_batch_2.bin": b"\x0a" * 3073}, "label 3 of the train split must be below 10, but is 10 .1 such label"),
        ({"batches.meta.txt": b"\xff"}, "batches.meta.txt must be in UTF-8, is not at byte 0"),
        ({"batches.meta.txt": b"a\nb\na\n"}, "batches.meta.txt must name each class once, names 'a' 2 times"),
        ({"batches.meta.txt": b"a\n"}, "must be below 1, but is"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(tmp_path, changes, message):
    write_folder(tmp_path, {name: content for name, content in {**FILES, **changes}.items() if content is not None})
    with pytest.raises(DataError, match=message) as info:
        load_cifar10(tmp_path, "train")
    assert not isinstance(info.value, MissingSplitError)


def test_other_folders(tmp_path):
    with pytest.raises(DataError, match=r"nowhere is not a folder"):
        load_cifar10(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match=r"neither \S+ nor \S+/cifar-10-batches-bin holds data_batch_1.bin, "):
        load_cifar10(tmp_path, "train")
    write_folder(tmp_path, {"cifar-10-batches-py/data_batch_1": b"\x80\4", "cifar-10-batches-py/test_batch": b"\x80\4"})
    for folder in (tmp_path, tmp_path / "cifar-10-batches-py"):
        with pytest.raises(DataError, match=r"holds the version in pickles, .* get the binary version"):
            load_cifar10(folder, "train")
    write_folder(tmp_path, {"test_batch.bin": FILES["test_batch.bin"]})
    assert len(load_cifar10(tmp_path, "test")) == 4
    with pytest.raises(MissingSplitError, match=r"holds no data_batch_1.bin, data_batch_2.bin"):
        load_cifar10(tmp_path, "train")
