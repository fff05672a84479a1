import pytest
import torch
from data.pictures import decoded, png, write_folder

from gencore.data import DataError, MissingSplitError
from gencore.data.images import load_images

SPLITS = {"train": "cat", "test": "dog"}


def set_of(train, test, inside=("cat/", "dog/"), count=2):
    """Files of two splits: the pixels of train are all 10, those of test all 200."""
    return {
        f"{folder}/{kind}{i}.png": png(value=value)
        for folder, value in ((train, 10), (test, 200))
        for kind in inside
        for i in range(count)
    }


def values(path, split):
    data = load_images(path, split)
    return sorted(set(data.images.flatten().tolist())), len(data)


def test_train_and_test_folders(make):
    files = {f"{split}/{name}/{i}.png": png() for split in ("train", "test") for name in ("cat", "ape") for i in "01"}
    data = load_images(make(files), "test")
    assert data.spec.class_names == ("ape", "cat")
    assert data.spec.image_shape == (3, 3, 4)
    assert data.labels.tolist() == [0, 0, 1, 1]
    expected = [files[f"test/{name}/{i}.png"] for name in ("ape", "cat") for i in "01"]
    assert torch.equal(data.images, torch.stack([decoded(content) for content in expected]))
    assert data.name == "pictures"
    assert data.notes == ()


@pytest.mark.parametrize("wrapper", ["", "top/", "top/deeper/"])
def test_split_is_disjoint_stratified_and_stable(make, wrapper):
    files = {f"{wrapper}{name}/{i:02}.png": png("L") for name in ("a", "b") for i in range(20)}
    path = make(files)
    train, test = load_images(path, "train"), load_images(path, "test")
    assert train.labels.bincount().tolist() == [18, 18]
    assert test.labels.bincount().tolist() == [2, 2]
    assert train.spec.image_shape == (1, 3, 4)
    both = {image.numpy().tobytes() for data in (train, test) for image in data.images}
    assert len(both) == 40
    # The same files, whatever lies around them and wherever.
    names = {name for name, content in files.items()
             if any(torch.equal(decoded(content)[:1], image) for image in test.images)}  # fmt: skip
    assert names == {f"{wrapper}{name}" for name in ("a/04.png", "a/14.png", "b/03.png", "b/10.png")}


def test_classes_are_those_of_both_splits(make):
    data = load_images(make({"train/b/1.png": png(), "test/a/1.png": png(), "test/b/1.png": png()}), "train")
    assert data.spec.class_names == ("a", "b")
    assert data.labels.tolist() == [1]


@pytest.mark.parametrize("prefix", ["", "one folder/"])
def test_flat_images_have_no_classes(make, prefix):
    data = load_images(make({f"{prefix}{i}.png": png() for i in range(10)}), "train")
    assert (len(data), data.spec.num_classes, data.labels) == (9, 0, None)


@pytest.mark.parametrize("inside", [("cat/", "dog/"), ("",)])
@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "test"),
        ("Training", "Testing"),
        ("TRAIN", "TEST"),
        ("training", "val"),
        ("Train", "Val"),
        ("train", "valid"),
        ("train", "Validation"),
        ("data/train", "data/dev"),
    ],
)
def test_names_of_splits(make, train, test, inside):
    path = make(set_of(train, test, inside))
    count = 2 * len(inside)
    assert (values(path, "train"), values(path, "test")) == (([10], count), ([200], count))
    assert load_images(path, "train").spec.class_names == (("cat", "dog") if len(inside) == 2 else ())


def test_validation_beside_test_is_left_out_and_said(make):
    files = {**set_of("train", "test"), "Val/cat/1.png": png(value=90)}
    path = make(files)
    assert (values(path, "train"), values(path, "test")) == (([10], 4), ([200], 4))
    assert load_images(path, "train").notes == ("skipped 1 image in Val: test is the test split",)


def test_folders_inside_a_class_belong_to_it(make):
    data = load_images(
        make({f"{name}/{i}.png": png() for name in ("cat/small", "cat/large/old", "dog") for i in "123"}), "train"
    )
    assert data.labels.bincount().tolist() == [5, 2]


def test_labels_can_be_left_out(make):
    path = make({f"{name}/{i}.png": png() for name in "ab" for i in range(3)})
    assert load_images(path, "train").spec.num_classes == 2
    data = load_images(path, "train", labelled=False)
    assert (len(data), data.labels, data.spec.num_classes) == (4, None, 0)


def test_folders_without_an_image_are_named(make):
    path = make(
        {"cat/1.png": png(), "cat/2.png": png(), "dog/1.heic": b"x", "dog/old/2.heic": b"x", "list/a.TXT": b"x"}
    )
    assert load_images(path, "train").notes == (
        "skipped 3 files without an image suffix: .heic 2, .txt 1",
        "2 folders hold no image: dog, list",
    )


def test_an_empty_folder_is_named(tmp_path):
    path = write_folder(tmp_path, {"cat/1.png": png(), "cat/2.png": png(), "dog/": b""})
    assert load_images(path, "train").notes == ("1 folder holds no image: dog",)


def test_classes_that_differ_in_case_alone_are_said(make):
    data = load_images(make({f"{name}/{i}.png": png() for name in ("Cat", "cat", "dog") for i in "12"}), "train")
    assert data.spec.class_names == ("Cat", "cat", "dog")
    assert data.notes == ("classes differ in upper and lower case alone: Cat and cat",)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["notes.txt"], "has no images; skipped 1 file without an image suffix: .txt 1"),
        (["1.png", "2.png", "a/1.png"], "2 images beside the class folders, in none of them: 1.png, 2.png"),
        (["train/a/1.png", "train/b/1.png", "test/1.png"], "has class folders in one split, but not in test"),
        (["train/a/1.png", "train/b/1.png", "VAL/1.png"], "has class folders in one split, but not in VAL"),
        (
            ["train/a/1.png", "test/a/1.png", "extra/a/1.png", "cat/1.png"],
            "folders beside train that may be classes or splits: cat, extra; beside it there may be test, testing, val",
        ),
        (["train/1.png", "Training/1.png", "test/1.png"], "folders that mean the same split: Training, train"),
        (["train/1.png", "val/1.png", "valid/1.png"], "folders that mean the same split: val, valid"),
        (["test/1.png", "val/1.png"], "has the folders test, val, but none that is called train"),
        (["cat/1.png", "dog/1.png", "Test/1.png"], "has the folder Test, but none that is called train"),
        (["test_2017/1.png", "val_2017/1.png"], "has the folders test_2017, val_2017, but none that is called train"),
        (["train2017/1.png", "val2017/1.png"], "look like splits: train2017, val2017; if they are splits"),
        (["train/1.png", "extra/1.png"], "folders beside train that may be classes or splits: extra;"),
        (["train/1.png", "bus/1.png", "mytest/1.png"], "folders beside train that may be .*: bus, mytest;"),
        (["trainA/1.png", "trainB/1.png", "testA/1.png"], "folders that look like splits: trainA, trainB, testA;"),
        (["cat/train/1.png", "dog/test/1.png"], "folders inside other folders that look like splits: train, test;"),
        (["cat/x/y/my_train/1.png", "dog/my_test/1.png"], "inside other folders that look .*: my_train, my_test;"),
    ],
)  # fmt: skip
def test_folders_that_do_not_fit_together(make, names, message):
    path = make({name: png() for name in names})
    for split in SPLITS:
        with pytest.raises(DataError, match=message) as info:
            load_images(path, split)
        assert str(path) in str(info.value)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("trainset", "testset"),
        ("traindata", "testdata"),
        ("1_train", "2_test"),
        ("my_train", "my_test"),
        ("xtrain", "xtest"),
        ("X_train", "X_test"),
        ("train_images", "val_images"),
        ("Train_Set", "Test_Set"),
        ("Training Set", "Test Set"),
        ("dataset-train", "dataset-test"),
        ("DatasetTrain", "DatasetTest"),
        ("TRAINset", "TESTset"),
        ("trainImages", "validationImages"),
        ("train80", "20test"),
        ("trainval", "test"),
        ("train.full", "evaluation"),
        ("seg_train", "dev"),
        ("mytrain", "mytest"),
        ("catstrain", "catsvalid"),
        ("train-été", "test-été"),
        ("trn", "tst"),
    ],
)
@pytest.mark.parametrize("more", [(), ("more/1.png",)], ids=["alone", "more"])
def test_folders_that_look_like_splits_are_no_classes(make, train, test, more):
    path = make({**set_of(train, test), **{name: png() for name in more}})
    with pytest.raises(DataError, match=r"look like splits: .*; if they are splits, call them train and test") as info:
        load_images(path, "train")
    assert train in str(info.value)
    assert test in str(info.value)


@pytest.mark.parametrize(
    "names",
    [
        ("trainer", "tests", "valley"),
        ("trainer", "tester"),
        ("training_shoes", "boots"),
        ("bullet_train", "bus", "contest"),
        ("strain", "restaurant", "carnival"),
        ("test_tube", "beaker"),
        ("valid", "invalid"),
        ("trainA", "trainB"),
    ],
)
def test_classes_that_are_called_nearly_like_splits(make, names):
    path = make({f"{name}/{i}.png": png() for name in names for i in "12"})
    data = load_images(path, "train")
    assert (data.spec.class_names, data.notes) == (tuple(sorted(names)), ())


def test_train_may_be_a_class_of_vehicles(make):
    data = load_images(make({f"{name}/{i}.png": png() for name in ("bus", "car", "train") for i in "12"}), "train")
    assert data.spec.class_names == ("bus", "car", "train")
    assert data.notes == ("train is a class, as there is no test folder beside it, but bus, car",)


def test_one_image_has_no_test_split(make):
    path = make({"1.png": png()})
    assert len(load_images(path, "train")) == 1
    with pytest.raises(MissingSplitError, match="has no test images"):
        load_images(path, "test")
