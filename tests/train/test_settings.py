"""Settings by name: of whom they are, and from files."""

from __future__ import annotations

import json
import sys

import pytest

from gencore.config import ConfigError
from gencore.train import TrainConfig
from gencore.train.settings import Settings, apart, collect, data_settings, flat, over, read_file


def test_settings_by_what_they_set():
    given = {
        "lr": 0.1,
        "train.steps": "5",
        "train": {"seed": 3, "average": {"decay": 0.5}},
        "data": {"size": 64},
        "data.flip": True,
        "optimizer": {"lr": 1, "betas": [0.9, 0.99]},
        "network.width": 8,
        "trains": 1,
        "train.average.begin": 2,
    }
    assert apart(given) == Settings(
        {"lr": 0.1, "optimizer.lr": 1, "optimizer.betas": [0.9, 0.99], "network.width": 8, "trains": 1},
        {"steps": "5", "seed": 3, "average.decay": 0.5, "average.begin": 2},
        {"size": 64, "flip": True},
    )
    assert apart({}) == Settings({}, {}, {})


def test_one_after_the_other_wins():
    base = apart({"lr": 1, "train": {"steps": 1, "seed": 2}})
    assert over(base, apart({"train.steps": 9, "width": 2})) == apart(
        {"lr": 1, "width": 2, "train.steps": 9, "train.seed": 2}
    )
    assert base == apart({"lr": 1, "train": {"steps": 1, "seed": 2}})


def test_nested_names():
    assert flat({"a": {"b": {"c": 1}, "d": 2}, "e": None, "f": {}}) == {"a.b.c": 1, "a.d": 2, "e": None}


def test_faults_are_collected():
    faults = ["before"]
    assert collect(TrainConfig, {"stepz": 1, "seed": -1}, {}, "train.", faults) is None
    assert faults[0] == "before"
    assert sorted(fault.split(":")[0] for fault in faults[1:]) == ["train.seed", "train.stepz"]
    config = collect(TrainConfig, {"average.decay": "0.5", "steps": 3}, {"seed": 4}, "train.", faults)
    assert (config.average.decay, config.steps, config.seed) == (0.5, 3, 4)
    assert len(faults) == 3


def test_a_group_may_be_switched_on_and_off():
    faults: list[str] = []
    with_average = TrainConfig.from_dict({"average": {}}).to_dict()
    assert with_average["average"] == {"decay": 0.999, "begin": 0, "every": 1}
    for none in (None, "none"):
        assert collect(TrainConfig, {"average": none}, with_average, "train.", faults).average is None
    assert faults == []


SETTINGS = {"lr": 0.1, "train": {"steps": 5, "average": {"decay": 0.9}}, "channels": [1, 2]}


def test_json(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(SETTINGS))
    assert read_file(path) == SETTINGS
    # As editors on Windows write it.
    (tmp_path / "other.conf").write_text(json.dumps(SETTINGS))
    assert read_file(tmp_path / "other.conf") == SETTINGS


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML is read by Python 3.11 and later")
def test_toml(tmp_path):
    path = tmp_path / "settings.TOML"
    path.write_text("lr = 0.1\nchannels = [1, 2]\n[train]\nsteps = 5\n[train.average]\ndecay = 0.9\n")
    assert read_file(path) == SETTINGS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "is no JSON"),
        ("a.json", b"{", "is no JSON"),
        ("a.json", b"\xff\xfe{", "is no JSON"),
        ("a.json", b"[" * 100_000, "is no JSON"),
        ("a.json", b"[1]", "must hold settings by name, but holds list"),
        ("a.json", b"3", "must hold settings by name, but holds int"),
        ("a.toml", b"lr = ", "is no TOML"),
        ("a.toml", b"\xff", "is no TOML"),
        ("a.toml", b'{"lr": 1}', "is no TOML"),
    ],
)
def test_files_that_are_none(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_file(tmp_path / name)
    (fault,) = caught.value.faults
    assert str(tmp_path / name) in fault
    assert message in fault
    assert "\n" not in fault


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "nowhere.json")
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path)


def test_toml_without_a_reader(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomllib", None)
    (tmp_path / "a.toml").write_text("lr = 1\n")
    with pytest.raises(ConfigError, match=r"a\.toml: TOML can be read by Python 3\.11 and later; write it as JSON"):
        read_file(tmp_path / "a.toml")


def test_settings_of_data(environment):
    assert data_settings(None, "bars", {}) == {}
    with pytest.raises(ConfigError) as caught:
        data_settings(None, "bars", {"size": 3}, ["hidden: is wrong"])
    assert list(caught.value.faults) == ["hidden: is wrong", "data.size: is not a setting; data set bars has none"]
    assert data_settings(None, "images:somewhere", {"size": "8"})["size"] == 8
