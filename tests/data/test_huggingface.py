"""Data sets of the library datasets, made here and saved to folders; nothing is downloaded."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from gencore import Key, data
from gencore.data import DataError
from gencore.data.huggingface import HubSettings, load_huggingface

datasets = pytest.importorskip("datasets", reason="datasets is not installed")


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def picture(value, size=(6, 4), mode="L"):
    return Image.new(mode, size, value)


FEATURES = {
    "id": datasets.Value("int64"),
    "picture": datasets.Image(),
    "kind": datasets.ClassLabel(names=["dog", "cat"]),
    "text": datasets.Value("string"),
    "said": datasets.Value("string"),
}


def table(values, **changes):
    columns = {
        "id": list(values),
        "picture": [picture(value) for value in values],
        "kind": [value % 2 for value in values],
        "text": [f"no {value}" for value in values],
        "said": [f"said {value}" if value % 3 else None for value in values],
        **changes,
    }
    features = {name: FEATURES[name] for name, column in columns.items() if column is not None}
    return datasets.Dataset.from_dict({n: c for n, c in columns.items() if c is not None}, datasets.Features(features))


@pytest.fixture
def save(tmp_path):
    def save(**splits):
        path = tmp_path / "saved"
        made = {
            name: values if isinstance(values, datasets.Dataset) else table(values) for name, values in splits.items()
        }
        datasets.DatasetDict(made).save_to_disk(path)
        return path

    return save


def values(dataset):
    return (dataset.batch(torch.arange(len(dataset))).images[:, 0, 0, 0] * 255).round().int().tolist()


@pytest.mark.parametrize("cache", [0.0, 4.0], ids=["lazy", "memory"])
def test_columns_by_their_types(save, cache):
    path = save(train=range(10), validation=range(20, 24))
    train = load_huggingface(path, "train", HubSettings(cache=cache))
    assert train.spec.image_shape == (1, 4, 6)
    assert [(c.name, c.kind, c.names) for c in train.spec.conditions] == [
        ("label", "class", ("dog", "cat")),
        ("text", "text", ()),
    ]
    assert values(train) == list(range(10))
    batch = train.batch(torch.tensor([3, 8]), Key(0))
    assert (batch.labels.tolist(), list(batch.conditions["text"])) == ([1, 0], ["no 3", "no 8"])
    assert train.workers == (cache == 0)
    spec = f"huggingface:{path}"
    assert values(data.load(spec, "test")) == [20, 21, 22, 23]
    assert data.check(data.load(spec, "train"), spec) == ()


def test_columns_by_their_names(save):
    train = load_huggingface(save(train=range(6), test=range(2)), "train", HubSettings(text="said", label="id"))
    assert train.spec.class_names == tuple("012345")
    assert list(train.values("text")) == ["", "said 1", "said 2", "", "said 4", "said 5"]
    assert train.notes == ("3 images have no caption: train/0, train/3, test/0",)


def test_a_tenth_is_the_test_split_where_there_is_none(save):
    path = save(train=range(30))
    train, test = (load_huggingface(path, split) for split in ("train", "test"))
    assert sorted(values(train) + values(test)) == list(range(30))
    assert len(test) == 3
    assert train.notes == ("a tenth of train is the test split, as there is no other",)


def test_one_table_without_splits_and_folders_of_files(tmp_path):
    table(range(10)).save_to_disk(tmp_path / "one")
    assert len(load_huggingface(tmp_path / "one", "train")) == 9
    (tmp_path / "parquet").mkdir()
    table(range(5)).to_parquet(tmp_path / "parquet" / "train.parquet")
    table(range(3)).to_parquet(tmp_path / "parquet" / "test.parquet")
    train = load_huggingface(tmp_path / "parquet", "train", HubSettings(size=2))
    assert (len(train), train.spec.image_shape, train.spec.class_names) == (5, (1, 2, 2), ("dog", "cat"))
    folder = tmp_path / "folder" / "train"
    folder.mkdir(parents=True)
    for i in range(10):
        picture(i, mode="RGB").save(folder / f"{i}.png")
    assert len(load_huggingface(tmp_path / "folder", "train")) == 9


def test_other_splits_are_said_and_hidden_labels_are_no_classes(save):
    path = save(train=range(4), test=table(range(2), kind=[-1, -1]), validation=range(2))
    with pytest.raises(
        DataError, match=r"2 images have no class where others have one: test/0, test/1; --set data.skip"
    ):
        load_huggingface(path, "train")
    assert load_huggingface(path, "train", HubSettings(skip_bad=True)).notes[0] == "skipped the splits validation"


def test_the_fingerprint_is_that_of_the_content(save, tmp_path):
    marks = [
        load_huggingface(save(train=rows, test=range(2)), "train", HubSettings(cache=cache)).fingerprint
        for rows in (range(4), range(1, 5))
        for cache in (0, 4)
    ]
    assert len(set(marks)) == 4


@pytest.mark.parametrize(
    ("splits", "settings", "message"),
    [
        ({"train": range(3)}, {"image": "text"}, r"has no column of images text .data.image.; there are picture"),
        ({"train": table(range(3), picture=None)}, {}, "has no column of images .data.image.; there are id, kind"),
        ({"train": range(3)}, {"label": "kinds"}, "data.label: there is no column kinds, but id, picture, kind"),
        ({"train": range(3)}, {"text": "txt"}, "data.text: there is no column txt, but id"),
        ({"train": range(3)}, {"text": "id"}, "data.text: the values of id must be strings, train/0 is 0"),
        ({"train": range(3)}, {"label": "picture"}, "data.label: the values of picture must be strings or integers"),
        ({"test": range(3)}, {}, "has no split train, but test"),
        ({"train": range(3), "test": table(range(3), said=None)}, {}, "the splits train, test have different columns"),
        ({"train": table(range(3), picture=[None] * 3)}, {}, r"3 of 3 images .* train/0 .no image in this row"),
    ],
)  # fmt: skip
def test_faults_are_named(save, splits, settings, message):
    path = save(**splits)
    with pytest.raises(DataError, match=message) as info:
        load_huggingface(path, "train", HubSettings(**settings))
    assert str(info.value).startswith(f"data set huggingface: {path}")


def test_names_of_the_hub_are_no_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data.absolute_spec("huggingface:owner/name") == "huggingface:owner/name"
    (tmp_path / "folder").mkdir()
    assert data.absolute_spec("huggingface:folder") == f"huggingface:{tmp_path.resolve()}/folder"
    with pytest.raises(DataError, match="data set huggingface: cannot load owner/of no such name"):
        data.load("huggingface:owner/of no such name", "train")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: asked.append(arguments) or table(range(20)))
    assert len(data.load("huggingface:owner/name", "train", {"subset": "small"})) == 18
    assert asked == [("owner/name", "small")]


def test_the_library_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the library datasets: pip install 'gencore\[huggingface\]'"):
        data.load("huggingface:owner/name", "train")


def test_damaged_bytes_are_named(save):
    features = datasets.Features({"picture": datasets.Image()})
    noise = np.random.default_rng(0).bytes(50)
    rows = [{"picture": {"bytes": content, "path": None}} for content in (noise, b"")]
    made = datasets.Dataset.from_list(rows, features)
    with pytest.raises(DataError, match=r"2 of 2 images cannot be read: train/\d \(no image of .* \(an empty file\)"):
        load_huggingface(save(train=made), "train")
