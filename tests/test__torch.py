"""PyTorch's private names, each of which may be missing; and what is done once a module is imported."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import zipfile

import pytest

from gencore._torch import PRIVATE, when_imported

# In a process of its own for each name, gencore does not find it, while torch, which needs many of them, keeps it; then
# ops are called in every way that does not need it.
_WITHOUT = """
import os, pkgutil, sys
import torch

def checked(name):
    found = pkgutil.resolve_name

    def resolve_name(asked):
        if asked == "torch." + name:
            raise AttributeError(asked)
        return found(asked)

    pkgutil.resolve_name = resolve_name
    import gencore
    from gencore import Key, _torch, ops
    assert name in _torch._missing
    lost = PRIVATE.index(name) >= PRIVATE.index("_C._functorch.peek_interpreter_stack")
    assert _torch.is_unobserved() is not lost
    mu = torch.zeros(2, 3, requires_grad=True)
    z = ops.reparameterize(mu, torch.zeros(2, 3), Key(1))
    assert torch.equal(z.detach(), ops.normal((2, 3), Key(1)))
    z.sum().backward()
    assert torch.equal(mu.grad, torch.ones(2, 3))
    x = torch.arange(16.0).view(2, 4, 2, 1)
    assert torch.equal(ops.group_norm(x, 2, out=x.clone()), ops.group_norm(x, 2))
    q = torch.ones(1, 1, 2, 3, requires_grad=True)
    (of_q,) = torch.autograd.grad(ops.attention(q, q, q).sum(), q, create_graph=True)
    assert torch.allclose(of_q, torch.ones_like(q)) and of_q.requires_grad
    assert torch.equal(torch.utils.data.default_collate([torch.zeros(1)]), torch.zeros(1, 1))
    assert "cpu" in str(gencore.explain(ops.normal, (2, 3), Key(1)))
    with _torch.without_modes():
        assert _torch.has_values(_torch.lifted(x)) and not _torch.is_fake(x) and _torch.unwrapped((x,)) == (x,)

PRIVATE = sys.argv[1:]
for name in PRIVATE:
    child = os.fork()
    if not child:
        try:
            checked(name)
            os._exit(0)
        except BaseException:
            print(name, file=sys.stderr)
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0, name
"""


def test_every_private_name_may_be_missing():
    done = subprocess.run([sys.executable, "-c", _WITHOUT, *PRIVATE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
