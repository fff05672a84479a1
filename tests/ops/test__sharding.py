"""Ops on DTensors, shared out by two processes: the values and gradients of one process, the noise bit by bit."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

from gencore import Key, diffusion, nn, ops

SCHEDULE, KEY = diffusion.linear(10), Key(5).stream(1).samples(3)
ROW = ops.step_coefficients(x=0.9, direct=0.1, noise=0.5)
ROWS = ops.step_coefficients(x=[0.9, 0.8, 0.7], direct=0.1, noise=0.5)

FILTER = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8

# Of images, parameters of channels, an embedding and steps of the schedule; the batch is odd.
CASES = {
    "group_norm": lambda x, w, e, t: ops.group_norm(x, 2, w, w, scale=e, activation="silu"),
    "bias_act": lambda x, w, e, t: ops.bias_act(x, w, "gelu"),
    "bias_act, from y": lambda x, w, e, t: ops.bias_act(x, w, "leaky_relu", gain=2.0, clamp=1.0),
    "attention": lambda x, w, e, t: ops.attention(x, x, x),
    "spatial_attention": lambda x, w, e, t: ops.spatial_attention(torch.cat((x, x, x), 1), 2),
    "upfirdn2d": lambda x, w, e, t: ops.downsample2d(ops.upsample2d(x, FILTER), FILTER),
    "reparameterize": lambda x, w, e, t: ops.reparameterize(x, x, KEY),
    "a key per sample": lambda x, w, e, t: ops.reparameterize(x, x, Key(torch.tensor([4, 5, 6]))),
    "several draws": lambda x, w, e, t: ops.reparameterize(x, x, KEY, num_samples=2),
    "the noise kept": lambda x, w, e, t: ops.reparameterize(x, x, KEY, num_samples=2, save_noise=True),
    "reparameterize_kl": lambda x, w, e, t: ops.reparameterize_kl(x, x, KEY)[1],
    "add_noise": lambda x, w, e, t: ops.add_noise(x, t, SCHEDULE, KEY),
    "one step for all": lambda x, w, e, t: ops.add_noise(x, 4, SCHEDULE, KEY),
    "the noise itself": lambda x, w, e, t: ops.add_noise(x, t, SCHEDULE, KEY, return_noise=True)[1] + x,
    "denoising_loss": lambda x, w, e, t: ops.denoising_loss(x, x * 2, t, SCHEDULE, KEY),
    "noise at hand": lambda x, w, e, t: ops.denoising_loss(x, x * 2, t, SCHEDULE, noise=x * 3),
    "diffusion_step": lambda x, w, e, t: ops.diffusion_step(x, x, ROW, KEY),
    "a row per sample": lambda x, w, e, t: ops.diffusion_step(x, x, ROWS, KEY, history=(x,), threshold=0.9),
}


def _tensors() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x, w, e = (torch.randn(shape, generator=generator) for shape in ((3, 4, 4, 6), (4,), (3, 4)))
    return x, w, e, torch.tensor([1, 5, 9])


def _placed(tensor: torch.Tensor, mesh: Any, placement: Any) -> DTensor:
    if isinstance(placement, Partial) and tensor.is_floating_point():
        return DTensor.from_local(tensor / 2, mesh, [placement])
    # Parameters are whole everywhere, and what has no such dimension too.
    fits = isinstance(placement, Shard) and placement.dim < tensor.dim() and tensor.shape[0] == 3
    return distribute_tensor(tensor, mesh, [placement if fits else Replicate()])


def _with_gradients(function: Any, tensors: Any) -> tuple[Any, ...]:
    tensors = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in tensors]
    result = function(*tensors)
    result.square().sum().backward()
    return result, *(tensor.grad for tensor in tensors)


def _fault(case: Any, mesh: Any, placement: Any) -> str | None:
    tensors = _tensors()
    wanted = _with_gradients(case, tensors)
    got = _with_gradients(case, [_placed(tensor, mesh, placement) for tensor in tensors])
    if not torch.equal(got[0].full_tensor(), wanted[0]):
        return "another value"
    for grad, want in zip(got[1:], wanted[1:], strict=True):
        if (grad is None) != (want is None):
            return "another gradient is there"
        if grad is not None and not torch.allclose(grad.full_tensor(), want, rtol=1e-5, atol=1e-5):
            return "another gradient"
    return None


def _written(mesh: Any) -> dict[str, bool]:
    """Ops that write to a DTensor."""
    x = _tensors()[0]

    def out() -> DTensor:
        return distribute_tensor(x.clone(), mesh, [Shard(0)])

    pairs = {
        "normal": (ops.normal(x.shape, KEY, out=out()), ops.normal(x.shape, KEY)),
        "add_noise": (ops.add_noise(out(), 4, SCHEDULE, KEY, out=out()), ops.add_noise(x, 4, SCHEDULE, KEY)),
        "group_norm": (ops.group_norm(out(), 2, out=out()), ops.group_norm(x, 2)),
        "bias_act": (ops.bias_act(y := out(), None, "tanh", out=y), ops.bias_act(x, None, "tanh")),
        "diffusion_step": (ops.diffusion_step(y := out(), y, ROW, KEY, out=y), ops.diffusion_step(x, x, ROW, KEY)),
    }
    return {name: torch.equal(got.full_tensor(), want) for name, (got, want) in pairs.items()}


def _refusals(mesh: Any) -> dict[str, str]:
    x, _, _, t = _tensors()
    sharded = distribute_tensor(x, mesh, [Shard(0)])
    calls = {
        "no key": lambda: ops.reparameterize(sharded, sharded),
        "steps": lambda: ops.add_noise(sharded, t, SCHEDULE, KEY),
        "out": lambda: ops.add_noise(sharded, 4, SCHEDULE, KEY, out=distribute_tensor(x.clone(), mesh, [Shard(1)])),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
        except (TypeError, ValueError) as error:
            said[name] = str(error)
    return said


def _process(rank: int, port: int, reports: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    placements = (Shard(0), Replicate(), Shard(1), Partial())
    report: dict[str, Any] = {
        f"{name}, {placement}": fault
        for placement in placements
        for name, case in CASES.items()
        if (fault := _fault(case, mesh, placement)) is not None
    }
    x = _tensors()[0]
    sharded = distribute_tensor(x, mesh, [Shard(0)])
    # The work is shared out, and by heads where those are.
    report["kept"] = [
        ops.reparameterize(sharded, sharded, KEY).to_local().shape[0] == (2, 1)[rank],
        ops.attention(*[distribute_tensor(x, mesh, [Shard(1)])] * 3).placements == (Shard(1),),
    ]
    compiled = torch.compile(CASES["reparameterize"], backend="aot_eager", fullgraph=True)
    report["compiled"] = torch.equal(compiled(sharded, None, None, None).full_tensor(), ops.reparameterize(x, x, KEY))
    unet = nn.UNet(in_channels=4, channels=(8,), num_groups=4, blocks_per_level=1, num_classes=2)
    want = unet(x, torch.ones(3))
    times = distribute_tensor(torch.ones(3), mesh, [Shard(0)])
    got = torch.distributed.tensor.distribute_module(unet, mesh)(sharded, times)
    report["unet"] = torch.allclose(got.full_tensor(), want, atol=1e-6)
    report["written"], report["refusals"] = _written(mesh), _refusals(mesh)
    reports.put(report)
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def reports():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    torch.multiprocessing.spawn(_process, (port, queue), nprocs=2)
    return [queue.get() for _ in range(2)]


def test_values_and_gradients_are_those_of_one_process(reports):
    for report in reports:
        assert [f"{name}: {fault}" for name, fault in report.items() if isinstance(fault, str)] == []


def test_the_work_is_shared_out(reports):
    assert all(report["kept"] == [True, True] for report in reports)


def test_networks_and_compiled_functions_take_distributed_tensors(reports):
    assert all(report["compiled"] and report["unet"] for report in reports)


def test_what_is_written_to_is_the_part_of_each_process(reports):
    assert all(all(report["written"].values()) for report in reports)


def test_refusals(reports):
    for report in reports:
        said = report["refusals"]
        assert "key must be given for a DTensor, got None" in said["no key"]
        assert "t must be a DTensor, as x0 is, got a tensor of this process alone" in said["steps"]
        assert "out must be replicated or sharded along the samples, dimension 0" in said["out"]
