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
from gencore.bench.measure import Timing, interleave

ROWS: list[tuple[str, float, dict[str, float], float, str]] = []


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """``compare(ours, peers, floor, limit)``: functions without arguments; seconds, and the name of the limit."""

    def run(ours: Callable[[], Any], peers: dict[str, Callable[[], Any]], floor: float, limit: str) -> None:
        timings: dict[str, Timing] = interleave({"ours": ours, **peers})
        mine = timings["ours"]
        ratios = {name: mine.ratio_of(timings[name]) for name in peers}
        benchmark.extra_info.update(
            seconds={name: timing.median for name, timing in timings.items()},
            ratios=ratios,
            floor_seconds=floor,
            limit=limit,
            share_of_floor=floor / mine.median,
            threads=torch.get_num_threads(),
            simd_level=gencore.info()["cpu_module"]["simd_level"],
        )
        ROWS.append((request.node.name, mine.median, ratios, floor, limit))
        benchmark.pedantic(ours, rounds=10, iterations=max(1, int(0.005 / mine.median)), warmup_rounds=1)

    yield run
    # The compiler gives up on a function that was compiled for many shapes; the next case begins afresh.
    torch.compiler.reset()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not ROWS:
        return
    terminalreporter.section("ours against peers (times as long as ours), and the floor")
    for name, mine, ratios, floor, limit in ROWS:
        against = "  ".join(f"{peer} {ratio:.2f}x" for peer, ratio in ratios.items())
        terminalreporter.write_line(f"{name:58} {1e6 * mine:10.1f} us   {against}")
        share = f"{'':58} {1e6 * floor:10.1f} us   floor by {limit}: ours is at {floor / mine:.0%} of it"
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
