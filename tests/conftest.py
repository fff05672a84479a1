"""Fixtures for every room."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Where there is no GPU, Triton's kernels are interpreted; it decides that when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from kernels import NAMES, Kernels, running

from gencore.backends import cpu

_ENTRY_POINTS = """\
[gencore.models]
toy = gencore_toy:toy
toy-sampler = gencore_toy:toy_sampler
toy-translator = gencore_toy:toy_translator
toy-captions = gencore_toy:toy_captions
toy-stage = gencore_toy:toy_stage
toy-mean = gencore_toy:toy_mean

[gencore.datasets]
bars = gencore_toy:bars
toy-pairs = gencore_toy:toy_pairs
toy-texts = gencore_toy:toy_texts
"""


# What takes minutes whatever the order: begun last, they would be waited for alone.
_FIRST = ("test_cuda_build.py", "test_cpp_package.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("gencore").addoption(
        "--kernels", choices=NAMES, help='run only the tests on one kind of kernels; with "cuda" also those marked gpu'
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kernels = config.getoption("kernels")
    if kernels is not None:
        others = [item for item in items if not _is_of(item, kernels)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if _is_of(item, kernels)]
    if not torch.cuda.is_available():
        for item in items:
            marker = item.get_closest_marker("gpu")
            if marker is not None and not marker.kwargs.get("or_emulator"):
                item.add_marker(pytest.mark.skip(reason="torch finds no GPU to use"))
    items.sort(key=lambda item: item.path.name not in _FIRST)


def _is_of(item: pytest.Item, kernels: str) -> bool:
    """Whether a test runs on these kernels, as its parameters say, or on a GPU's without a choice."""
    found = getattr(item, "callspec", None)
    named = found is not None and kernels in (found.params.get("kernels"), found.params.get("gpu_backend"))
    return named or (kernels == "cuda" and item.get_closest_marker("gpu") is not None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says which files took longest, where many ran."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    if len(seconds) > 10:
        terminalreporter.section(f"slowest 10 of {len(seconds)} files, in {seconds.total():.0f} s of all processes")
        for name, duration in seconds.most_common(10):
            terminalreporter.write_line(f"{duration:7.1f} s  {name}")


@pytest.fixture(scope="session")
def toy_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Installs the plugins of ``tests/toy`` for this process; returns the environment that does so for another."""
    folder = tmp_path_factory.mktemp("toy")
    shutil.copy(Path(__file__).parent / "toy" / "gencore_toy.py", folder)
    info = folder / "gencore_toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gencore-toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(_ENTRY_POINTS)
    sys.path.insert(0, str(folder))
    root = str(Path(__file__).parent.parent)
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(folder), root, os.environ.get("PYTHONPATH", "")]),
    }


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C has its effect, though a shell that started the tests in the background made them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small networks: a second thread gains them nothing, and on a busy machine costs them much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=NAMES)
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """Runs the test once on each kind of kernels: of the CPU at each SIMD level, CUDA's, Triton's."""
    parameters = getattr(request.node, "callspec", None)
    if request.param == "triton" and parameters is not None and not torch.cuda.is_available():
        case, dtype = (parameters.params.get(name) for name in ("case", "dtype"))
        if dtype in (torch.float16, torch.float64):
            pytest.skip("Triton's interpreter is slow: tests/backends/triton has the other types")
        if case is not None and case.elements * (case.draws or 1) > (1024 if dtype == torch.float32 else 256):
            pytest.skip("Triton's interpreter is slow: tests/backends/triton has the large cases, once each")
    with running(request.param) as kernels:
        yield kernels


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def simd_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once at each SIMD level that this machine has."""
    level = request.param
    if level not in cpu.build_info()["simd_supported"]:
        pytest.skip(f"this processor has no {level}")
    before = cpu.simd_level()
    cpu.set_simd_level(level)
    yield level
    cpu.set_simd_level(before)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs the test once with each number of threads, more than this machine has cores among them."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
