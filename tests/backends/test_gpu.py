"""What only a real GPU can show: graphs, streams, devices, and that the kernels wait for nothing."""

from __future__ import annotations

import pytest
import torch
from kernels import running
from support import same_bits

import gencore
from gencore import Key, ops
from gencore.backends.reference.normal import normal as reference

if not torch.cuda.is_available():
    pytest.skip("torch finds no GPU to use", allow_module_level=True)


@pytest.fixture(params=["cuda", "triton"], autouse=True)
def gpu_backend(request):
    with running(request.param):
        yield request.param


def make_noise(seed: torch.Tensor, out: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """One of each op, with one key and with one per sample, all of it capturable."""
    ops.normal(out.shape, Key(seed).stream(3), out=out)
    mu, logvar = torch.zeros_like(out), torch.zeros_like(out)
    return ops.reparameterize_kl(mu, logvar, Key(rows)), ops.uniform(out.shape, Key(seed), device=out.device)


def test_a_captured_graph_makes_new_noise_for_new_seeds():
    seed, rows = torch.tensor(1, device="cuda"), torch.arange(6, device="cuda")
    out = torch.empty(6, 3001, device="cuda")
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        make_noise(seed, out, rows)
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (z, kl), uniform = make_noise(seed, out, rows)
    for new in (5, 2**62, -7):
        seed.fill_(new)
        rows.copy_(torch.arange(6) + new % 1000)
        graph.replay()
        assert same_bits(out, reference(out.shape, Key(new).stream(3)))
        assert torch.equal(z.cpu(), reference(out.shape, Key(torch.arange(6) + new % 1000)))
        assert torch.equal(kl.cpu(), torch.zeros(6))
        assert same_bits(uniform, ops.uniform(out.shape, Key(new), device="cuda"))


def test_a_key_on_the_host_is_captured_with_its_values():
    out = torch.empty(2, 100, device="cuda")
    ops.normal(out.shape, Key(3), out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.normal(out.shape, Key(4), out=out)
    graph.replay()
    assert same_bits(out, reference(out.shape, Key(4)))


def test_ops_run_on_the_current_stream():
    """The stream waits for a long time, so what another stream had computed would be there too early."""
    stream, other = torch.cuda.Stream(), torch.cuda.Stream()
    mu, logvar = torch.zeros(4, 1000, device="cuda"), torch.zeros(4, 1000, device="cuda")
    ops.reparameterize(mu, logvar, Key(1))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        mu.fill_(5)
        z = ops.reparameterize(mu, logvar, Key(1))
    done = stream.record_event()
    assert not done.query(), "the call waited for the GPU"
    with torch.cuda.stream(other):
        other.wait_event(done)
        copy = z.clone()
    other.synchronize()
    assert torch.equal(copy.cpu(), 5 + reference((4, 1000), Key(1)))


def test_the_backward_pass_runs_on_the_stream_of_the_forward_pass():
    logvar = torch.ones(4, 1000, device="cuda", requires_grad=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            logvar.fill_(0)
        z = ops.reparameterize(torch.zeros_like(logvar), logvar, Key(1))
        (grad,) = torch.autograd.grad(z.sum(), logvar)
    stream.synchronize()
    assert torch.equal(grad.cpu(), reference((4, 1000), Key(1)) / 2)


def test_no_op_makes_torch_synchronise():
    mu, logvar = (torch.randn(8, 4, 16, 16, device="cuda", requires_grad=True) for _ in range(2))
    keys = (Key(1), Key(torch.tensor(1, device="cuda")), Key(torch.arange(8, device="cuda")))
    for key in keys:
        ops.reparameterize_kl(mu, logvar, key)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for key in keys:
            z, kl = ops.reparameterize_kl(mu, logvar, key, num_samples=2)
            torch.autograd.grad((z.sum(), kl.sum()), (mu, logvar))
            ops.normal(mu.shape, key, device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("place", ["cuda", "cpu"])
def test_a_cuda_graph_of_the_compiler(place):
    """Keys on the CPU too: the graph must not freeze their values."""

    def draw(x, key):
        return x + ops.normal(x.shape, key, device=x.device) * 2

    compiled = torch.compile(draw, fullgraph=True, mode="reduce-overhead")
    x = torch.zeros(4, 100, device="cuda")
    for seed in range(4):
        key = Key(torch.tensor(seed, device=place))
        assert torch.equal(compiled(x, key).cpu(), 2 * reference((4, 100), Key(seed)))


def test_no_key_in_a_captured_graph_is_refused():
    out = torch.empty(2, 100, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(ValueError, match="key must be given where a CUDA graph is captured"), torch.cuda.graph(graph):
        ops.normal(out.shape, out=out)


def test_every_gpu_makes_the_same_noise():
    for index in range(torch.cuda.device_count()):
        drawn = ops.normal((3, 1001), Key(7), device=f"cuda:{index}")
        assert same_bits(drawn, reference((3, 1001), Key(7)))


def test_many_bits():
    """2^26 normals: a square root that is rounded wrongly once in ten million times would show."""
    drawn = ops.normal((1, 1 << 26), Key(11), device="cuda")
    with gencore.backend("cpu"):
        assert same_bits(drawn, ops.normal((1, 1 << 26), Key(11)))
