"""gencore runs."""

from __future__ import annotations

import datetime
import json
import os
import shutil

import pytest

from gencore.train import checkpoint
from gencore.train.log import read_metrics

SETTINGS = ("train.log_every=2", "train.validate_every=2", "train.checkpoint_every=3", "train.keep=9")


@pytest.fixture(scope="module")
def made(toy_environment, tmp_path_factory):
    """``b/toy``, which is validated, and ``a/deep/sampler``, beside what is no run; tests do not change it."""
    from gencore.cli import main

    folder = tmp_path_factory.mktemp("runs")
    options = ["--data", "bars", "--batch-size", "20", *(o for s in SETTINGS for o in ("--set", s))]
    assert main(["train", "toy", *options, "--steps", "7", "--out", str(folder / "b" / "toy")]) == 0
    options = ["--data", "bars", "--batch-size", "20", "--epochs", "2", "--out", str(folder / "a" / "deep" / "sampler")]
    assert main(["train", "toy-sampler", *options]) == 0
    (folder / "a" / "empty").mkdir()
    (folder / "notes.txt").write_text("no run")
    return folder


def told(gencore, folder):
    result = gencore("runs", folder, "--json")
    assert (result.code, result.err) == (0, "")
    return json.loads(result.out)


def test_a_table_of_runs(gencore, made):
    result = gencore("runs", made)
    assert (result.code, result.err) == (0, "")
    header, sampler, toy = result.out.splitlines()
    names = ("run", "model", "data", "step", "losses", "best validation loss", "seconds", "saved")
    places = [header.index(name) for name in names]
    assert places == sorted(places)
    assert header.split() == " ".join(names).split()

    def cells(row):
        return [row[first:last].strip() for first, last in zip(places, [*places[1:], None], strict=True)]

    last = read_metrics(made / "b" / "toy" / "metrics.jsonl")[-1]
    validated = {
        record["step"]: record["validation/critic/loss"]
        for record in read_metrics(made / "b" / "toy" / "metrics.jsonl")
        if "validation/critic/loss" in record
    }
    best = min(validated, key=validated.__getitem__)
    newest = checkpoint.checkpoints(made / "b" / "toy")[-1] / "checkpoint.json"
    assert cells(toy) == [
        str(made / "b" / "toy"),
        "toy",
        "bars",
        "7 of 7",
        f"critic {last['critic/loss']:.4g}, autoencoder {last['autoencoder/loss']:.4g}",
        f"critic {validated[best]:.4g} at step {best}",
        f"{last['seconds']:.0f}",
        datetime.datetime.fromtimestamp(newest.stat().st_mtime).strftime("%Y-%m-%d %H:%M"),
    ]
    told_of_sampler = cells(sampler)
    assert told_of_sampler[:4] == [str(made / "a" / "deep" / "sampler"), "toy-sampler", "bars", "6 of 6"]
    assert (told_of_sampler[4].startswith("mean 0."), told_of_sampler[5]) == (True, "")


def test_json_tells_the_same(gencore, made):
    sampler, toy = told(gencore, made)
    assert (sampler["run"], toy["run"]) == (str(made / "a" / "deep" / "sampler"), str(made / "b" / "toy"))
    assert (sampler["step"], sampler["total"], sampler["best"], sampler["fault"]) == (6, 6, None, None)
    records = read_metrics(made / "b" / "toy" / "metrics.jsonl")
    assert toy["losses"] == {name: records[-1][f"{name}/loss"] for name in ("critic", "autoencoder")}
    assert toy["best"]["loss"] == min(record["validation/critic/loss"] for record in records)
    assert (toy["best"]["phase"], toy["seconds"], toy["checkpoint"]) == ("critic", records[-1]["seconds"], 7)
    newest = checkpoint.checkpoints(made / "b" / "toy")[-1] / "checkpoint.json"
    assert datetime.datetime.fromisoformat(toy["saved"]).timestamp() == int(newest.stat().st_mtime)


def test_a_run_itself_is_a_folder_with_one_run(gencore, made, monkeypatch):
    monkeypatch.chdir(made / "b")
    assert [each["run"] for each in told(gencore, "toy")] == ["toy"]
    assert [each["run"] for each in told(gencore, ".")] == ["toy"]
    # Folders of a run are no runs, and checkpoints are not looked through.
    (made / "b" / "toy" / "checkpoints" / "run.json").write_text("{}")
    assert [each["run"] for each in told(gencore, ".")] == ["toy"]
    (made / "b" / "toy" / "checkpoints" / "run.json").unlink()


def test_the_default_folder_is_runs(gencore, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert gencore("runs") == (2, "", "gencore: there is no folder runs\n")
    os.mkdir("runs")
    assert gencore("runs") == (0, "there is no run in runs\n", "")
    assert told(gencore, "runs") == []
    shutil.copytree(made / "b" / "toy", "runs/one")
    assert gencore("runs").out.splitlines()[1].split()[:4] == ["runs/one", "toy", "bars", "7"]


def test_a_run_on_its_way(gencore, made, tmp_path):
    """Killed at step 5 after the checkpoint of step 3; and begun, but without any checkpoint."""
    for name in ("killed", "begun"):
        shutil.copytree(made / "b" / "toy", tmp_path / name)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / name / "metrics.jsonl").write_text("".join(lines[:2]) + '{"step": 5, "crit')
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step-00000006")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step-00000007")
    shutil.rmtree(tmp_path / "begun" / "checkpoints")
    begun, killed = told(gencore, tmp_path)
    assert (killed["step"], killed["total"], killed["checkpoint"], killed["fault"]) == (4, 7, 3, None)
    assert (begun["step"], begun["checkpoint"], begun["saved"], begun["fault"]) == (4, None, None, None)
    (tmp_path / "begun" / "metrics.jsonl").unlink()
    assert gencore("runs", tmp_path).out.splitlines()[2].endswith(", step 3")
    row = gencore("runs", tmp_path / "begun").out.splitlines()[1]
    assert row.split() == [str(tmp_path / "begun"), "toy", "bars", "0", "of", "7"]


def test_figures_that_are_none_are_said_so(gencore, made, tmp_path):
    shutil.copytree(made / "b" / "toy", tmp_path / "run")
    record = {"step": 7, "seconds": "much", "critic/loss": None, "autoencoder/loss": float("nan")}
    record["validation/critic/loss"] = True
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(record) + "\n[1]\n{}\n")
    (run,) = told(gencore, tmp_path)
    assert (run["losses"], run["best"], run["seconds"]) == ({"critic": None, "autoencoder": None}, None, None)
    assert "critic not finite, autoencoder not finite" in gencore("runs", tmp_path).out


def test_a_model_without_training(gencore, tmp_path):
    assert gencore("train", "toy-mean", "--data", "bars", "--steps", 4, "--out", tmp_path / "run").code == 0
    (run,) = told(gencore, tmp_path)
    assert (run["step"], run["total"], run["losses"], run["checkpoint"]) == (0, 0, {}, 0)


@pytest.mark.parametrize(
    ("file", "content", "fault", "model"),
    [
        ("run.json", "{", "run.json is damaged: it is no JSON", None),
        ("run.json", "[" * 100_000, "run.json is damaged: it is no JSON", None),
        ("run.json", '{"format": 99}', "run.json was written by a newer gencore", None),
        ("run.json", '{"format": 2}', "run.json was written by an older gencore", None),
        ("run.json", '{"format": 3}', "run.json is damaged: it does not describe a run", None),
        ("checkpoints/step-00000007/checkpoint.json", "{}", "checkpoint.json is damaged: it names no format", "toy"),
        ("checkpoints/step-00000007/checkpoint.json", None, "checkpoint.json is missing", "toy"),
        ("metrics.jsonl", "FOLDER", "metrics.jsonl: Is a directory", "toy"),
    ],
)
def test_a_damaged_run_is_listed_with_the_reason(gencore, made, tmp_path, file, content, fault, model):
    for name in ("bad", "good"):
        shutil.copytree(made / "b" / "toy", tmp_path / name)
    (tmp_path / "bad" / file).unlink()
    if content == "FOLDER":
        (tmp_path / "bad" / file).mkdir()
    elif content is not None:
        (tmp_path / "bad" / file).write_text(content)
    bad, good = told(gencore, tmp_path)
    assert (good["fault"], good["step"]) == (None, 7)
    assert fault in bad["fault"]
    assert bad["model"] == model
    result = gencore("runs", tmp_path)
    assert (result.code, result.err, len(result.out.splitlines())) == (0, "", 3)
    assert result.out.splitlines()[1].rstrip().endswith(bad["fault"])


def test_names_are_shown_on_one_line(gencore, made, tmp_path):
    shutil.copytree(made / "b" / "toy", tmp_path / "a\nb")
    result = gencore("runs", tmp_path)
    assert (result.code, len(result.out.splitlines())) == (0, 2)
