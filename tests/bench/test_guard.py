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
    there = dataclasses.replace(here, machine=here.machine | {"name": "another"})
    return tmp_path, calls, here, there


@pytest.mark.skipif(guard.DEVICE != "cpu", reason="there is a GPU, which is held against results of its own")
def test_the_results_of_such_a_machine_are_held_against(results, capsys):
    folder, calls, here, there = results
    there.write(folder / "b.json")
    assert guard.guard([]) == 2
    assert not calls
    assert "nothing to hold against" in capsys.readouterr().err
    here.write(folder / "a.json")
    here.write(folder / "c.json")
    assert guard.guard([]) == 7
    assert guard.guard(["--json", "now.json", "group_norm"]) == 7
    whole, named = calls
    assert whole[1 : 1 + len(suite.OPS)] == list(suite.OPS)
    assert not set(suite.OPS) & set(named[:-1])
    assert named[-1] == "group_norm"
    for call in calls:
        assert call[call.index("--threads") + 1] == str(here.machine["threads"])
        against = [call[i + 1] for i, option in enumerate(call) if option == "--compare"]
        assert against == [str(folder / "a.json"), str(folder / "c.json")]
        assert "--no-compile" in call
