"""docs/performance.md and README's table are what the committed results say, and nobody's typing."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from pathlib import Path

import pytest
from bench import reports

ROOT = Path(__file__).resolve().parents[2]


def load(name):
    specification = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


document = load("document")


def test_the_committed_pages_are_what_the_committed_results_say():
    found = document.reports()
    assert found, "there are no results"
    assert document.page(found) == document.PAGE.read_text(), "run make performance"
    assert document.readme(found) == document.README.read_text(), "run make performance"
    assert document.PICTURE.exists()


def test_every_case_and_loss_is_on_the_page():
    report = reports.report()
    page = document.page([report])
    for result in report.results:
        assert f"### {result.op}, {result.benchmark}\n" in page
        assert f"| `{result.case}` | {result.dtype} |" in page
    slower = page.split("### Where ours is slower")[1].split("\n### ")[0]
    losses = document.losses(report)
    assert losses
    assert slower.count("\n- ") == len(losses)
    for result, peer in losses:
        assert f"- {result.op}, {result.benchmark}, `{result.case}`, {result.dtype}: {peer.name} takes" in slower


def test_a_report_without_losses_says_so():
    report = dataclasses.replace(reports.report(), results=reports.report().results[:2])
    assert "Nowhere in this run." in document.page([report])


def test_marks_of_losses_failures_and_other_results():
    report = reports.report()
    result = report.results[0]
    slow = reports.peer("eager", 0.5)
    wrong = reports.peer("compile", 2.0, error=math.inf)
    broken = reports.failed("diffusers", "RuntimeError: no kernel")
    changed = dataclasses.replace(result, candidates=(result.ours, slow, wrong, broken))
    row = document.table([changed]).splitlines()[2]
    assert "| **0.50** |" in row
    assert "| 2.00 (differs: NaN or infinite) |" in row
    assert "| fails |" in row


def test_every_row_of_readme_is_in_the_results():
    with pytest.raises(KeyError, match="wants 'reparameterize"):
        document.figures(reports.report())
