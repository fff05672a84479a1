"""gencore data."""

import io
import json

import numpy as np
import pytest
from PIL import Image


def picture(value, size=(6, 4)):
    stream = io.BytesIO()
    Image.new("RGB", size, value).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Two classes in two splits, with captions."""
    rows = []
    for split, count in (("train", 3), ("test", 1)):
        for label in ("cat", "dog"):
            for i in range(count):
                name = f"{split}/{label}{i}.png"
                (tmp_path / "set" / split).mkdir(parents=True, exist_ok=True)
                (tmp_path / "set" / name).write_bytes(picture((200, 0, 0) if label == "cat" else (0, 0, 200)))
                rows.append({"file_name": name, "text": f"a {label}\n{i}", "kind": label})
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "set"


def test_a_data_set_is_described(gencore, folder):
    result = gencore("data", f"images:{folder}", "--set", "data.label=kind")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == "set: 6 train images 3x4x6, 2 classes, text"
    assert lines[1] == "  label: cat 3, dog 3"
    assert lines[2] == r"  text: 6 of 6 images, 6 different: 'a cat\n0', 'a cat\n1', 'a cat\n2', ..."
    assert lines[3].startswith("  fingerprint: ")
    assert lines[4] == "set: 2 test images 3x4x6, 2 classes, text"
    assert len(lines) == 8


def test_as_json(gencore, folder, tmp_path):
    out = tmp_path / "grid.png"
    result = gencore("data", f"images:{folder}", "--set", "data.label=kind", "--split", "test", "--json", "--out", out)
    assert (result.code, result.err) == (0, "")
    told = json.loads(result.out)
    assert told["settings"]["label"] == "kind"
    assert list(told["splits"]) == ["test"]
    assert told["splits"]["test"]["class_counts"] == {"label": {"cat": 1, "dog": 1}}
    assert out.is_file()


def test_a_picture_is_drawn(gencore, folder, tmp_path):
    out = tmp_path / "grid.png"
    result = gencore("data", f"images:{folder}", "--set", "data.label=kind", "-n", 2, "--out", out)
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[-1] == f"{out}: 2 train images of set"
    pixels = np.asarray(Image.open(out)).astype(int)
    assert ((pixels[..., 0] > 150) & (pixels[..., 2] < 50)).any()
    assert ((pixels[..., 2] > 150) & (pixels[..., 0] < 50)).any()
    plain = gencore("data", "digits", "-n", 4, "--out", out, "--split", "test")
    assert plain.out.splitlines()[-1] == f"{out}: 4 test images of digits"


def test_a_missing_split_is_said(gencore, tmp_path):
    (tmp_path / "1.png").write_bytes(picture(9))
    result = gencore("data", f"images:{tmp_path}")
    assert result.code == 0
    assert "has no test images" in result.err
    assert len(result.out.splitlines()) == 2
    result = gencore("data", f"images:{tmp_path}", "--split", "test")
    assert result.code == 2
    assert "has no test images" in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no such set",), "no data set plugin is called 'no such set'"),
        (("images:nowhere",), "data set images: nowhere does not exist"),
        (("images",), "data set images needs a path: images:PATH"),
        (("digits", "--set", "data.size=8"), "data.size: is not a setting; data set digits has none"),
        (("digits", "--set", "lr=8"), "--set lr: this command takes settings of the data set, data.NAME"),
        (("images:x", "--set", "data.crop=random"), "data.crop: must be center without a size"),
        (("digits", "--out", "x.jpg"), "pictures are written as PNG, got a name in .jpg"),
    ],
)
def test_faults_are_one_line(gencore, arguments, message):
    result = gencore("data", *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert "Traceback" not in result.err


def test_splits_that_differ_are_refused(gencore, tmp_path):
    for split, color in (("trainA", 1), ("trainB", 2), ("testA", 3), ("testB", 4)):
        (tmp_path / split).mkdir()
        (tmp_path / split / "1.png").write_bytes(picture((color, 0, 0)))
    assert gencore("data", f"domains:{tmp_path}").code == 0
    (tmp_path / "testB" / "1.png").unlink()
    assert "no image of the same name" in gencore("data", f"pairs:{tmp_path}").err
