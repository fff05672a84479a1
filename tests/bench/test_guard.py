"""``make bench-guard``: it holds a machine against the committed results of its kind, and against no other's."""

from __future__ import annotations

import dataclasses

import pytest
from bench import reports
from bench.test_document import load

from gencore.bench import machine, suite

guard = load("guard")


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results, and what the command line is called with."""
    calls: list[list[str]] = []
    monkeypatch.setattr(guard, "RESULTS", tmp_path)
    monkeypatch.setattr(guard, "main", lambda arguments: calls.append(arguments) or 7)
    here = dataclasses.replace(reports.report(), machine=machine.describe("cpu"))
    there = dataclasses.replace(here, machine=here.machine | {"threads": 1000})
    return tmp_path, calls, here, there


@pytest.mark.skipif(guard.DEVICE != "cpu", reason="there is a GPU, which is held against results of its own")
def test_the_results_of_such_a_machine_are_held_against(results, capsys):
    folder, calls, here, there = results
    there.write(folder / "b.json")
    assert guard.guard([]) == 2
    assert not calls
    assert "nothing to hold against" in capsys.readouterr().err
    here.write(folder / "a.json")
    assert guard.guard([]) == 7
    assert guard.guard(["group_norm", "--json", "now.json"]) == 7
    whole, named = calls
    assert whole[1 : 1 + len(suite.OPS)] == list(suite.OPS)
    assert named[:2] == ["bench", "group_norm"]
    for call in calls:
        assert call[call.index("--compare") + 1] == str(folder / "a.json")
        assert "--no-compile" in call
