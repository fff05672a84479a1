"""What is shown of a long task."""

from __future__ import annotations

import itertools

from gencore import progress
from gencore.progress import Progress


def test_a_line_every_so_often_where_there_is_no_terminal(monkeypatch, capsys):
    clock = itertools.count(step=20)
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with Progress(1000, 400, name="vae", unit="step") as shown:
        shown.update(200)
        assert capsys.readouterr().err == ""
        shown.figures({"likelihood": 12.3456})
        shown.update(200)
        line = capsys.readouterr().err
        assert line.startswith("vae: step 800 of 1,000 (80%), ")
        assert line.endswith(" left; likelihood 12.35\n")
        # What is done has its own last word.
        shown.update(200)
    assert capsys.readouterr().err == ""


def test_nothing_where_nothing_is_wanted(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    with Progress(10, name="vae", unit="step", shown=False) as shown:
        shown.update(1)
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    with Progress(10, name="vae", unit="step") as shown:
        shown.figures({"critic": 2.0})
        shown.update(10)
    err = capsys.readouterr().err
    assert "vae" in err
    assert "10/10" in err
    assert "critic 2" in err


def test_a_bar_only_for_what_takes_longer(monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    with Progress(10, name="vae", unit="step", delay=60) as shown:
        shown.update(10)
    assert capsys.readouterr().err == ""
