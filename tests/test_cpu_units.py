"""How group norm's and attention's work is given to threads on the CPU: none may be idle where there is work for it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Prints for each number of threads: the threads that are used, how many find work at all, and the segments of all units
# over those of the busiest thread.
PROGRAM = """
#include "channels.h"

#include <cstdio>
#include <cstdlib>

int main(int argc, char** argv) {
  using namespace gencore::cpu::scalar;
  const gencore::GroupNormShape shape{std::atoll(argv[1]), std::atoll(argv[2]), std::atoll(argv[3]),
                                      std::atoll(argv[4]), std::atoi(argv[5]) != 0};
  for (int i = 6; i < argc; ++i) {
    const Units units(shape, false);
    const int team = units.team(std::atoi(argv[i]));
    const auto up = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
    const std::int64_t busiest =
        units.shared(team) ? units.count * up(units.segments, team) : up(units.count, team) * units.segments;
    std::printf("%d %d %f\\n", team, static_cast<int>(std::max(units.count, units.segments)),
                static_cast<double>(units.count * units.segments) / static_cast<double>(busiest));
  }
}
"""


# Prints for each number of threads: the threads that are used, items, tiles of queries, and tiles of the largest item.
ATTENTION = """
#include "attention_tiles.h"

#include <cstdio>
#include <cstdlib>

int main(int argc, char** argv) {
  using namespace gencore::cpu::scalar;
  const gencore::AttentionShape shape{std::atoll(argv[1]), std::atoll(argv[2]), std::atoll(argv[3]),
                                      std::atoll(argv[4]), std::atoll(argv[5]), std::atoll(argv[2]),
                                      std::atoll(argv[5])};
  for (int i = 6; i < argc; ++i) {
    const Plan plan(shape, std::atoi(argv[i]), sizeof(float));
    std::printf("%d %lld %lld %lld\\n", plan.team, static_cast<long long>(plan.items),
                static_cast<long long>(plan.tiles * shape.batch * shape.heads),
                static_cast<long long>(plan.tiles_per_item));
  }
}
"""


def compiled(source: str, folder: Path) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    (folder / "units.cpp").write_text(source)
    include = [f"-I{ROOT / 'csrc' / 'cpu'}", f"-I{ROOT / 'csrc' / 'include'}"]
    subprocess.run(
        [compiler, "-std=c++20", "-DGENCORE_SIMD=scalar", *include, folder / "units.cpp", "-o", folder / "units"],
        check=True,
    )
    return folder / "units"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(PROGRAM, tmp_path_factory.mktemp("units"))


@pytest.fixture(scope="module")
def attention_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(ATTENTION, tmp_path_factory.mktemp("attention_units"))


@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [
        ((4, 320, 64 * 64, 32), False),
        ((4, 640, 32 * 32, 32), False),
        ((1, 320, 64 * 64, 32), False),
        ((1, 128, 80 * 80, 32), False),
        ((1, 6, 300 * 200, 1), False),
        ((4, 320, 64 * 64, 32), True),
        ((1, 512, 128 * 128, 32), True),
        ((16, 320, 14 * 14, 32), True),
        ((3, 320, 14 * 14, 32), True),
    ],
)
def test_threads_have_work(program, shape, channels_last):
    numbers = (1, 2, 3, 6, 12, 24, 48)
    arguments = [*map(str, shape), str(int(channels_last)), *map(str, numbers)]
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        team, most, speedup = (float(word) for word in line.split())
        # Threads share one unit or take one each; the last round may leave nearly half of them without work.
        assert speedup >= min(team, most) / 2, (team, most, speedup)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 64, 4096, 512),
        (1, 1, 256, 256, 256),
        (1, 1, 1024, 1024, 40),
        (1, 1, 4096, 4096, 512),
        (1, 8, 4096, 4096, 40),
        (16, 4, 256, 256, 64),
        (5, 3, 1000, 77, 80),
    ],
)
def test_attention_has_work_for_every_thread(attention_program, shape):
    numbers = (1, 2, 3, 6, 12, 48)
    done = subprocess.run(
        [attention_program, *map(str, (*shape, *numbers))], capture_output=True, text=True, check=True
    )
    batch, heads, queries, _, _ = shape
    for number, line in zip(numbers, done.stdout.splitlines(), strict=True):
        team, items, tiles, of_item = map(int, line.split())
        # As many as there are threads, or vectors of sixteen queries.
        assert team == min(number, batch * heads * -(-queries // 16), items)
        assert team == number or items == batch * heads * -(-queries // 16)
        # The busiest thread has at most twice its share.
        assert -(-items // team) * of_item <= max(2 * tiles / team, 1), (number, team, items, tiles, of_item)
