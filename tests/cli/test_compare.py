"""gencore compare."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from gencore.cli import compare


@pytest.fixture
def evaluated(gencore, trained, tmp_path):
    """Two runs that were measured."""
    for name in ("toy", "toy-sampler"):
        shutil.copytree(trained / name, tmp_path / name)
        options = ("--num-samples", 2, "-n", 40, "--limit", 20)
        assert gencore("evaluate", tmp_path / name, *options).code == 0
    return tmp_path


def test_a_table_and_a_picture(gencore, evaluated):
    out = evaluated / "c.png"
    result = gencore("compare", evaluated / "toy", evaluated / "toy-sampler", "--out", out)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0].split() == ["toy", "toy-sampler", "better"]
    told = json.loads((evaluated / "toy" / "evaluation.json").read_text())
    (bits,) = [line for line in lines if line.startswith("bits/dim at most, one draw")]
    # The sampler has no bound, so there is no best.
    assert bits.split()[-2:] == [f"{told['bound']['bits_per_dimension']:.4g}", "lower"]
    (distance,) = [line for line in lines if line.startswith("FD (classifier)")]
    assert distance.count("*") == 1
    assert Image.open(out).width > 500


def evaluation(value, interval, classes):
    figure = {"name": "FD (x)", "better": "lower", "value": value, "interval": interval}
    return {"measures": [{"figures": [figure]}], "classes": {"effective_classes": classes}}


def test_the_best_is_marked():
    measures = [
        evaluation(3.0, [2.0, 4.0], 9.5),
        evaluation(2.0, [1.0, 3.0], 9.0),
        evaluation(None, [None, None], None),
    ]
    rows = compare.compared(measures)
    assert compare.table(["a", "b", "c"], rows) == [
        ("", "a", "b", "c", "better"),
        ("effective classes", "9.5 *", "9", "", "higher"),
        ("FD (x)", "3", "2 *", "", "lower"),
    ]
    assert rows[1].intervals == ((2.0, 4.0), (1.0, 3.0), None)


def test_curves_of_measures_are_drawn():
    rows = [compare.Row("FD (x)", "lower", (1.0, None), ((0.5, 1.5), None))]
    curves = {
        "a": [{"step": 1, "measure/FD (x)": 3.0}, {"step": 2, "vae/loss": 1.0}, {"step": 3, "measure/FD (x)": 2.0}],
        "b": [{"step": 1, "vae/loss": 3.0}],
    }
    assert compare.drawn(["a", "b"], rows, curves)[:4] == b"\x89PNG"


def test_other_numbers_of_samples_are_said(gencore, evaluated):
    assert gencore("evaluate", evaluated / "toy", "--num-samples", 2, "-n", 30, "--limit", 20).code == 0
    result = gencore("compare", evaluated / "toy", evaluated / "toy-sampler")
    assert result.code == 0
    assert result.err == (
        "gencore: the runs were not measured by the same number of samples (toy: 30, toy-sampler: 40): "
        "figures differ by that too\n"
    )


def test_refuses(gencore, trained, tmp_path):
    shutil.copytree(trained / "toy", tmp_path / "toy")
    (tmp_path / "toy" / "evaluation.json").unlink(missing_ok=True)
    result = gencore("compare", tmp_path / "toy")
    line = f"gencore: {tmp_path / 'toy'} has not been measured; do it with: gencore evaluate {tmp_path / 'toy'}\n"
    assert (result.code, result.err) == (2, line)
    for content, message in (("{", "is damaged"), ("[]", "is no evaluation")):
        (tmp_path / "toy" / "evaluation.json").write_text(content)
        result = gencore("compare", tmp_path / "toy")
        assert (result.code, len(result.err.splitlines())) == (2, 1)
        assert message in result.err
    result = gencore("compare", tmp_path / "nothing")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
