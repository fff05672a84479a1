"""How every benchmark compares: ours and each peer in turn, the ratios, the floor and our share of it."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gencore
from gencore.backends import choice
from gencore.bench import cases, limits
from gencore.bench.measure import Timing, interleave

ROWS: list[tuple[str, float, dict[str, float], float, str, float | None]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gencore")
    group.addoption(
        "--device", choices=("cpu", "cuda"), default="cpu", help="what to time: this CPU, or the current GPU"
    )
    group.addoption(
        "--dry-run",
        action="store_true",
        help="run every benchmark of the device once, at a small size, against eager alone: the figures mean nothing. "
        "Where there is no GPU, the emulator of the tests stands in for it",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A benchmark with the argument ``case`` runs for the cases in its module's CASES that its device is timed at.

    ONLY of the module may say, by the benchmark's name, which of them it is for.
    """
    if "case" in metafunc.fixturenames:
        timed = cases.timed(metafunc.module.CASES, metafunc.config.getoption("device"))
        wanted = getattr(metafunc.module, "ONLY", {}).get(metafunc.function.__name__)
        timed = [case for case in timed if wanted is None or wanted(case)]
        if metafunc.config.getoption("dry_run"):
            timed = list(dict.fromkeys(case.shrunk() for case in timed))
        metafunc.parametrize("case", timed, ids=str)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where a benchmark's tensors shall be."""
    wanted = request.config.getoption("device")
    if wanted == "cuda" and not torch.cuda.is_available():
        if not request.config.getoption("dry_run"):
            pytest.skip("torch finds no GPU to use")
        from kernels import running

        with running("cuda") as kernels:
            yield kernels.device
    else:
        yield wanted


@pytest.fixture
def our_triton(device: str) -> Callable[..., dict[str, Callable[[], Any]]]:
    """``our_triton(op, *args)``: our op's Triton kernel as one more candidate, where the CUDA kernel is the first."""

    def candidate(op: str, *args: Any) -> dict[str, Callable[[], Any]]:
        gpu = torch.device(device)
        if choice.choose(gpu) != "cuda" or choice.refusal("triton", gpu) is not None:
            return {}
        kernel = getattr(choice.load("triton"), op)
        return {"our Triton": lambda: kernel(*args)}

    return candidate


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest, device: str) -> Iterator[Callable[..., None]]:
    """``compare(ours, peers, floor, limit)``: functions without arguments; seconds, and the name of the limit.

    With ``nbytes``, what must be read and written, the share of a copy's bandwidth is told too.
    """
    dry = request.config.getoption("dry_run")

    def run(
        ours: Callable[[], Any],
        peers: dict[str, Callable[[], Any]],
        floor: float,
        limit: str,
        clock: str = device,
        nbytes: int = 0,
    ) -> None:
        if dry:
            peers = {name: peer for name, peer in peers.items() if not name.startswith("compile")}
        timings: dict[str, Timing] = interleave(
            {"ours": ours, **peers}, device=clock, **({"rounds": 1, "round_seconds": 0.0} if dry else {})
        )
        mine = timings["ours"]
        ratios = {name: mine.ratio_of(timings[name]) for name in peers}
        benchmark.extra_info.update(
            seconds={name: timing.median for name, timing in timings.items()},
            ratios=ratios,
            floor_seconds=floor,
            limit=limit,
            share_of_floor=floor / mine.median,
            device=device,
            threads=torch.get_num_threads(),
            simd_level=gencore.info()["cpu_module"]["simd_level"],
        )
        copied = limits.memory_floor(nbytes, device) / mine.median if nbytes else None
        benchmark.extra_info["share_of_copy_bandwidth"] = copied
        ROWS.append((request.node.name, mine.median, ratios, floor, limit, copied))

        def and_wait() -> None:
            ours()
            if clock == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(and_wait, rounds=10, iterations=max(1, int(0.005 / mine.median)), warmup_rounds=1)

    yield run
    # The compiler gives up on a function that was compiled for many shapes; the next case begins afresh.
    torch.compiler.reset()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not ROWS:
        return
    terminalreporter.section("ours against peers (times as long as ours), and the floor")
    for name, mine, ratios, floor, limit, copied in ROWS:
        against = "  ".join(f"{peer} {ratio:.2f}x" for peer, ratio in ratios.items())
        terminalreporter.write_line(f"{name:58} {1e6 * mine:10.1f} us   {against}")
        share = f"{'':58} {1e6 * floor:10.1f} us   floor by {limit}: ours is at {floor / mine:.0%} of it"
        share += "" if copied is None else f", at {copied:.0%} of a copy's bandwidth"
        terminalreporter.write_line(share)


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)
    machine_info.update(
        gencore=gencore.__version__, commit=_commit(), torch=torch.__version__, python=platform.python_version()
    )
    if config.getoption("device") == "cuda":
        told = gencore.info()
        machine_info.update(gpus=told["gpus"], cuda_module=told["cuda_module"], triton=told["triton"])
        machine_info.update(cuda=torch.version.cuda)
