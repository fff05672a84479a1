"""gencore.info()."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from gencore.info import info


def test_everything_is_said_and_json_can_hold_it():
    told = info()
    assert json.loads(json.dumps(told)) == told
    assert told["torch"] == torch.__version__
    assert told["threads"] == torch.get_num_threads()
    module = told["cpu_module"]
    assert module["simd_level"] in module["simd_compiled"]
    assert module["simd_level"] in module["simd_supported"]
    assert told["cuda_module"]["built"]
    for gpu_backend in ("cuda_module", "triton"):
        assert told[gpu_backend]["available"] == ("reason" not in told[gpu_backend])
    assert len(told["gpus"]) == torch.cuda.device_count()


def test_kernels_that_are_not_built_are_said_so():
    program = "import sys; sys.modules['gencore._cpu'] = None; import gencore"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "the compiled kernels, gencore._cpu, cannot be loaded; `pip install .` builds them" in done.stderr


def test_it_needs_torch_and_numpy_only():
    program = (
        "import sys\n"
        "for name in ('accelerate', 'matplotlib', 'PIL', 'safetensors', 'sklearn', 'tqdm', 'typer'):\n"
        "    sys.modules[name] = None\n"
        "from gencore.info import info\n"
        "print(info()['gencore'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_kernels_share_the_threads_of_torch():
    # Also when something else, as scikit-learn does, brings a runtime of its own.
    import sklearn.utils  # noqa: F401

    openmp = info()["openmp"]
    assert openmp["shared"] in (True, "unknown")
    assert openmp["runtime"].startswith("libgomp") or openmp["runtime"] == "unknown"
