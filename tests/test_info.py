"""gencore.info()."""

from __future__ import annotations

import builtins
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
    assert module["available"]
    assert module["simd_level"] in module["simd_compiled"]
    assert module["simd_level"] in module["simd_supported"]
    assert told["cuda_module"]["available"] or told["cuda_module"]["reason"]
    assert told["triton"].get("version") or told["triton"]["reason"]


def test_a_module_that_is_not_built_is_said(monkeypatch):
    real = builtins.__import__

    def without_backends(name, *arguments, **options):
        if name.startswith("gencore.backends"):
            raise ImportError("no _cpu here")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_backends)
    told = info()
    assert told["cpu_module"] == {"available": False, "reason": "gencore._cpu cannot be loaded: no _cpu here"}
    assert told["openmp"]["shared"] in (False, "unknown")


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
    # In a process of its own: the tests load scikit-learn, which brings a runtime of its own.
    program = "from gencore.info import info; print(info()['openmp']['shared'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() in ("True", "unknown"), done.stderr
