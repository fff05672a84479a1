"""Which backend runs an op, and what is said where none does."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from kernels import emulated, forget_backends
from support import same_bits
from torch._subclasses.fake_tensor import FakeTensorMode

import gencore
from gencore import Key, ops
from gencore._ops import OPS
from gencore.backends import choice, cpu, cuda
from gencore.ops import _library

CUDA = torch.device("cuda", 0)


@pytest.fixture
def without_a_gpu(monkeypatch):
    """As on a machine with torch's CPU build, Triton not interpreted."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(choice, "_is_interpreted", lambda: False)
    forget_backends()
    yield
    forget_backends()


def test_the_device_decides(without_a_gpu):
    assert choice.choose(torch.device("cpu")) == "cpu"
    with pytest.raises(
        ValueError, match="no backend serves tensors on cuda:0: cpu: it serves tensors on the CPU; cuda: "
    ):
        choice.choose(CUDA)
    with pytest.raises(
        ValueError, match=r"no backend serves tensors on xla:0: cpu: .*; cuda: it serves tensors on NVIDIA"
    ):
        choice.choose(torch.device("xla", 0))


def test_cuda_comes_before_triton(monkeypatch):
    monkeypatch.setattr(choice, "refusal", lambda name, device: "it is the CPU's" if name == "cpu" else None)
    forget_backends()
    assert choice.choose(CUDA) == "cuda"
    monkeypatch.setattr(choice, "refusal", lambda name, device: None if name == "triton" else f"no {name}")
    forget_backends()
    assert choice.choose(CUDA) == "triton"
    forget_backends()


def test_a_kernel_that_the_first_backend_lacks_is_the_next_ones(monkeypatch):
    served = {
        "cuda": SimpleNamespace(group_norm="cuda's"),
        "triton": SimpleNamespace(group_norm="triton's", group_norm_jvp="triton's"),
    }
    monkeypatch.setattr(choice, "refusal", lambda name, device: None if name in served else "no")
    monkeypatch.setattr(choice, "load", served.get)
    forget_backends()
    tensor = SimpleNamespace(is_cpu=False, device=CUDA)
    assert [choice.runner_of(op, CUDA) for op in ("group_norm", "group_norm_jvp", "add")] == ["cuda", "triton", None]
    assert [choice.has_kernel(op, tensor) for op in ("group_norm", "group_norm_jvp", "add")] == [True, True, False]
    assert choice.kernel("group_norm_jvp", tensor) == "triton's"
    with pytest.raises(AttributeError, match="add"):
        choice.kernel("add", tensor)
    with gencore.backend("cuda"):
        # Nothing is handed over to another backend than the one that is named.
        assert not choice.has_kernel("group_norm_jvp", tensor)
    monkeypatch.setattr(choice, "refusal", lambda name, device: f"no {name}")
    forget_backends()
    with pytest.raises(choice.NoBackend, match="no cuda"):
        choice.has_kernel("group_norm_jvp", tensor)
    forget_backends()


def test_a_named_backend_that_cannot_serve_says_why(without_a_gpu):
    with (
        gencore.backend("triton"),
        pytest.raises(
            ValueError, match=r'backend\("triton"\) is in force, which does not serve .* cpu: triton: it serves'
        ),
    ):
        ops.normal((2, 2))
    with (
        gencore.backend("cuda"),
        pytest.raises(
            ValueError, match=r"the device of mu must be one that a backend serves; .*cuda: it serves tensors on"
        ),
    ):
        ops.reparameterize(torch.zeros(2, 2, requires_grad=True), torch.zeros(2, 2))
    with gencore.backend("cuda"), pytest.raises(ValueError, match=r'backend\("cuda"\) is in force'):
        ops.reparameterize(torch.zeros(2, 2), torch.zeros(2, 2))
    assert ops.normal((2, 2)).shape == (2, 2)


def test_contexts_nest_and_end_with_an_error():
    assert choice.named() is None
    with gencore.backend("cpu"):
        with pytest.raises(KeyError), gencore.backend("triton"):
            raise KeyError(choice.named())
        assert choice.named() == "cpu"
    assert choice.named() is None


@pytest.mark.parametrize("name", ["CPU", "", None, "cudnn"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="name must be one of cpu, cuda, triton, got"), gencore.backend(name):
        pass


def test_the_backward_pass_follows_the_context():
    logvar = torch.zeros(3, 10, requires_grad=True)
    with emulated() as backend, gencore.backend("cuda"):
        calls = []
        module = backend._module
        backend._module = type(
            "Recorded", (), {"__getattr__": lambda _, name: (calls.append(name), getattr(module, name))[1]}
        )()
        ops.reparameterize(torch.zeros(3, 10), logvar, Key(1)).sum().backward()
    assert calls == ["reparameterize", "reparameterize_backward"]


def test_a_compiled_function_follows_the_context_when_it_runs():
    draw = torch.compile(lambda key: ops.normal((4, 5), key) + 1, fullgraph=True)
    here = draw(Key(1))
    with emulated() as backend, gencore.backend("cuda"):
        calls, normal_ = [], backend.normal_

        def recorded(*args):
            calls.append(args)
            normal_(*args)

        backend.normal_ = recorded
        assert same_bits(draw(Key(1)), here)
    assert len(calls) == 1


# ------------------------------------------------------------------------------------------------ reasons


def test_the_reasons_of_the_cuda_backend(monkeypatch):
    find_spec = cuda.importlib.util.find_spec
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: None)
    assert cuda.unavailable().startswith("this gencore has no CUDA module: ")
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda.unavailable() == "the CUDA module is built, but this torch is not built with CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.unavailable() == "the CUDA module is built, but torch finds no GPU to use"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cuda.unavailable() is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert cuda.refusal(CUDA) == "it needs a GPU of compute capability 8.0 or later, and Tesla T4 has 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def broken():
        raise ImportError("undefined symbol: x")

    monkeypatch.setattr(cuda, "load", broken)
    assert cuda.refusal(CUDA) == "gencore._cuda cannot be loaded: undefined symbol: x"
    module = SimpleNamespace(unusable=lambda index: "no kernel image is available for execution on the device")
    monkeypatch.setattr(cuda, "load", lambda: SimpleNamespace(_module=module))
    assert cuda.refusal(CUDA).endswith(") cannot use it: no kernel image is available for execution on the device")
    module.unusable = lambda index: ""
    assert cuda.refusal(CUDA) is None
    monkeypatch.setattr(cuda.importlib.util, "find_spec", find_spec)


def test_the_reasons_of_the_triton_backend(monkeypatch):
    monkeypatch.setattr(choice, "_is_interpreted", lambda: False)
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    assert choice.refusal("triton", CUDA) == "the package triton is not installed"
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choice.refusal("triton", CUDA) == "torch finds no GPU to use"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def broken():
        raise ImportError("no libLLVM")

    monkeypatch.setattr(choice, "_load_triton", broken)
    assert choice.refusal("triton", CUDA) == "triton cannot be loaded: no libLLVM"
    monkeypatch.setattr(choice, "_is_interpreted", lambda: True)
    assert choice.refusal("triton", CUDA) == "it is interpreted, on the CPU"


def test_neither_the_cuda_module_nor_triton_is_loaded_for_the_cpu():
    program = (
        "import sys, torch, gencore\n"
        "gencore.ops.normal((2, 2)); gencore.info()\n"
        "print([name for name in sys.modules if name in ('gencore._cuda', 'triton', 'gencore.backends.triton')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    if not torch.cuda.is_available():
        assert done.stdout.split() == ["[]"]


# ------------------------------------------------------------------------------------------------ explain


def test_explain_on_the_cpu(without_a_gpu):
    told = gencore.explain(ops.normal, (64, 1000), Key(1))
    assert (told.op, told.device, told.chosen, told.notes) == ("normal", "cpu", "cpu", ())
    assert told.reasons == {"cuda": "it serves tensors on NVIDIA GPUs", "triton": "it serves tensors on GPUs"}
    assert str(told).splitlines() == [
        f"normal on cpu: cpu, {cpu.simd_level()} on up to {torch.get_num_threads()} threads",
        "  not cuda: it serves tensors on NVIDIA GPUs",
        "  not triton: it serves tensors on GPUs",
    ]


def test_explain_where_nothing_serves(without_a_gpu):
    told = gencore.explain(ops.normal, (2, 2), device="cuda")
    assert told.chosen is None
    assert set(told.reasons) == {"cpu", "cuda", "triton"}
    assert str(told).startswith("normal on cuda: no backend, it would raise\n  not cpu: it serves tensors on the CPU\n")


def test_explain_says_what_is_copied():
    mu = torch.zeros(4, 6, 5).transpose(0, 1)
    told = gencore.explain(ops.reparameterize, mu.requires_grad_(), torch.zeros(6, 4, 5), Key(torch.arange(6)))
    assert told.notes == ("mu is neither contiguous nor channels_last, so it goes through a copy that is",)


def test_explain_in_a_context():
    with emulated(), gencore.backend("cuda"):
        told = gencore.explain(ops.reparameterize_kl, torch.zeros(2, 3), torch.zeros(2, 3))
    assert told.chosen == "cuda"
    assert told.reasons["cpu"] == 'backend("cuda")'


def test_explain_computes_nothing_and_leaves_the_generators_alone():
    torch.manual_seed(1)
    state, out = torch.get_rng_state(), torch.full((2, 3), 7.0)
    gencore.explain(ops.normal, (2, 3), out=out)
    gencore.explain(ops.reparameterize, out, out)
    assert torch.equal(out, torch.full((2, 3), 7.0))
    assert torch.equal(torch.get_rng_state(), state)


def test_explain_refuses_what_the_call_would_refuse():
    with pytest.raises(TypeError, match="dtype must be one of"):
        gencore.explain(ops.normal, (2, 3), dtype=torch.int32)
    with pytest.raises(ValueError, match="op must be a function that calls an op of gencore, got"):
        gencore.explain(torch.add, torch.zeros(2), torch.zeros(2))


def test_tensors_without_data_may_be_on_a_gpu_that_is_not_here(without_a_gpu):
    with FakeTensorMode():
        assert ops.normal((2, 3), Key(1), device="cuda").device.type == "cuda"
        mu = torch.empty(2, 3, device="cuda")
        assert ops.reparameterize(mu, mu, Key(1)).device.type == "cuda"


def test_the_cpu_has_every_kernel_that_the_rows_name():
    """A name in a row that nobody has would be a kernel that nobody misses."""
    names = {kernel.name for op in OPS for kernel in op.kernels}
    assert {name for name in names if not hasattr(cpu.ops, name)} == set()


def test_what_triton_has_for_an_op_the_rows_name():
    """A kernel that a row does not name would not be exported, and PyTorch's operations run in its place."""
    pytest.importorskip("triton")
    for op in OPS:
        module = importlib.import_module(f"gencore.backends.triton.{op.stem}")
        own = {name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
        public = {name for name in own if not name.startswith("_") and inspect.isfunction(vars(module)[name])}
        assert public <= {kernel.name for kernel in op.kernels}
        exported = importlib.import_module("gencore.backends.triton")
        assert all(vars(exported)[name] is vars(module)[name] for name in public)


def test_another_thread_is_not_explaining():
    """What explain() sets is its own thread's: another's calls run the kernels that there are."""
    with _library.explaining():
        assert _library._is_explaining.get()
        seen: list[bool] = []
        thread = threading.Thread(target=lambda: seen.append(_library._is_explaining.get()))
        thread.start()
        thread.join()
    assert seen == [False]
    assert not _library._is_explaining.get()
