"""The stubs of the compiled modules say what these say of themselves: names, numbers and kinds of arguments."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from kernels import emulated

from gencore import _cpu

ROOT = Path(__file__).resolve().parents[1]
# What a type in the words of the module may be in a stub; any other is the same there.
FITS = {
    "SupportsInt": {"int"},
    "SupportsFloat": {"float"},
    "Sequence": {"list", "tuple"},
    "object": {"list", "tuple"},
}


class Signature(NamedTuple):
    """The types of positional arguments, those of others by their names, and of the result."""

    positional: list[str]
    named: dict[str, str]
    result: str


def signatures(source: str) -> dict[str, Signature]:
    """The functions of Python source; arguments without names of their own are positional."""
    found = {}
    for function in ast.parse(source).body:
        if isinstance(function, ast.FunctionDef):
            args = function.args
            unnamed = [arg for arg in args.args if arg.arg.removeprefix("arg").isdigit()]
            found[function.name] = Signature(
                [_kind(arg.annotation) for arg in (*args.posonlyargs, *unnamed)],
                {arg.arg: _kind(arg.annotation) for arg in args.args if arg not in unnamed},
                _kind(function.returns),
            )
    return found


def _kind(annotation: Any) -> str:
    """The first of the types that a type names; of Annotated[...] that of what is annotated."""
    if isinstance(annotation, ast.BinOp):
        return _kind(annotation.left)
    if isinstance(annotation, ast.Subscript):
        outer = _kind(annotation.value)
        return _kind(annotation.slice.elts[0]) if outer == "Annotated" else outer
    return ast.unparse(annotation).rpartition(".")[2]


def said_by(module: Any) -> dict[str, Signature]:
    functions = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
    return signatures("\n".join(f"def {getattr(module, name).__doc__.strip()}: ..." for name in functions))


def faults(stub: dict[str, Signature], module: dict[str, Signature]) -> list[str]:
    found = [f"{name} stands in one of them alone" for name in sorted(stub.keys() ^ module.keys())]
    for name in sorted(stub.keys() & module.keys()):
        ours, theirs = stub[name], module[name]
        if len(ours.positional) != len(theirs.positional) or list(ours.named) != list(theirs.named):
            found.append(f"{name} takes {ours[:2]} in the stub, {theirs[:2]} in the module")
            continue
        pairs = zip(
            (*ours.positional, *ours.named.values(), ours.result),
            (*theirs.positional, *theirs.named.values(), theirs.result),
            strict=True,
        )
        found += [f"{name}: {a} in the stub, {b} in the module" for a, b in pairs if a not in FITS.get(b, {b})]
    return found


def test_cpu():
    stub = signatures((ROOT / "gencore" / "_cpu.pyi").read_text())
    assert faults(stub, said_by(_cpu)) == []


def test_cuda():
    with emulated() as ops:
        module = ops._module._emulator.module
    stub = signatures((ROOT / "gencore" / "_cuda.pyi").read_text())
    assert faults(stub, said_by(module)) == []


@pytest.mark.parametrize(
    "stub",
    [
        "def f(x: int, /, error: int = 0) -> None: ...\ndef g() -> str: ...\ndef h() -> str: ...",
        "def f(x: int, /, error: int = 0) -> None: ...",
        "def f(x: int, y: int, /, error: int = 0) -> None: ...\ndef g() -> str: ...",
        "def f(x: float, /, error: int = 0) -> None: ...\ndef g() -> str: ...",
        "def f(x: int, /, mistake: int = 0) -> None: ...\ndef g() -> str: ...",
        "def f(x: int, /, error: int = 0) -> None: ...\ndef g() -> int: ...",
    ],
)
def test_a_wrong_stub_is_found(stub):
    module = "def f(arg0: typing.SupportsInt | typing.SupportsIndex, error: typing.SupportsInt = 0) -> None: ...\n"
    module += "def g() -> str: ..."
    right = "def f(x: int, /, error: int = 0) -> None: ...\ndef g() -> str: ..."
    assert faults(signatures(right), signatures(module)) == []
    assert faults(signatures(stub), signatures(module))
