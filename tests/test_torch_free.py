"""The compiled code knows no torch: neither its headers nor its symbols nor its libraries."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import library
import pytest
import torch

from gencore import _cpu

ROOT = Path(__file__).resolve().parents[1]
HEADER = re.compile(r"^\s*#\s*include\s*[<\"](torch|ATen|c10|caffe2|aoti_torch|THC?)\b", re.MULTILINE)
SYMBOL = re.compile(r"\b(at|c10|torch|caffe2)::|\b(THP|aoti_|torch_)\w+")
LIBRARY = re.compile(r"lib(torch|c10|caffe2)")


def output_of(tool: str, *arguments: str) -> str:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} (of binutils) is not installed")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def torch_headers(folder: Path) -> list[str]:
    return [path.name for path in sorted(folder.rglob("*")) if path.is_file() and HEADER.search(path.read_text())]


def undefined_torch_symbols(module: str) -> list[str]:
    symbols = output_of("nm", "-D", "-C", "--undefined-only", module).splitlines()
    assert symbols, f"{module} needs no symbol at all, not even one of Python?"
    return [symbol for symbol in symbols if SYMBOL.search(symbol)]


def needed_libraries(module: str) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", output_of("readelf", "-d", "-W", module))


def compiled_module(name: str) -> str:
    """The installed one; where that was built without CUDA, one that nvcc builds here."""
    spec = importlib.util.find_spec(f"gencore.{name}")
    if spec is not None:
        return spec.origin
    if not library.has_nvcc():
        pytest.skip(f"gencore.{name} is not built: {_cpu.build_info()['cuda_module']}")
    return str(library.built(name) / (name + sysconfig.get_config_var("EXT_SUFFIX")))


def test_no_source_includes_a_torch_header():
    assert torch_headers(ROOT / "csrc") == []


@pytest.mark.parametrize(
    "line", ["#include <torch/extension.h>", "  # include <ATen/ATen.h>", '#include "c10/util/Half.h"']
)
def test_a_torch_header_is_found(tmp_path, line):
    (tmp_path / "bad.h").write_text(f"#pragma once\n{line}\n")
    (tmp_path / "good.h").write_text("#include <vector>  // not <torch/torch.h>\n")
    assert torch_headers(tmp_path) == ["bad.h"]


@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_the_module_needs_nothing_of_torch(name):
    module = compiled_module(name)
    assert undefined_torch_symbols(module) == []
    assert not [library for library in needed_libraries(module) if LIBRARY.search(library)]


def test_the_cuda_module_carries_its_runtime():
    """It can be loaded on a machine without CUDA, and no other runtime's version matters to it."""
    module = compiled_module("_cuda")
    assert not [library for library in needed_libraries(module) if "cuda" in library]
    defined = output_of("nm", "-D", "--defined-only", module)
    assert "PyInit__cuda" in defined
    assert not re.search(r"\bcuda\w+", defined), "the runtime's functions are offered to others"


def test_a_module_of_torch_is_told_apart():
    """What the tests above look for is found where it is."""
    module = str(Path(torch.__file__).parent / "lib" / "libtorch_python.so")
    assert undefined_torch_symbols(module)
    assert [library for library in needed_libraries(module) if LIBRARY.search(library)]


def test_the_openmp_runtime_goes_by_its_plain_name():
    """A renamed copy, as wheel repair makes one, would be a second pool of threads beside torch's."""
    if not _cpu.build_info()["compiler"].startswith("GNU") or not _cpu.build_info()["openmp"]:
        pytest.skip("not built by GCC with OpenMP")
    assert [library for library in needed_libraries(_cpu.__file__) if "omp" in library] == ["libgomp.so.1"]
