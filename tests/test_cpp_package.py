"""Other C++ projects: ``cmake --install``, ``find_package(gencore)``, and the same bits without Python."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from library import ROOT, built, configure, has_nvcc, run, tool

from gencore import Key, _cpu, ops
from gencore.noise import reference_normal


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ side of gencore, installed."""
    folder = tmp_path_factory.mktemp("gencore")
    library = built("gencore", *(["gencore_cuda"] if has_nvcc() else []))
    run(tool("cmake"), "--install", library, "--component", "cpp", "--prefix", folder / "installed")
    # What was installed may be moved.
    return (folder / "installed").rename(folder / "moved")


@pytest.fixture(scope="module")
def consumer(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("consumer")
    configure(ROOT / "tests" / "cpp", folder, f"-DCMAKE_PREFIX_PATH={prefix}")
    run(tool("cmake"), "--build", folder)
    return folder / "consumer"


def test_what_is_installed(prefix):
    headers = {path.name for path in (prefix / "include" / "gencore").iterdir()}
    assert headers == {path.name for path in (ROOT / "csrc" / "include" / "gencore").iterdir()}
    others = {path.name for path in prefix.rglob("*") if path.is_file() and path.suffix != ".h"}
    assert {"libgencore.a", "gencoreConfig.cmake", "gencoreConfigVersion.cmake", "gencoreTargets.cmake"} <= others
    # It stands alone: the folder of the build is in that of the sources.
    assert not [path for path in prefix.rglob("*.cmake") if str(ROOT) in path.read_text()]


@pytest.mark.parametrize("level", _cpu.build_info()["simd_supported"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_cpp_program_computes_the_same_bits(consumer, level, threads):
    seed, stream, first, samples, elements = 2**40 + 7, 5, 2**33, 3, 1003
    arguments = map(str, (seed, stream, first, samples, elements, threads))
    lines = dict(line.split(" ", 1) for line in run(consumer, *arguments, GENCORE_SIMD=level).splitlines())
    assert lines["level"] == level
    assert lines["refused"].startswith("invalid argument")
    assert lines.get("cuda") == ("invalid argument" if has_nvcc() else None)
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
