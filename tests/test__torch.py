"""What is done once a module is imported, by whom and however that is."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zipfile

import pytest

from gencore._torch import when_imported


@pytest.fixture(params=["folder", "zip"])
def module(request, tmp_path, monkeypatch):
    """The name of a module that is not yet imported, beside which its loader may load ``other_module``."""
    place = tmp_path if request.param == "folder" else tmp_path / "modules.zip"
    files = {"some_module.py": "value = 3\n", "other_module.py": ""}
    if request.param == "folder":
        for name, text in files.items():
            (place / name).write_text(text)
    else:
        with zipfile.ZipFile(place, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield "some_module"
    for name in ("some_module", "other_module"):
        sys.modules.pop(name, None)


def test_a_function_is_called_once_its_module_is_imported(module):
    calls = []
    when_imported(module, lambda: calls.append(sys.modules[module].value))
    when_imported(module, lambda: calls.append("another"))
    # Who looks for a module need not import it.
    assert importlib.util.find_spec(module).loader.get_source(module) == "value = 3\n"
    assert importlib.util.find_spec(module) is not None
    assert calls == []
    imported = importlib.import_module(module)
    assert sorted(map(str, calls)) == ["3", "another"]
    importlib.import_module("other_module")
    importlib.reload(imported)
    assert len(calls) == 2
    # Nothing is left around the loader.
    assert type(imported.__loader__) is type(imported.__spec__.loader) is type(sys.modules["other_module"].__loader__)
    when_imported(module, lambda: calls.append("at once"))
    assert calls[2:] == ["at once"]


def test_finders_stay_where_they_are(module):
    when_imported(module, lambda: None)
    before = list(sys.meta_path)
    importlib.import_module(module)
    assert sys.meta_path == before


def test_a_module_that_is_not_there_is_not_found():
    when_imported("a_module_that_is_not_there", lambda: None)
    try:
        assert importlib.util.find_spec("a_module_that_is_not_there") is None
    finally:
        del sys.meta_path[0]
