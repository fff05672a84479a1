"""The report's file: what is written is read again, and what is no report is refused with a reason."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from bench import reports

from gencore.bench.results import ReportError, read


def test_a_report_survives_its_file(tmp_path):
    report = reports.report()
    report.write(tmp_path / "report.json")
    found = read(tmp_path / "report.json")
    # As JSON, where a NaN is equal to itself.
    assert json.loads(found.to_json()) == json.loads(report.to_json())
    assert found.results[0] == report.results[0]


def test_infinity_is_kept_in_standard_json(tmp_path):
    report = reports.report()
    first = report.results[0]
    broken = dataclasses.replace(first.candidates[1], error=math.inf)
    result = dataclasses.replace(first, candidates=(first.ours, broken), tolerance=1e-5)
    dataclasses.replace(report, results=(result,)).write(tmp_path / "report.json")
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    found = read(tmp_path / "report.json").results[0]
    assert found.candidates[1].error == math.inf
    assert not found.agrees(found.candidates[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told: told.update(format="other"), "no report of gencore bench"),
        (lambda told: told.update(version=99), "version 99"),
        (lambda told: told.pop("limits"), "damaged.*limits"),
        (lambda told: told.update(more=1), "Report has no more"),
        (lambda told: told.update(results={}), "a list was expected"),
        (lambda told: told["results"][0].update(section="other"), "one of .* was expected"),
        (lambda told: told["results"][0].update(nbytes="much"), "int was expected, got 'much'"),
        (lambda told: told["results"][0]["candidates"][0].update(interval=[1.0]), "damaged"),
        (lambda told: told["results"][0]["candidates"][0].update(seconds=True), "a number was expected"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path, change, message):
    told = json.loads(reports.report().to_json())
    change(told)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(told))
    with pytest.raises(ReportError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(ReportError, match="is no JSON"):
        read(tmp_path / "report.json")
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(ReportError, match="no report"):
        read(tmp_path / "report.json")


def test_the_best_peer_is_the_fastest_that_computes_the_same_and_is_no_other_form_of_ours():
    result = reports.report().results[0]
    peer = result.candidates[1]
    rows = [("slow", 3.0, None), ("wrong", 0.1, 1.0), ("ours, compiled", 0.5, None), ("fast", 1.5, 1e-7)]
    peers = [dataclasses.replace(peer, name=name, ratio=ratio, error=error) for name, ratio, error in rows]
    changed = dataclasses.replace(result, candidates=(result.ours, *peers), tolerance=1e-5)
    assert changed.best_peer is not None
    assert changed.best_peer.name == "fast"
    assert dataclasses.replace(result, candidates=(result.ours,)).best_peer is None
