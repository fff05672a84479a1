"""The CUDA kernels once more, under AddressSanitizer and UndefinedBehaviorSanitizer.

These see what the emulator's own checks do not: overflows of local arrays and undefined arithmetic. All kernels are
compiled once more for it, which is why it is marked slow; .ci/run runs it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_emulation.emulator import sanitizer_environment, sanitizer_missing

ROOT = Path(__file__).resolve().parents[2]
# Every kernel and layout, and of the half types one, as they differ in conversions only, as do attention's float32 and
# float64; what the compiler and autograd do around them is not the sanitizers' business.
WHICH = "cuda and not (check or compiles or torch.float16 or (attention and torch.float64))"

# Further derivatives have tests of their own, of which small ones have all kernels.
PLACES = (
    "tests/ops",
    "tests/backends/test_group_norm_derivatives.py::test_only_what_is_wanted_is_made",
    "tests/backends/test_attention_derivatives.py::test_only_what_is_wanted_is_made",
    "tests/backends/test_attention_derivatives.py::test_options",
)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, kernels run on it")
def test_the_ops_are_clean():
    missing = sanitizer_missing()
    if missing is not None:
        pytest.skip(missing)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rs", "-p", "no:cacheprovider", *PLACES, "-k", WHICH]
    environment = sanitizer_environment() | {"GENCORE_EMULATOR": "sanitized", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
    # Some cases are not for an emulator; but there was one.
    assert "CUDA emulator" not in done.stdout, done.stdout[-3000:]
