"""Who may use whom, held by reading every import; and every op has one stem in every room."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the top down; a room uses rooms of lower levels only, and none of its own level but itself. A room is a module or
# package right under gencore; "gencore" is the package's own __init__, which offers what needs no plugin.
LEVELS = (
    ("__main__",),
    ("cli",),
    ("bench",),
    ("train",),
    ("metrics",),
    ("data",),
    ("plugins",),
    ("models",),
    ("gencore",),
    ("integrations",),
    ("nn", "diffusion", "info"),
    ("ops",),
    ("backends",),
    ("_cpu", "_cuda"),
    ("spec", "pictures"),
    ("schedule", "noise", "config", "files", "progress", "text", "processes"),
    ("arguments", "_ops", "_torch"),
)
# What is used by a few only, however low it lies.
USERS = {
    "backends": {"backends", "ops", "info"},
    "_cpu": {"backends"},
    "_cuda": {"backends"},
    "torch.ops.gencore": {"ops"},
}
EXCEPTIONS = {
    ("gencore.bench.limits", "gencore.backends.cpu"): "probes of the machine are no ops, and nobody else's business",
}
# What csrc's rooms may not include; every room is a folder of csrc.
CUDA = r"cuda\w*\.h|cuda/.*|cooperative_groups.*|cub/.*|mma\.h"
PYTHON = r"Python\.h|pybind11/.*|nanobind/.*"
FORBIDDEN_INCLUDES = {
    "include": rf"{CUDA}|{PYTHON}|\.\./.*|cpu/.*|bindings/.*",
    "cpu": rf"{CUDA}|{PYTHON}|.*bindings/.*",
    "cuda": PYTHON,
    "bindings": r"(?!)",
}
# Where an op's stem must stand; what else stands there and is no op.
OP_ROOMS = {
    "gencore/ops": ("{}.py", {"__init__"}),
    "gencore/backends/reference": ("{}.py", {"__init__"}),
    "gencore/backends/triton": ("{}.py", {"__init__", "noise"}),
    "csrc/include/gencore": (
        "{}.h",
        {"activations", "channel_values", "cuda", "limits", "math", "pages", "philox", "simd", "types"},
    ),
    "csrc/cpu": ("{}.cpp", {"dispatch", "group_norm_second", "limits", "pages"}),
    "csrc/cuda": (
        "{}.cu",
        {
            "attention_bfloat16",
            "attention_float16",
            "attention_general",
            "attention_second",
            "error",
            "group_norm_second",
        },
    ),
    "tests/ops": ("test_{}.py", set()),
    "gencore/bench/suite": ("{}.py", {"__init__", "base", "networks", "training", "unet"}),
}


class Use(NamedTuple):
    user: str
    used: str
    where: str


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def uses(root: Path) -> Iterable[Use]:
    """Every use of gencore by a module under root/gencore; a relative import is a use of ``"."``."""
    modules = {module_name(path, root) for path in (root / "gencore").rglob("*.py")} | {"gencore._cpu", "gencore._cuda"}

    for path in sorted((root / "gencore").rglob("*.py")):
        user = module_name(path, root)
        for node in ast.walk(ast.parse(path.read_text())):
            found: list[str] = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level:
                found = ["."]
            elif isinstance(node, ast.ImportFrom) and node.module:
                # `from gencore import ops` is a use of gencore.ops; `from gencore.ops import normal` of gencore.ops.
                found = [
                    full if (full := f"{node.module}.{alias.name}") in modules else node.module for alias in node.names
                ]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
                found = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            elif isinstance(node, ast.Attribute) and node.attr == "gencore" and ast.unparse(node.value) == "torch.ops":
                found = ["torch.ops.gencore"]
            for used in found:
                if used == "." or used.split(".")[0] == "gencore" or used == "torch.ops.gencore":
                    yield Use(user, used, f"{path.relative_to(root)}:{node.lineno}")


def faults(root: Path) -> list[str]:
    level = {name: height for height, names in enumerate(reversed(LEVELS)) for name in names}
    found = []
    for use in uses(root):
        if use.used == ".":
            found.append(f"{use.where}: relative import")
            continue
        user = room(use.user)
        used = use.used if use.used == "torch.ops.gencore" else room(use.used)
        unknown = [name for name in (user, used) if name not in level and name not in USERS]
        if unknown:
            found.append(f"{use.where}: {unknown[0]} has no place in LEVELS")
        elif user == used or (use.user, use.used) in EXCEPTIONS:
            continue
        elif used in USERS and user not in USERS[used]:
            found.append(f"{use.where}: {user} may not use {used}; only {', '.join(sorted(USERS[used]))} may")
        elif used in level and level[used] >= level[user]:
            found.append(f"{use.where}: {user} may not use {used}, which is not below it")
    return found


def include_faults(root: Path) -> list[str]:
    found = []
    for path in sorted(p for p in (root / "csrc").rglob("*") if p.is_file()):
        place = path.relative_to(root / "csrc").parts[0]
        if place not in FORBIDDEN_INCLUDES:
            found.append(f"csrc/{place}: has no place in FORBIDDEN_INCLUDES")
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            match = re.match(r"\s*#\s*include\s*[<\"]([^>\"]+)[>\"]", line)
            if match and re.fullmatch(FORBIDDEN_INCLUDES[place], match[1]):
                found.append(f"{path.relative_to(root)}:{number}: csrc/{place} may not include {match[1]}")
    return found


def private_faults(root: Path) -> list[str]:
    """Uses of PyTorch's private names, but by the one module that has them all."""
    found = []
    for path in sorted((root / "gencore").rglob("*.py")):
        if path == root / "gencore" / "_torch.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                if re.match(r"torch(\.\w+)*?\._[a-zA-Z]", name):
                    found.append(f"{path.relative_to(root)}:{node.lineno}: {name} belongs to gencore/_torch.py")
    return found


def stem_faults(root: Path) -> list[str]:
    stems = {}
    for folder, (pattern, others) in OP_ROOMS.items():
        before, after = pattern.split("{}")
        names = {
            path.name[len(before) : -len(after)]
            for path in (root / folder).glob("*")
            if path.name.startswith(before) and path.name.endswith(after)
        }
        stems[folder] = {name for name in names - others if not name.startswith("_")}
    listed = re.search(r"set\(gencore_ops ([^)]*)\)", (root / "CMakeLists.txt").read_text())
    stems["CMakeLists.txt, gencore_ops"] = set(listed[1].split()) if listed else set()
    stems["gencore/_ops.py"] = set(re.findall(r"\bOp\(\s*\"(\w+)\"", (root / "gencore" / "_ops.py").read_text()))
    every = set().union(*stems.values())
    return [
        f"{folder}: no {', '.join(sorted(every - names))}, which other rooms have"
        for folder, names in stems.items()
        if every - names
    ]


def test_every_use_is_downward():
    assert faults(ROOT) == []


def test_private_names_of_pytorch_stand_in_one_file():
    assert private_faults(ROOT) == []


@pytest.mark.parametrize(
    "code",
    [
        "import torch\nx = torch._C._len_torch_dispatch_stack()",
        "import torch._dynamo",
        "from torch import _guards",
        "def f():\n    from torch._inductor import utils",
        "from torch.overrides import _get_current_function_mode_stack",
        "op = torch.ops.aten._scaled_dot_product_flash_attention.default",
    ],
)
def test_a_private_name_is_found(tmp_path, code):
    (tmp_path / "gencore").mkdir()
    (tmp_path / "gencore" / "a.py").write_text(code)
    assert private_faults(tmp_path)
    (tmp_path / "gencore" / "a.py").write_text("import torch\nx = torch.__version__, torch.nn.functional.silu")
    assert private_faults(tmp_path) == []


def test_every_exception_is_needed():
    assert EXCEPTIONS.keys() <= {(use.user, use.used) for use in uses(ROOT)}


def test_cpp_rooms_know_what_they_may():
    assert include_faults(ROOT) == []


def test_every_op_has_one_stem_in_every_room():
    assert stem_faults(ROOT) == []


@pytest.mark.parametrize(
    ("path", "code", "fault"),
    [
        ("ops/a.py", "from gencore.nn import x", "ops may not use nn, which is not below it"),
        ("ops/a.py", "from gencore import nn", "ops may not use nn, which is not below it"),
        ("ops/a.py", "import gencore", "ops may not use gencore, which is not below it"),
        ("noise.py", "def f():\n    from gencore.config import Config", "noise may not use config"),
        ("nn/a.py", "import gencore.diffusion as d", "nn may not use diffusion"),
        ("models/vae/model.py", "from gencore.train import Trainer", "models may not use train"),
        ("models/base.py", "from gencore.data import Dataset", "models may not use data, which is not below it"),
        ("plugins.py", "def f():\n    from gencore.data.base import DatasetPlugin", "plugins may not use data"),
        ("spec.py", "from gencore.models import GenerativeModel", "spec may not use models, which is not below it"),
        ("pictures.py", "from gencore.spec import Batch", "pictures may not use spec, which is not below it"),
        ("metrics/a.py", "from gencore.train import Trainer", "metrics may not use train"),
        ("models/vae/model.py", "from gencore.backends import cpu", "models may not use backends; only"),
        ("models/vae/model.py", "from gencore import _cpu", "models may not use _cpu; only backends may"),
        ("ops/a.py", "from gencore._cpu import normal", "ops may not use _cpu; only backends may"),
        ("nn/a.py", "import torch\ny = torch.ops.gencore.normal(x)", "nn may not use torch.ops.gencore; only ops may"),
        ("integrations/x/a.py", "from gencore.models import list_models", "integrations may not use models"),
        ("nn/a.py", "from gencore.integrations.diffusers import accelerate", "nn may not use integrations"),
        ("data/a.py", "import importlib\nimportlib.import_module('gencore.cli.app')", "data may not use cli"),
        ("config.py", "if TYPE_CHECKING:\n    from gencore.ops import normal", "config may not use ops"),
        ("cli/a.py", "from .app import run", "relative import"),
        ("extra/a.py", "from gencore import ops", "extra has no place in LEVELS"),
    ],
)
def test_a_wrong_use_is_found(tmp_path, path, code, fault):
    for folder in ("nn", "ops"):
        (tmp_path / "gencore" / folder).mkdir(parents=True)
        (tmp_path / "gencore" / folder / "__init__.py").touch()
    file = tmp_path / "gencore" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(code)
    (found,) = faults(tmp_path)
    assert fault in found
    assert found.startswith(f"gencore/{path}:")


def test_right_uses_are_not_faults(tmp_path):
    for path, code in {
        "ops/__init__.py": "from gencore.ops.a import a",
        "ops/a.py": "import torch\nfrom gencore.backends import cpu\nop = torch.ops.gencore.a",
        "backends/cpu.py": "from gencore import _cpu\nfrom gencore.noise import Key",
        "cli/app.py": "import gencore\nfrom gencore import metrics, ops\nfrom gencore.train import Trainer",
    }.items():
        (tmp_path / "gencore" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "gencore" / path).write_text(code)
    assert faults(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("cpu/a.cpp", "#include <cuda_runtime.h>"),
        ("cpu/a.cpp", "  #  include <cuda_bf16.h>"),
        ("include/gencore/a.h", "#include <cuda.h>"),
        ("include/gencore/a.h", "#include <pybind11/pybind11.h>"),
        ("include/gencore/a.h", '#include "../cpu/vec.h"'),
        ("cuda/a.cu", "#include <Python.h>"),
        ("cpu/a.cpp", '#include "../bindings/a.h"'),
        ("other/a.cpp", "#include <vector>"),
    ],
)
def test_a_wrong_include_is_found(tmp_path, path, line):
    file = tmp_path / "csrc" / path
    file.parent.mkdir(parents=True)
    file.write_text(f"// a comment\n{line}\n")
    assert len(include_faults(tmp_path)) == 1


def test_a_missing_stem_is_found(tmp_path):
    for folder, (pattern, _) in OP_ROOMS.items():
        (tmp_path / folder).mkdir(parents=True)
        for op in ("one", "two"):
            (tmp_path / folder / pattern.format(op)).touch()
    (tmp_path / "CMakeLists.txt").write_text("set(gencore_ops one two)")
    (tmp_path / "gencore" / "_ops.py").write_text('OPS = (Op("one", {}), Op(\n    "two", {}))')
    assert stem_faults(tmp_path) == []
    (tmp_path / "gencore" / "bench" / "suite" / "two.py").unlink()
    (tmp_path / "csrc" / "cpu" / "three.cpp").touch()
    found = stem_faults(tmp_path)
    assert len(found) == len(OP_ROOMS) + 1  # all but csrc/cpu, and CMakeLists.txt and _ops.py
    assert "gencore/bench/suite: no three, two, which other rooms have" in found
    assert "gencore/ops: no three, which other rooms have" in found


def test_import_is_quiet_and_light():
    """Importing gencore prints nothing, starts no CUDA, and imports neither a plugin nor an extra's package."""
    code = """
import json, sys, torch
before = set(sys.modules)
import gencore
print(json.dumps([sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))
"""
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    imported, cuda_initialized = json.loads(done.stdout)
    assert not cuda_initialized
    assert {room(name) for name in imported if name.split(".")[0] == "gencore"} <= {
        "gencore", "info", "nn", "diffusion", "ops", "backends", "_cpu", "noise", "schedule", "progress",
        "arguments", "_ops", "_torch",
    }  # fmt: skip
    packages = {name.split(".")[0] for name in imported} - sys.stdlib_module_names
    assert packages <= {"gencore", "torch", "numpy"}
    # The compiler takes a second to import and belongs to whoever compiles.
    assert not [name for name in imported if name.startswith(("torch._dynamo", "torch._inductor"))]
