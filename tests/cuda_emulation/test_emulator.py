"""The emulator: kernels do what CUDA says, and each kind of fault is caught, with its twin that is right let through.

Where there is a GPU, the probes run on it too, and so show whether the emulator is right about CUDA.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_emulation.build import HERE, ROOT, build, build_with_nvcc, compiler
from cuda_emulation.emulator import Emulator, load, sanitizer_environment, sanitizer_missing

FOLDER = ROOT / "build" / "cuda_emulation"
LANES = np.arange(32)

needs_compiler = pytest.mark.skipif(compiler() is None, reason="there is no g++ to build the emulator with")
needs_sanitizers = pytest.mark.skipif(sanitizer_missing() is not None, reason=str(sanitizer_missing()))


def bad_module(flavour: str) -> Path:
    return build(
        [HERE / "bad_kernels.cu"], HERE / "bad_kernels.cpp", FOLDER, flavour, include=[HERE], name="_bad_kernels"
    )


@pytest.fixture(scope="module")
def emulated_probes() -> Emulator:
    if compiler() is None:
        pytest.skip("there is no g++ to build the emulator with")
    return Emulator(build([HERE / "probes.cu"], HERE / "probes.cpp", FOLDER, include=[HERE], name="_probes"))


@pytest.fixture(scope="module")
def gpu_probes() -> Any:
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc to build for the GPU with")
    path = build_with_nvcc([HERE / "probes.cu"], HERE / "probes.cpp", FOLDER, include=[HERE], name="_probes")
    return load(path)


Probe = Callable[..., None]


@pytest.fixture(params=["in order", "at random", *(["GPU"] if torch.cuda.is_available() else [])])
def probe(request: pytest.FixtureRequest) -> Iterator[Probe]:
    """probe("name", ...) runs a probe; what it writes is found in the tensors that were given."""
    if request.param == "GPU":
        module = request.getfixturevalue("gpu_probes")

        def run_on_gpu(name: str, *arguments: Any) -> None:
            placed = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
            getattr(module, name)(*(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in placed))
            for own, copy in zip(arguments, placed, strict=True):
                if isinstance(own, torch.Tensor):
                    own.copy_(copy)

        yield run_on_gpu
        return
    emulator = request.getfixturevalue("emulated_probes")

    def run(name: str, *arguments: Any) -> None:
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        with emulator.buffers(**{f"tensor{i}": tensor for i, tensor in enumerate(tensors)}):
            getattr(emulator.module, name)(*(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments))

    emulator.set_schedule(0 if request.param == "in order" else 12345)
    yield run
    emulator.set_schedule(0)


# The functions of a warp and of a block.


def shuffle_sources(how: int, operand: int, width: int) -> np.ndarray:
    """Which lane each lane gets the value of."""
    first, last = LANES & -width, LANES | (width - 1)
    if how == 0:
        return first | (operand & (width - 1))
    source = [None, LANES - operand, LANES + operand, LANES ^ operand][how]
    inside = source >= first if how == 1 else source <= last
    return np.where(inside, source, LANES)


@pytest.mark.parametrize("width", [32, 16, 8, 2, 1])
@pytest.mark.parametrize("how", range(4), ids=["index", "up", "down", "xor"])
@pytest.mark.parametrize("kind", ["int", "float", "double"])
def test_shuffles(probe: Probe, kind: str, how: int, width: int) -> None:
    dtype = {"int": torch.int32, "float": torch.float32, "double": torch.float64}[kind]
    values = torch.randn(64, dtype=torch.float64).mul(1e6).to(dtype)
    result = torch.zeros(64, 32, dtype=dtype)
    probe(f"shuffle_{kind}", values, result, 2, how, 32, width)
    for operand in range(32):
        sources = shuffle_sources(how, operand, width)
        expected = np.concatenate([values[:32].numpy()[sources], values[32:].numpy()[sources]])
        np.testing.assert_array_equal(result[:, operand].numpy(), expected)


def test_shuffles_of_two_masks_at_once(probe: Probe) -> None:
    values, result = torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    probe("shuffle_halves", values, result, 1)
    assert result.tolist() == [0, *range(15), *range(17, 32), 31]


@pytest.mark.parametrize("values", ["random", "zeros", "ones"])
def test_votes(probe: Probe, values: str) -> None:
    given = {"random": torch.randint(0, 3, (64,)), "zeros": torch.zeros(64), "ones": torch.ones(64)}[values].int()
    result = torch.zeros(64, 4, dtype=torch.int32)
    probe("votes", given, result, 64)
    for start in (0, 32):
        own = given[start : start + 32].numpy()
        ballot = int(((own != 0) << LANES.astype(np.uint64)).sum())
        for lane in range(32):
            match = int(((own == own[lane]) << LANES.astype(np.uint64)).sum())
            expected = [ballot, ballot == 2**32 - 1, ballot != 0, match]
            assert (result[start + lane].numpy().view(np.uint32) == expected).all()


def test_reductions_of_a_warp(probe: Probe) -> None:
    given = torch.randint(-(2**31), 2**31, (64,)).int()
    result = torch.zeros(64, 7, dtype=torch.int32)
    probe("reductions", given, result, 64)
    for start in (0, 32):
        own = given[start : start + 32].numpy()
        total = np.add.reduce(own, dtype=np.int32)
        bits = [np.bitwise_and.reduce(own), np.bitwise_or.reduce(own), np.bitwise_xor.reduce(own)]
        expected = [total, own.min(), own.max(), total, *bits]
        assert (result[start : start + 32].numpy() == expected).all()


@pytest.mark.parametrize("name", ["block_sum", "warp_sum"])
def test_sums_in_shared_memory(probe: Probe, name: str) -> None:
    values, sums = torch.randint(-9, 9, (5, 256)).float(), torch.zeros(5)
    probe(name, values, sums, 5)
    assert torch.equal(sums, values.sum(1))


@pytest.mark.parametrize("threads", [1, 33, 1024])
def test_dynamic_shared_memory(probe: Probe, threads: int) -> None:
    values, result = torch.randn(3, threads), torch.zeros(3, threads)
    probe("reverse", values, result, 3, threads)
    assert torch.equal(result, values.flip(1))


def test_neighbours(probe: Probe) -> None:
    values, result = torch.randn(100), torch.zeros(100)
    probe("pass_on", values, result, 100)
    assert torch.equal(result, values.roll(-1))


@pytest.mark.parametrize("count", [0, 1, 99, 100])
def test_votes_of_a_block(probe: Probe, count: int) -> None:
    values = torch.zeros(100, dtype=torch.int32)
    values[:count] = 2
    result = torch.zeros(100, 3, dtype=torch.int32)
    probe("barrier_votes", values[torch.randperm(100)], result, 100)
    assert (result == torch.tensor([count, count == 100, count > 0])).all()


@pytest.mark.parametrize(("grid", "block"), [((7, 1, 1), (33, 1, 1)), ((2, 3, 4), (5, 6, 7)), ((1, 1, 9), (2, 2, 64))])
def test_indices(probe: Probe, grid: tuple[int, ...], block: tuple[int, ...]) -> None:
    n = int(np.prod(grid) * np.prod(block))
    result = torch.full((n,), -1, dtype=torch.int32)
    probe("indices", result, *grid, *block)
    assert torch.equal(result, torch.arange(n, dtype=torch.int32))


def test_atomics(probe: Probe) -> None:
    values = torch.randint(-(2**20), 2**20, (1000,), dtype=torch.int32)
    result = torch.zeros(264, dtype=torch.int32)
    result[259] = -1
    probe("atomics_int", values, result, 1000)
    counts, others = result[:256], result[256:].tolist()
    own = values.numpy()
    assert torch.equal(counts, torch.bincount(values & 255, minlength=256).int())
    assert others[0] == others[7] == own.sum(dtype=np.int32)
    assert others[1:3] == [own.min(), own.max()]
    assert others[3] == np.bitwise_and.reduce(own)
    assert others[4] == np.bitwise_or.reduce(own)
    assert others[5] == np.bitwise_xor.reduce(own)
    assert others[6] in own


def test_atomic_sums(probe: Probe) -> None:
    values = torch.randint(-99, 99, (1000,)).float()
    single, double = torch.ones(1), torch.ones(1, dtype=torch.float64)
    probe("atomic_sums", values, single, double, 1000)
    assert single.item() == double.item() == values.sum().item() + 1


# Matrices and copies.


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matrix_product(probe: Probe, dtype: torch.dtype, transposed: bool) -> None:
    torch.manual_seed(1)
    for _ in range(5):
        a, b, d = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
        expected = d.double() + a.double() @ b.double()
        probe("matrix_product", a, b if transposed else b.T.contiguous(), d, dtype is torch.float16, transposed)
        torch.testing.assert_close(d.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("valid", [0, 128, 516, 640])
def test_asynchronous_copies(probe: Probe, valid: int) -> None:
    values, result = torch.randn(640), torch.ones(640)
    probe("copy_async", values, result, 640, valid)
    assert torch.equal(result[:valid], values[:valid])
    assert (result[valid:] == 0).all()


def test_vectors(probe: Probe) -> None:
    values, result = torch.randn(400), torch.zeros(400)
    probe("copy_vectors", values, result, 100)
    assert torch.equal(result, values)


# Arithmetic.


def floats_of_every_kind() -> torch.Tensor:
    """Halves of both kinds, the numbers midway between them and beside those, and random bits."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    parts = []
    for dtype in (torch.float16, torch.bfloat16):
        exact = bits.view(dtype).float()
        finite = exact[exact.isfinite()].unique()
        between = (finite[1:].double() + finite[:-1].double()).div(2).float()
        parts += [exact, between, between.nextafter(torch.tensor(np.inf)), between.nextafter(torch.tensor(-np.inf))]
    generator = np.random.default_rng(3)
    parts.append(torch.from_numpy(generator.integers(0, 2**32, 50000, dtype=np.uint32).view(np.float32)))
    return torch.cat([*parts, torch.tensor([np.inf, -np.inf, np.nan, 0.0, -0.0, 65504.0, 65519.99, 65520.0])])


def test_to_halves(probe: Probe) -> None:
    values = floats_of_every_kind()
    half, bfloat16 = (torch.zeros(len(values), dtype=torch.int16) for _ in range(2))
    probe("to_halves", values, half, bfloat16, len(values))
    for result, dtype in ((half, torch.float16), (bfloat16, torch.bfloat16)):
        expected = torch.where(values.isnan(), 0x7FFF, values.to(dtype).view(torch.int16))
        assert torch.equal(result, expected)


def test_from_halves(probe: Probe) -> None:
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    half, bfloat16 = torch.zeros(65536), torch.zeros(65536)
    probe("from_halves", bits, half, bfloat16, 65536)
    for result, dtype in ((half, torch.float16), (bfloat16, torch.bfloat16)):
        expected = bits.view(dtype).float()
        assert torch.equal(result.isnan(), expected.isnan())
        number = ~expected.isnan()
        assert torch.equal(result[number].view(torch.int32), expected[number].view(torch.int32))


def test_integer_functions(probe: Probe) -> None:
    generator = np.random.default_rng(4)
    a, b = generator.integers(0, 2**32, (2, 500), dtype=np.uint64)
    a[:4] = 0, 1, 2**31, 2**32 - 1
    result = torch.zeros(500, 9, dtype=torch.int32)
    to_tensor = lambda x: torch.from_numpy(x.astype(np.uint32).view(np.int32))  # noqa: E731
    probe("integer_functions", to_tensor(a), to_tensor(b), result, 500)
    for x, y, own in zip(map(int, a), map(int, b), result.numpy().view(np.uint32), strict=True):
        signed = (x - ((x >> 31) << 32)) * (y - ((y >> 31) << 32))
        eight = (y << 32 | x).to_bytes(8, "little")
        shift = y & 31
        assert own.tolist() == [
            x * y >> 32,
            signed >> 32 & 0xFFFFFFFF,
            x.bit_count(),
            32 - x.bit_length(),
            (x & -x).bit_length(),
            int(f"{x:032b}"[::-1], 2),
            int.from_bytes(bytes(eight[i] for i in (1, 5, 3, 7)), "little"),
            (y << 32 | x) << shift >> 32 & 0xFFFFFFFF,
            (y << 32 | x) >> shift & 0xFFFFFFFF,
        ]


def test_float_functions(probe: Probe) -> None:
    from gencore.noise import fma

    generator = np.random.default_rng(5)
    a, b, c = (generator.normal(size=(3, 2000)) * np.exp(generator.normal(size=(3, 2000)) * 8)).astype(np.float32)
    a[:8] = 0, -0.0, 0.5, 1.5, 2.5, -3, 3e9, 5e9
    result = torch.zeros(2000, 8)
    probe("float_functions", *map(torch.from_numpy, (a, b, c)), result, 2000)
    own = result.numpy()
    np.testing.assert_array_equal(own[:, 0], fma(a, b, c))
    np.testing.assert_array_equal(own[:, 1], np.sqrt(np.abs(a)))
    np.testing.assert_array_equal(own[:, 2], np.sqrt(np.abs(a)))
    np.testing.assert_array_equal(own[:, 3], np.minimum(a, b))
    np.testing.assert_array_equal(own[:, 4], np.maximum(a, b))
    np.testing.assert_array_equal(own[:, 5], a / b)
    np.testing.assert_array_equal(own[:, 6].view(np.int32), np.clip(np.rint(a.astype(float)), -(2**31), 2**31 - 1))
    np.testing.assert_array_equal(own[:, 7].view(np.uint32), np.clip(np.trunc(a.astype(float)), 0, 2**32 - 1))


def test_square_roots(probe: Probe) -> None:
    """Of 0 and every number in [1, 4): all other roots are one of these times a power of two."""
    wrong = torch.zeros(1, dtype=torch.int32)
    probe("square_roots", wrong)
    assert wrong.item() == 0


@pytest.mark.parametrize(("a", "b"), [(np.nan, 1.0), (1.0, np.nan), (np.nan, np.nan), (0.0, -0.0), (-0.0, 0.0)])
def test_smaller_and_greater(probe: Probe, a: float, b: float) -> None:
    result = torch.zeros(8)
    probe("float_functions", torch.tensor([a]), torch.tensor([b]), torch.tensor([1.0]), result, 1)
    if np.isnan([a, b]).any():
        assert result[3:5].isnan().all()
    else:
        assert torch.signbit(result[3:5]).tolist() == [True, False]


# Launches.


def test_a_wrong_configuration_is_refused(probe: Probe) -> None:
    probe("launch_only", 1024, 48 * 1024, 48 * 1024)
    probe("launch_only", 32, 100_000, 100_000)
    for wrong in [(1025, 0, 0), (0, 0, 0)]:
        with pytest.raises(RuntimeError, match="invalid configuration argument"):
            probe("launch_only", *wrong)
    for wrong in [(32, 100_001, 100_000), (32, 0, 228 * 1024)]:
        with pytest.raises(RuntimeError, match="invalid argument"):
            probe("launch_only", *wrong)


# What each kernel of bad_kernels.cu is caught with, and the line where, if the message names one.
FAULTS = {
    "read_out_of_bounds": "out of bounds: read of 4 bytes at .*, 0 bytes past the end of buffer 'data' .512 bytes",
    "write_out_of_bounds": "out of bounds: write of 4 bytes at .*, 0 bytes past the end of buffer 'data'",
    "write_before_buffer": "out of bounds: write of 4 bytes at .*, [48] bytes before buffer 'data'",
    "copy_out_of_bounds": "out of bounds: read of 12 bytes at .*, across the end of buffer 'data'",
    "static_shared_out_of_bounds": "out of bounds: write of .* past the end of the static shared memory .*::part",
    "dynamic_shared_out_of_bounds": "out of bounds: write of .* past the end of the dynamic shared memory",
    "null_pointer": "out of bounds: read of 4 bytes at 0x[0-9a-f]{1,3},",
    "other_stack": "another thread's stack: .* a local variable of thread .3, 0, 0.",
    "missing_barrier": "uninitialised shared memory|race",
    "missing_second_barrier": "race: .* with no barrier between",
    "missing_syncwarp": "uninitialised shared memory|race",
    "syncwarp_across_warps": "uninitialised shared memory|race",
    "syncwarp_of_some": "uninitialised shared memory|race",
    "adjacent_bytes": "race: write of 1 bytes",
    "atomic_and_plain": "race: .* atomic",
    "atomics_of_another_warp": "race: .* atomic",
    "counter_of_all_blocks": "race: .*; (other blocks of this launch accessed it atomically|block .* read it)",
    "two_blocks_write": "race: write of 4 bytes at .* buffer 'data' .*; block .* of this launch wrote it",
    "two_blocks_read_and_write": "race: .*; block .* of this launch",
    "ldg_after_write": "stale: __ldg of 4 bytes at .* buffer 'data' .*; written in this launch",
    "write_after_ldg": "stale: write of 4 bytes at .* buffer 'data' .*; read by __ldg in this launch",
    "ldg_from_shared": "not global memory: __ldg of 4 bytes",
    "store_to_shared": "not global memory: write of 16 bytes",
    "store_to_stack": "not global memory: write of 16 bytes",
    "copy_from_shared": "not global memory: read of 16 bytes",
    "divergent_barrier": "__syncthreads is not reached by all threads of the block: .* returned",
    "two_barriers": "a barrier in divergent code",
    "barrier_after_return": "__syncthreads is not reached by all threads of the block: .* returned",
    "static_shared_unwritten": "uninitialised shared memory: read of 4 bytes at .* 36 bytes into the static shared",
    "dynamic_shared_unwritten": "uninitialised shared memory: read of 4 bytes at .* 36 bytes into the dynamic shared",
    "shared_of_another_block": "block .1, 0, 0.*uninitialised shared memory",
    "shuffle_after_return": "a lane is missing: .*lane 31 has returned",
    "shuffle_against_barrier": "a lane is missing: .* waits at __syncthreads",
    "shuffle_without_caller": "__shfl_sync: mask 0x0000ffff lacks the caller, lane",
    "different_shuffles": "lanes of a warp are at different collectives",
    "different_syncwarps": "race|uninitialised shared memory",
    "too_many_syncwarps": "the emulator counts no more than 131070 __syncwarp",
    "active_lanes": "__activemask: the lanes that are active are not defined by the program",
    "lane_that_does_not_exist": "a lane is missing: .* lane 16 does not exist",
    "misaligned_load": "misaligned: .* no multiple of 16",
    "misaligned_store": "misaligned: .* no multiple of 8",
    "misaligned_row": "misaligned: read of 16 bytes .*::tile",
    "copy_not_waited_for": "a copy that is still on its way: .* not waited for",
    "copy_without_barrier": "race|a copy that is still on its way|uninitialised shared memory",
    "copy_from_beyond": "out of bounds: read of 16 bytes at .* bytes past the end of buffer 'data'",
    "endless_wait": "no progress: 10 million accesses",
    "circle": "no progress, every thread waits for another: .*__syncwarp .* with mask 0x00000005",
}
# Overflows of local arrays, and what only UndefinedBehaviorSanitizer sees.
ONLY_SANITIZED = {"local_array_out_of_bounds"}


@pytest.fixture(scope="module")
def bad_kernels() -> Emulator:
    return Emulator(bad_module("checked"))


@needs_compiler
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught(bad_kernels: Emulator, name: str, seed: int) -> None:
    data = torch.zeros(128)
    bad_kernels.set_schedule(seed)
    with bad_kernels.buffers(data=data), pytest.raises(RuntimeError, match=FAULTS[name]) as caught:
        bad_kernels.module.run(name, False, data.data_ptr(), 128)
    message = str(caught.value)
    assert re.match(rf"kernel bad::{name}<false>, block \([01], 0, 0\), thread \(\d+, 0, 0\): ", message)
    if name != "circle":
        assert message.endswith("]")
        line = int(re.search(r"\[tests/cuda_emulation/bad_kernels.cu:(\d+)\]$", message)[1])
        assert kernel_of_line(line) == name


@needs_compiler
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", [*FAULTS, *ONLY_SANITIZED])
def test_what_is_right_passes(bad_kernels: Emulator, name: str, seed: int) -> None:
    data = torch.zeros(128)
    bad_kernels.set_schedule(seed)
    with bad_kernels.buffers(data=data):
        bad_kernels.module.run(name, True, data.data_ptr(), 128)


def kernel_of_line(number: int) -> str:
    lines = (HERE / "bad_kernels.cu").read_text().splitlines()
    return re.findall(r"__global__ void (\w+)\(", "\n".join(lines[:number]))[-1]


def test_every_bad_kernel_is_tested() -> None:
    kernels = re.findall(r"__global__ void (\w+)\(", (HERE / "bad_kernels.cu").read_text())
    assert sorted(kernels) == sorted([*FAULTS, *ONLY_SANITIZED])


@needs_compiler
def test_a_schedule_is_the_same_again_and_others_differ(emulated_probes: Emulator) -> None:
    """Atomic exchanges tell which thread was the last."""
    values = torch.arange(1000, dtype=torch.int32)
    last = {}
    for seed in (0, 1, 2, 1, 2, 0):
        result = torch.zeros(264, dtype=torch.int32)
        emulated_probes.set_schedule(seed)
        with emulated_probes.buffers(values=values, result=result):
            emulated_probes.module.atomics_int(values.data_ptr(), result.data_ptr(), 1000)
        assert last.setdefault(seed, result[262].item()) == result[262].item()
    emulated_probes.set_schedule(0)
    assert last[0] == 999
    assert len(set(last.values())) == 3


@needs_compiler
def test_a_module_stands_beside_another(emulated_probes: Emulator, bad_kernels: Emulator) -> None:
    """What is registered in one does not count in the other."""
    values, result = torch.zeros(32), torch.zeros(32)
    nothing = emulated_probes.buffers()
    fault = pytest.raises(RuntimeError, match="out of bounds: read of 4 bytes")
    with bad_kernels.buffers(values=values, result=result), nothing, fault:
        emulated_probes.module.pass_on(values.data_ptr(), result.data_ptr(), 32)


# The flavour with AddressSanitizer and UndefinedBehaviorSanitizer.


@pytest.fixture(scope="module")
def sanitized_path() -> Path:
    return bad_module("sanitized")


SANITIZED_FAULTS = {
    "write_out_of_bounds": "AddressSanitizer: heap-buffer-overflow",
    "dynamic_shared_out_of_bounds": "AddressSanitizer: heap-buffer-overflow",
    "static_shared_out_of_bounds": "index 64 out of bounds",
    "local_array_out_of_bounds": "index 4 out of bounds",
    "copy_from_beyond": "RuntimeError: .*out of bounds: 16 bytes",
    "store_to_shared": "RuntimeError: .*not global memory",
    "store_to_stack": "RuntimeError: .*not global memory",
    "divergent_barrier": "RuntimeError: .*__syncthreads is not reached by all threads",
    "endless_wait": "RuntimeError: .*no progress",
}


def run_sanitized(path: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Runs ``run(name, right)`` in another process, with a block of memory of exactly 128 floats."""
    start = f"""
import ctypes
from pathlib import Path
from cuda_emulation.emulator import Emulator
module = Emulator(Path({str(path)!r})).module
memory = ctypes.CDLL(None)
memory.aligned_alloc.restype = ctypes.c_void_p
data = memory.aligned_alloc(ctypes.c_size_t(16), ctypes.c_size_t(512))
ctypes.memset(ctypes.c_void_p(data), 0, 512)
def run(name, right):
    module.run(name, right, data, 128)
"""
    environment = {**sanitizer_environment(), "PYTHONPATH": str(HERE.parent)}
    return subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, env=environment)


@needs_sanitizers
def test_what_is_right_passes_the_sanitizers(sanitized_path: Path) -> None:
    done = run_sanitized(sanitized_path, f"for name in {[*FAULTS, *ONLY_SANITIZED]}:\n    run(name, True)")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@needs_sanitizers
@pytest.mark.parametrize("name", SANITIZED_FAULTS)
def test_a_fault_is_caught_by_the_sanitizers(sanitized_path: Path, name: str) -> None:
    done = run_sanitized(sanitized_path, f"run({name!r}, False)")
    assert done.returncode != 0
    assert re.search(SANITIZED_FAULTS[name], done.stderr), done.stderr


@needs_sanitizers
def test_an_abandoned_launch_leaves_nothing_behind(sanitized_path: Path) -> None:
    """AddressSanitizer must forget the stacks of threads that did not end."""
    code = """
for _ in range(3):
    for name in ("divergent_barrier", "circle", "shuffle_after_return"):
        try:
            run(name, False)
        except RuntimeError:
            run(name, True)
            run("local_array_out_of_bounds", True)
        else:
            raise SystemExit("no fault")
"""
    done = run_sanitized(sanitized_path, code)
    assert done.returncode == 0, done.stderr
