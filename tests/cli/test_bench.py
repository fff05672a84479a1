"""``gencore bench``: what it prints and writes, its exit codes, and what it refuses before it measures anything."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from gencore.bench import limits, run
from gencore.bench.results import Limits, read
from gencore.cli import bench as command
from gencore.cli import main

TABLE = {
    "uniform": [{"shape": [2, 33]}],
    "normal": [{"shape": [2, 33]}, {"shape": [1, 3, 5, 7], "layout": "channels_last"}],
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few rounds, and limits that are not measured: other tests do."""
    monkeypatch.setattr(limits, "measured", lambda device: Limits(2e11, 1e11, {"float32": 1e12}, 1e9))
    monkeypatch.setattr(limits, "copy_bandwidth", lambda nbytes, threads, device: 1e9)
    monkeypatch.setattr(limits, "_core", lambda level: (1e9, 1e9))
    monkeypatch.setattr(run, "QUICK", run.QUICK._replace(rounds=5, budget=0.01))


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps(TABLE))
    return str(path)


def bench(table, *arguments):
    return main(["bench", "--quick", "--device", "cpu", "--shapes", table, *map(str, arguments)])


def test_a_report_and_a_page_are_written(table, tmp_path, capsys):
    before = torch.get_num_threads()
    report, page = tmp_path / "deep" / "report.json", tmp_path / "page.html"
    assert bench(table, "normal", "uniform", "--threads", 1, "--json", report, "--html", page) == 0
    told = read(report)
    assert [result.op for result in told.results] == ["normal", "uniform"]
    assert told.machine["threads"] == 1
    assert torch.get_num_threads() == before
    out = capsys.readouterr().out
    assert "ours is faster in" in out
    assert "of the floor" in out
    assert str(report) in out
    for result in told.results:
        assert result.case in out
        assert result.case in page.read_text()


def test_a_dtype_takes_the_place_of_those_of_the_op(table, tmp_path):
    assert bench(table, "normal", "--dtype", "float64", "--json", tmp_path / "a.json") == 0
    assert {result.dtype for result in read(tmp_path / "a.json").results} == {"float64"}


def slower(report, factor):
    """The report of a time when ours was ``factor`` times as fast against its peers."""

    def candidate(one):
        if one.name == "ours":
            return one
        low, high = one.ratio_interval
        return dataclasses.replace(one, ratio=factor * one.ratio, ratio_interval=(factor * low, factor * high))

    results = [
        dataclasses.replace(
            result,
            candidates=tuple(candidate(one) for one in result.candidates),
            floor_seconds=factor * result.floor_seconds,
        )
        for result in report.results
    ]
    return dataclasses.replace(report, results=tuple(results))


def test_a_loss_gives_exit_code_1_and_a_table(table, tmp_path, capsys):
    path, old = tmp_path / "now.json", tmp_path / "old.json"
    assert bench(table, "uniform", "--json", path) == 0
    slower(read(path), 1e6).write(old)
    capsys.readouterr()
    assert bench(table, "uniform", "--compare", old) == 1
    out = capsys.readouterr().out
    assert "measured again" in out
    assert "lost" in out
    assert "1 lost more than 15%" in out
    slower(read(path), 1e-6).write(old)
    assert bench(table, "uniform", "--compare", old) == 0
    assert "1 gained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["groupnorm"], "op must be one of"),
        (["--dtype", "float8"], "--dtype must be some of"),
        (["--shapes", "nothing-such"], "--shapes must be timed, all, "),
        (["--compare", "missing.json"], "missing.json"),
        (["--threads", "0"], "threads"),
        (["--json", "."], "it is a folder"),
        (["--shapes", "mnist-vae", "group_norm"], "nothing is left to run"),
    ],
)
def test_mistakes_are_said_before_anything_is_measured(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(run, "run", lambda *args: pytest.fail("something was measured"))
    assert main(["bench", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_file_is_refused(tmp_path, capsys):
    path = tmp_path / "old.json"
    path.write_text("{}")
    assert main(["bench", "--compare", str(path)]) == 2
    assert "is no report of gencore bench" in capsys.readouterr().err
    path.write_text('{"group_norm": [{"shape": [2, 3], "colour": 1}]}')
    assert main(["bench", "--shapes", str(path)]) == 2
    assert "colour" in capsys.readouterr().err


def test_a_report_with_no_case_of_the_run_is_refused_before_it(table, tmp_path, capsys, monkeypatch):
    path = tmp_path / "old.json"
    assert bench(table, "uniform", "--json", path) == 0
    monkeypatch.setattr(run, "run", lambda *args: pytest.fail("something was measured"))
    assert bench(table, "normal", "--compare", path) == 2
    assert "none of the cases" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_what_cannot_be_written_is_refused_before_the_run(option, table, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "run", lambda *args: pytest.fail("something was measured"))
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "report"):
        assert bench(table, "normal", option, path) == 2
        assert f"{option}: {path} cannot be written" in capsys.readouterr().err


@pytest.fixture
def interrupted_at(monkeypatch):
    """``interrupted_at(n)``: the n-th task that is run, counted from 1, meets Control-C."""

    def at(number):
        calls = []
        result_of = run._Runner.result

        def interrupted(self, task):
            calls.append(task)
            if len(calls) == number:
                raise KeyboardInterrupt
            return result_of(self, task)

        monkeypatch.setattr(run._Runner, "result", interrupted)

    return at


def test_an_interrupted_run_writes_what_is_there(table, tmp_path, interrupted_at, capsys):
    path, page = tmp_path / "report.json", tmp_path / "page.html"
    interrupted_at(2)
    assert bench(table, "normal", "uniform", "--json", path, "--html", page) == 130
    told = read(path)
    assert [result.op for result in told.results] == ["normal"]
    assert not told.settings["complete"]
    assert page.exists()
    assert "interrupted after 1 of 2" in capsys.readouterr().out


def test_a_run_interrupted_before_its_first_result_leaves_the_old_report(table, tmp_path, interrupted_at):
    path = tmp_path / "report.json"
    assert bench(table, "normal", "--json", path) == 0
    before = path.read_bytes()
    interrupted_at(1)
    assert bench(table, "normal", "--json", path) == 130
    assert path.read_bytes() == before


def test_the_report_is_written_before_what_lost_is_measured_again(table, tmp_path, monkeypatch):
    path, old = tmp_path / "now.json", tmp_path / "old.json"
    assert bench(table, "uniform", "--json", old) == 0
    slower(read(old), 1e6).write(old)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_compared", interrupted)
    assert bench(table, "uniform", "--json", path, "--compare", old) == 130
    assert read(path).settings["complete"]


def test_nobody_needs_to_read_what_is_printed(table, tmp_path):
    """``gencore bench | true``, and an output that has no micro sign."""
    path = tmp_path / "report.json"
    program = "import sys; from gencore.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["bench", "uniform", "--quick", "--device", "cpu", "--shapes", table, "--json", str(path)]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": "1"},
    )
    process.stdout.close()
    _, errors = process.communicate()
    assert b"Traceback" not in errors
    assert len(read(path).results) == 1
