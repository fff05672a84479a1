"""Other C++ projects: ``cmake --install``, ``find_package(gencore)``, and the same bits without Python.

The library is built with warnings as errors, so that this is also the test that it compiles without any.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gencore import Key, _cpu, ops
from gencore.noise import reference_normal

ROOT = Path(__file__).resolve().parents[1]


def tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed; the dev extra brings it")
    return found


def run(*command: str | Path, **variables: str) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=os.environ | variables)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(source: Path, build: Path, *options: str) -> None:
    cmake = tool("cmake")
    run(cmake, "-S", source, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", *options)
    run(cmake, "--build", build)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ side of gencore, installed."""
    folder = tmp_path_factory.mktemp("gencore")
    # For CUDA, what is compiled quickest: it is linked here, never run.
    build(
        ROOT, folder / "build", "-DGENCORE_PYTHON=OFF", "-DGENCORE_WERROR=ON", "-DGENCORE_CUDA_ARCHITECTURES=80-virtual"
    )
    run(tool("cmake"), "--install", folder / "build", "--component", "cpp", "--prefix", folder / "installed")
    # What was installed must stand alone and may be moved.
    shutil.rmtree(folder / "build")
    return (folder / "installed").rename(folder / "moved")


@pytest.fixture(scope="module")
def consumer(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("consumer")
    build(ROOT / "tests" / "cpp", folder, f"-DCMAKE_PREFIX_PATH={prefix}")
    return folder / "consumer"


def test_what_is_installed(prefix):
    headers = {path.name for path in (prefix / "include" / "gencore").iterdir()}
    assert headers == {path.name for path in (ROOT / "csrc" / "include" / "gencore").iterdir()}
    others = {path.name for path in prefix.rglob("*") if path.is_file() and path.suffix != ".h"}
    assert {"libgencore.a", "gencoreConfig.cmake", "gencoreConfigVersion.cmake", "gencoreTargets.cmake"} <= others
    assert not [path for path in prefix.rglob("*.cmake") if str(ROOT) in path.read_text()]


@pytest.mark.parametrize("level", _cpu.build_info()["simd_supported"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_cpp_program_computes_the_same_bits(consumer, level, threads):
    seed, stream, first, samples, elements = 2**40 + 7, 5, 2**33, 3, 1003
    arguments = map(str, (seed, stream, first, samples, elements, threads))
    lines = dict(line.split(" ", 1) for line in run(consumer, *arguments, GENCORE_SIMD=level).splitlines())
    assert lines["level"] == level
    assert lines["refused"].startswith("invalid argument")
    if _cpu.build_info()["cuda_module"].startswith("built"):
        assert lines["cuda"] == "invalid argument"
    computed = {
        name: np.array([int(word, 16) for word in lines[name].split()], np.uint32).view(np.float32)
        for name in ("normal", "z", "kl", "y", "attended")
    }

    key = Key(seed).stream(stream).samples(first)
    expected = reference_normal((samples, elements), key)
    np.testing.assert_array_equal(computed["normal"], expected.ravel())

    index = torch.arange(samples * elements).reshape(samples, elements)
    z, kl = ops.reparameterize_kl(index / 8, index % 5 - 2.0, key)
    np.testing.assert_array_equal(computed["z"], z.numpy().ravel())
    np.testing.assert_array_equal(computed["kl"], kl.numpy())
    y = ops.group_norm(torch.from_numpy(expected)[:, None], 1, activation="silu")
    np.testing.assert_array_equal(computed["y"], y.numpy().ravel())
    tokens = torch.from_numpy(expected)[:, None, :, None]
    np.testing.assert_array_equal(computed["attended"], ops.attention(tokens, tokens, tokens).numpy().ravel())
    # Where logvar is 0 no exp is in the way, and z = mu + eps by definition.
    plain = index.numpy() % 5 == 2
    mu = (index / 8).numpy()
    np.testing.assert_array_equal(z.numpy()[plain], (mu + expected)[plain])
