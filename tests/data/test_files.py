"""Images that are decoded when they are asked for, in this process and in others."""

import contextlib
import os
import pickle
import shutil
import sys
import warnings

import numpy as np
import pytest
import torch
from data.pictures import encoded, png, write_archive, write_folder
from PIL import Image

from gencore import Key, data
from gencore.data import DataError, ImageDataset, _files
from gencore.data._columns import Strings
from gencore.data.images import ImageSettings, load_images

CUT = encoded(Image.effect_noise((4, 3), 99))[:-30]
GIB = 1 << 30


def numbered(count, size=(4, 3), split="train/"):
    made = {f"{split}{i:02}.png": png("L", size, value=i) for i in range(count)}
    return {**made, "test/00.png": png("L", size, value=200)}


def lazy(path, split="train", **settings):
    return load_images(path, split, ImageSettings(**{"cache": 0, **settings}))


def values(dataset, indices=None, key=None):
    indices = torch.arange(len(dataset)) if indices is None else torch.tensor(indices)
    return (dataset.batch(indices, key).images[:, 0, 0, 0] * 255).round().int().tolist()


@pytest.fixture
def decodings(monkeypatch):
    """The names of the images that are decoded, as they are."""
    names = []
    function = _files.decoded

    def counting(stream, name, *arguments):
        names.append(name)
        return function(stream, name, *arguments)

    monkeypatch.setattr(_files, "decoded", counting)
    return names


def test_what_fits_is_decoded_at_once_and_the_rest_when_it_is_asked_for(make):
    path = make(numbered(10))
    assert isinstance(lazy(path, cache=10 * 12 / GIB), ImageDataset)
    images = lazy(path, cache=9.5 * 12 / GIB)
    assert images.workers
    assert not isinstance(images, ImageDataset)
    assert values(images) == list(range(10))


def test_a_part_is_kept_and_decoded_once(make, decodings):
    images = lazy(make(numbered(10)), cache=4.5 * 12 / GIB)
    for _ in range(3):
        assert values(images) == list(range(10))
    assert sorted(decodings) == sorted(
        [f"train/{i:02}.png" for i in range(4)] + [f"train/{i:02}.png" for i in range(4, 10)] * 3
    )


def test_loading_and_describing_decodes_nothing(make, decodings):
    images = lazy(make({f"{name}/{i}.png": png() for name in ("cat", "dog") for i in range(4)}))
    assert images.fingerprint
    assert images.values("label").bincount().tolist() == [3, 3]
    assert len(repr(images)) > 10
    assert decodings == []


def test_a_bad_image_met_late_is_named(make):
    images = lazy(make({**numbered(5), "train/03.png": CUT}))
    assert values(images, [0, 4]) == [0, 4]
    with pytest.raises(
        DataError, match=r"data set images: .*: train/03.png cannot be read: .*; --set data.skip"
    ) as info:
        values(images, [0, 3])
    assert info.value.files == ("train/03.png",)


@pytest.mark.parametrize("settings", [{}, {"size": 3, "crop": "random"}])
def test_a_bad_image_met_late_is_replaced_by_the_next_one(make, settings):
    bad = {f"train/{name}/{i:02}.png": CUT for name, i in (("a", 1), ("a", 2), ("b", 4))}
    files = {f"train/{name}/{i:02}.png": png("L", value=50 * n + i) for n, name in enumerate("ab") for i in range(5)}
    path = make({**files, **bad, "test/a/0.png": png("L")})
    orders = [list(range(10)), [9, 4, 1, 0], [2], [1, 1]]
    expected = {**{i: i for i in range(5)}, **{5 + i: 50 + i for i in range(5)}, 1: 3, 2: 3, 9: 0}
    for order in orders:
        # Whatever was asked for before.
        images = lazy(path, skip_bad=True, **settings)
        for indices in (order, order):
            batch = images.batch(torch.tensor(indices))
            assert (batch.images[:, 0, 0, 0] * 255).round().int().tolist() == [expected[i] for i in indices]
            assert batch.labels.tolist() == [int(expected[i] >= 50) for i in indices]
    images = lazy(path, skip_bad=True, **settings)
    assert images.notes == ()
    values(images, key=Key(0))
    assert images.notes == ("replaced 3 images that cannot be decoded: train/a/01.png, train/a/02.png, train/b/04.png",)


def test_what_pillow_warns_of_is_not_said(make, recwarn):
    damaged = bytearray(encoded(Image.new("L", (4, 3)), "TIFF"))
    # A tag of text that is longer than the file.
    at = int.from_bytes(damaged[4:8], "little") + 2
    damaged[at : at + 12] = b"\x0e\x01\x02\x00\xff\xff\x00\x00\x08\x00\x00\x00"
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for cache in (0, 4):
            path = make({"train/1.tif": bytes(damaged), "test/2.png": png()}, f"at {cache}")
            with contextlib.suppress(DataError):
                values(load_images(path, "train", ImageSettings(cache=cache)))
    assert [str(warning.message) for warning in recwarn] == []


def test_where_all_are_bad_nothing_is_left(make):
    images = lazy(make({"test/1.png": png(), **{f"train/{i}.png": CUT for i in range(3)}}), skip_bad=True)
    with pytest.raises(DataError, match="no image can be decoded"):
        values(images, [1])


def test_bad_headers_are_found_before(make):
    path = make({**numbered(5), "train/03.png": b"text"})
    with pytest.raises(DataError, match=r"1 of 6 images cannot be read: train/03.png \(no image"):
        lazy(path)
    images = lazy(path, skip_bad=True)
    assert values(images) == [0, 1, 2, 4]
    assert "skipped 1 training image that cannot be read: train/03.png" in images.notes[0]


def test_too_little_memory_is_no_fault_of_a_file(make, monkeypatch):
    def full(*arguments):
        raise MemoryError

    images = lazy(make(numbered(3)), skip_bad=True)
    monkeypatch.setattr(_files, "decoded", full)
    with pytest.raises(MemoryError):
        values(images)


def test_a_copy_reads_the_same(make, decodings):
    images = lazy(make(numbered(6)), cache=3.5 * 12 / GIB)
    assert values(images) == list(range(6))
    content = pickle.dumps(images)
    assert len(content) < 20000
    copy = pickle.loads(content)
    del images, decodings[:]
    assert values(copy) == values(copy) == list(range(6))
    # A second piece of memory for what is decoded would be beyond the limit.
    assert len(decodings) == 12
    assert copy.fingerprint == pickle.loads(pickle.dumps(copy)).fingerprint


class Steps(torch.utils.data.Dataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return 24

    def __getitem__(self, step):
        indices = torch.arange(step, step + 40, 5) % len(self.dataset)
        batch = self.dataset.batch(indices, Key(0).fold_in(step))
        return indices, batch


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@pytest.mark.parametrize(
    ("write", "start"), [(write_folder, "fork"), (write_archive, "fork"), (write_archive, "spawn")]
)
def test_worker_processes_share_what_is_decoded(tmp_path, write, start):
    path = write(tmp_path / "pictures", {**numbered(40, (16, 16)), "train/07.png": CUT})
    images = lazy(path, cache=20.5 * 256 / GIB, skip_bad=True, size=16)
    # The archive is open here too, at some place of its own.
    assert values(images, [39]) == [39]
    loader = torch.utils.data.DataLoader(Steps(images), batch_size=None, num_workers=2, multiprocessing_context=start)
    for indices, batch in loader:
        expected = [8 if i == 7 else i for i in indices.tolist()]
        assert (batch.images[:, 0, 0, 0] * 255).round().int().tolist() == expected
    if start == "fork" or sys.platform == "linux":
        assert images._images._states.tensor[:20].tolist() == [2 if i == 7 else 1 for i in range(20)]
        assert images.notes[-1] == "replaced 1 image that cannot be decoded: train/07.png"
    assert values(images)[:9] == [0, 1, 2, 3, 4, 5, 6, 8, 8]


def test_an_archive_that_changes_is_not_read_on(tmp_path):
    path = write_archive(tmp_path / "x.zip", numbered(4))
    copy = pickle.loads(pickle.dumps(lazy(path)))
    write_archive(path, numbered(5))
    with pytest.raises(
        DataError, match=r"train/00.png cannot be read: .*x.zip has changed since its files were listed"
    ):
        values(copy)


def test_an_archive_is_closed_once_all_is_in_memory(tmp_path):
    opened = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    images = load_images(write_archive(tmp_path / "x.zip", numbered(4)), "train")
    assert len(images) == 4
    if opened:
        assert len(os.listdir("/proc/self/fd")) <= opened


def test_the_fingerprint_knows_names_sizes_labels_texts_and_settings(tmp_path):
    def mark(files, name, **settings):
        path = tmp_path / name
        shutil.rmtree(path, ignore_errors=True)
        return lazy(write_folder(path, files), **settings).fingerprint

    files = {f"{name}/{i}.png": png() for name in ("cat", "dog") for i in range(3)}
    metadata = b"file_name,text,kind\n" + b"".join(f"{name},a,{name[0]}\n".encode() for name in files)
    same = mark(files, "a")
    assert mark(files, "moved") == same
    assert mark(files, "b", cache=1e-9) == same
    others = [
        mark({**files, "cat/0.png": png()}, "c"),
        mark({name.replace("dog", "fox"): content for name, content in files.items()}, "d"),
        mark(files, "e", size=3),
        mark(files, "f", size=3, crop="none"),
        mark({**files, "dog/9.png": png()}, "g"),
        mark({**files, "metadata.csv": metadata}, "h"),
        mark({**files, "metadata.csv": metadata.replace(b",a,", b",b,")}, "i"),
        mark({**files, "metadata.csv": metadata}, "j", label="kind"),
    ]
    assert len({same, *others}) == 9


def test_the_fingerprint_reads_a_bounded_number_of_files(make, monkeypatch):
    images = lazy(make({f"{i:03}.png": png("L", (1, 1)) for i in range(200)}))
    read = []
    function = images._images.files.open
    monkeypatch.setattr(images._images.files, "open", lambda name: read.append(name) or function(name))
    assert images.fingerprint
    assert 50 < len(read) <= 64


def test_strings_in_arrays():
    strings = ["", "a", "\udcff\n", "漢字", "", "\U0001f600"]
    packed = pickle.loads(pickle.dumps(Strings(strings)))
    assert list(packed) == strings
    assert (packed[-1], packed[1:4], len(packed), "漢字" in packed) == (strings[-1], strings[1:4], 6, True)
    for index in (6, -7):
        with pytest.raises(IndexError):
            packed[index]
    assert list(Strings([])) == []


def test_shared_bytes_are_zeros_and_let_go_of_their_file():
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for size in (0, 1, 10_000_000):
        shared = _files.SharedBytes(size)
        assert shared.tensor.shape == (size,)
        assert not shared.tensor.any()
        copy = pickle.loads(pickle.dumps(shared))
        assert (copy.tensor.shape, copy.shared, shared.shared) == ((size,), False, True)
        del shared, copy
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("crop", ["center", "random"])
def test_large_windows_of_every_size(make, crop):
    random = np.random.default_rng(0)
    files = {f"{i}.png": png("RGB", tuple(random.integers(1, 40, 2).tolist())) for i in range(12)}
    path = make(files)
    for dataset in (lazy(path, size=7, crop=crop), load_images(path, "train", ImageSettings(size=7, crop=crop))):
        for key in (None, Key(0)):
            assert dataset.batch(torch.arange(len(dataset)), key).images.shape == (11, 3, 7, 7)
    spec = f"images:{path}"
    settings = {"size": 7, "crop": crop, "cache": 0}
    assert data.check(data.load(spec, "train", settings), spec, settings) is not None
