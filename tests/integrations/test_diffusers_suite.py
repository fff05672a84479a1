"""The script that runs diffusers' own tests tells what was lost from what was not run."""

from __future__ import annotations

import pytest
from integrations import diffusers_suite


def test_a_path_without_outcomes_is_broken(tmp_path):
    (tmp_path / "test_some.py").write_text("def test_good(): pass\ndef test_bad(): assert False\n")
    broken = []
    got = diffusers_suite.outcomes(tmp_path, ["test_some.py", "mistyped.py"], False, [], broken)
    assert {name: outcome for name, (outcome, *_) in got.items()} == {
        "test_some.py::test_good": "passed",
        "test_some.py::test_bad": "failed",
    }
    assert broken == ["mistyped.py"]


@pytest.mark.parametrize(("with_it", "status"), [("passed", 0), ("failed", 1), (None, 2)])
def test_exit_status(monkeypatch, tmp_path, with_it, status):
    def outcomes(source, paths, accelerated, options, broken):
        if accelerated and with_it is None:
            broken.append("a path")
        return {"a test": [with_it if accelerated and with_it else "passed"]}

    monkeypatch.setattr(diffusers_suite, "outcomes", outcomes)
    monkeypatch.setattr("sys.argv", ["diffusers_suite.py", str(tmp_path)])
    assert diffusers_suite.main() == status
