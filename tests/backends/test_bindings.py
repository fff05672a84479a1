"""What the compiled modules are to Python: arguments by name, errors that name them, stubs that say what is there."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels import emulated

from gencore import Key, _cpu
from gencore.backends import cpu

ROOT = Path(__file__).resolve().parents[2]
HELD = torch.zeros(2, 3), Key(3).packed
RIGHT = {
    "out": HELD[0].data_ptr(), "dtype": 0, "place": 1,
    "shape": _cpu.NoiseShape(samples=2, draws=1, elements=3, channels=0),
    "key": _cpu.NoiseKey(words=HELD[1].data_ptr(), rows=0, on_device=False),
}  # fmt: skip


def fields(struct: str, header: str) -> list[str]:
    """The fields of a struct as its header names them, in the order there."""
    text = (ROOT / "csrc" / "include" / "gencore" / header).read_text()
    body = re.search(rf"^struct {struct} {{\n(.*?)^}};", text, re.DOTALL | re.MULTILINE)
    assert body is not None
    declared = re.sub(r"//.*|static constexpr.*", "", body[1])
    return [name for line in declared.split(";") for name in re.findall(r"(\w+)(?:\s*=[^,]*|\{\})?\s*(?:,|$)", line)]


@pytest.mark.parametrize(
    ("function", "struct", "header"),
    [
        ("add_noise", "AddNoise", "add_noise.h"),
        ("attention_double_backward", "AttentionDoubleBackward", "attention.h"),
        ("diffusion_step", "DiffusionStep", "diffusion_step.h"),
        ("group_norm_double_backward", "GroupNormDoubleBackward", "group_norm.h"),
        ("NoiseKey", "NoiseKey", "types.h"),
        ("AttentionOptions", "AttentionOptions", "attention.h"),
    ],
)
def test_arguments_are_called_as_the_fields(function, struct, header):
    parameters = inspect.signature(getattr(_cpu, function)).parameters.values()
    assert {parameter.kind for parameter in parameters} == {inspect.Parameter.KEYWORD_ONLY}
    place = [] if function == struct else ["place"]
    assert [parameter.name for parameter in parameters] == [*fields(struct, header), *place]


def test_the_order_of_arguments_does_not_matter():
    reference = torch.empty(2, 3)
    cpu.ops.normal_(reference, HELD[1])
    for arguments in (RIGHT, dict(reversed(RIGHT.items())), {"".join(list(name)): RIGHT[name] for name in RIGHT}):
        HELD[0].zero_()
        _cpu.normal(**arguments)
        assert torch.equal(HELD[0], reference)
    shape = {"elements": 3, "channels": 4, "samples": 1, "draws": 2}
    assert _cpu.NoiseShape(**shape) == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"out": "x"}, TypeError, "out must be an address or None, got 'x'"),
        ({"out": 1.0}, TypeError, "out must be an address or None, got 1.0"),
        ({"out": -1}, ValueError, "out must be an address, got -1"),
        ({"dtype": 0.5}, TypeError, "dtype must be an int, got 0.5"),
        ({"dtype": 9}, ValueError, "invalid argument"),
        ({"place": None}, TypeError, "place must be an int, got None"),
        ({"place": 1 << 31}, ValueError, "place must be an int of 32 bits, got 2147483648"),
        ({"shape": (1, 2, 3)}, TypeError, "shape must be None or a tuple of samples, draws, elements, channels, got"),
        ({"shape": [1, 2, 3, 4]}, TypeError, "shape must be None or a tuple of"),
        ({"shape": (1, 2, None, 4)}, TypeError, "shape.elements must be an int, got None"),
        ({"shape": (1, 2, 1 << 63, 4)}, ValueError, "shape.elements must be an int of 64 bits, got"),
        ({"key": (None, 0, 1)}, TypeError, "key.on_device must be a bool, got 1"),
        ({"key": None}, ValueError, "invalid argument"),
        ({"steam": 0}, TypeError, "no argument is called steam; there are out, dtype, shape, key, place"),
    ],
)
def test_what_is_wrong_is_named(wrong, error, message):
    HELD[0].zero_()
    with pytest.raises(error, match=re.escape("gencore._cpu.normal: ") + re.escape(message)):
        _cpu.normal(**RIGHT | wrong)
    assert not HELD[0].any()


@pytest.mark.parametrize("missing", RIGHT)
def test_what_is_missing_is_named(missing):
    with pytest.raises(TypeError, match=re.escape(f"gencore._cpu.normal: {missing} is missing")):
        _cpu.normal(**{name: value for name, value in RIGHT.items() if name != missing})


def test_arguments_by_place_are_refused():
    with pytest.raises(TypeError, match="arguments are given by name"):
        _cpu.normal(*RIGHT.values())
    with pytest.raises(TypeError, match="arguments are given by name"):
        _cpu.NoiseShape(1, 2, 3, 4)
    with pytest.raises(TypeError, match="NoiseShape: draws is missing"):
        _cpu.NoiseShape(samples=1, elements=3, channels=4)


# What a stub may say of an argument, with a value of the kind; of set_simd_level not every str is one.
VALUES = {"int": 0, "bool": False, "str": cpu.simd_level()}


def stub_faults(stub: str, module: Any) -> list[str]:
    """Where a module does not do what its stub says; functions with names of their own for arguments need none."""
    found, told = [], set()
    for function in ast.parse(stub).body:
        if not isinstance(function, ast.FunctionDef) or function.name == "__getattr__":
            continue
        told.add(function.name)
        if not hasattr(module, function.name):
            found.append(f"{function.name} is not in the module")
            continue
        args = function.args
        if args.args or args.kwonlyargs or args.vararg or args.kwarg or args.defaults:
            found.append(f"{function.name}: arguments have no names, and no defaults")
            continue
        values = [VALUES[ast.unparse(arg.annotation)] for arg in args.posonlyargs]
        wanted = ast.unparse(function.returns).partition("[")[0]
        try:
            got = type(getattr(module, function.name)(*values)).__name__.replace("NoneType", "None")
        except TypeError as error:
            found.append(f"{function.name}: {error}")
            continue
        if got != wanted:
            found.append(f"{function.name} gives {got}, not {wanted}")
        # As many arguments as that, and of these types.
        for other in (
            [*values, 0],
            values[:-1],
            *([*values[:i], object(), *values[i + 1 :]] for i in range(len(values))),
        ):
            if other == values:
                continue
            try:
                getattr(module, function.name)(*other)
            except TypeError:
                continue
            found.append(f"{function.name} takes {other}")
    bound = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
    without_names = {name for name in bound if not name.endswith("_workspace") and not is_bound(getattr(module, name))}
    return found + [f"{name} is not in the stub" for name in sorted(without_names - told)]


def is_bound(function: Any) -> bool:
    """Whether it is by the binder, and tells its arguments itself."""
    return getattr(function, "__text_signature__", None) is not None


def test_the_stub_of_the_cpu():
    assert stub_faults((ROOT / "gencore" / "_cpu.pyi").read_text(), _cpu) == []


def test_the_stub_of_cuda():
    with emulated() as ops:
        module = ops._module._emulator.module
    assert stub_faults((ROOT / "gencore" / "_cuda.pyi").read_text(), module) == []


class _Module:
    @staticmethod
    def f(x: int, /) -> int:
        return [0][x]

    @staticmethod
    def g() -> str:
        return ""


RIGHT_STUB = "def f(x: int, /) -> int: ...\ndef g() -> str: ..."


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("x: int, /", ""),
        ("x: int, /", "x: int, y: int, /"),
        ("x: int, /", "x: str, /"),
        ("x: int, /", "x: int"),
        ("x: int, /", "*, x: int"),
        ("x: int, /", "x: int = 0, /"),
        ("-> int", "-> float"),
        ("-> int", "-> None"),
        ("\ndef g() -> str: ...", ""),
        ("def g() ", "def h() "),
    ],
)
def test_a_wrong_stub_is_found(before, after):
    assert stub_faults(RIGHT_STUB, _Module) == []
    assert before in RIGHT_STUB
    assert stub_faults(RIGHT_STUB.replace(before, after), _Module)
