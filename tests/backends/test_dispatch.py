"""The tables of who runs an op on a GPU: that they are whole, and which row a call takes."""

from __future__ import annotations

import inspect
import math
from unittest import mock

import pytest
import torch

from gencore._ops import OPS
from gencore.backends import choice, cpu, dispatch
from gencore.backends.dispatch import Entry, Measured, Row
from gencore.backends.handover import RUNNERS as PYTORCH

HOPPER = (9, 0)
TABLES = sorted(dispatch.FOLDER.glob("*.json"))
FEATURES = {
    "attention": {"size", "tokens"},
    "general_attention": {"size", "tokens"},
    "group_norm": {"layout", "channels", "pixels"},
}
EACH = Measured("NVIDIA H200", "2026-12-24", "abc", "2.11.0", "3.6.0")


def test_every_kernel_of_the_library_is_known():
    kernels = {name for name, _ in inspect.getmembers(type(cpu.ops), inspect.isfunction) if not name.startswith("_")}
    assert kernels == {kernel.name for op in OPS for kernel in op.kernels}
    for op in OPS:
        assert {op.functions[name] for name in op.functions} <= dispatch.KERNELS.keys()


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_table_is_whole(path):
    op = path.stem
    assert op in {kernel.op for kernel in dispatch.KERNELS.values()}
    entries = dispatch.read(op)
    assert entries
    assert len({(entry.capability, entry.dtype, entry.direction) for entry in entries}) == len(entries)
    for entry in entries:
        assert entry.dtype in ("float32", "bfloat16")
        assert dispatch.Kernel(op, entry.direction) in {kernel._replace(main=0) for kernel in dispatch.KERNELS.values()}
        assert (entry.measured is None) == bool(entry.why)
        assert entry.rows
        for row in entry.rows:
            assert row.features.keys() == FEATURES.get(op, {"layout", "values"})
            assert row.order
            assert set(row.order) <= set(dispatch.RUNNERS)
            if entry.direction != "forward" or op != "attention":
                assert not set(row.order) & set(PYTORCH)
            assert (set(row.seconds) == set(row.order)) == (entry.measured is not None)


def order(size: int, tokens: int, direction: str = "forward", capability=HOPPER, dtype=torch.bfloat16):
    """The order of attention's table for a call."""
    kernel = "attention" if direction == "forward" else "attention_backward"
    q, k = (torch.empty(2, 3, count, size, dtype=dtype, device="meta") for count in (tokens, 8192))
    row = dispatch.row_of(kernel, capability, (q, k, k) if direction == "forward" else (q, q, k, k))
    return None if row is None else row.order


@pytest.mark.parametrize(
    ("call", "first"),
    [
        ((64, 4096), "cudnn"),
        ((128, 1025), "cudnn"),
        ((64, 1024), "triton"),
        ((80, 4096), "triton"),
        ((64, 77), "cuda"),
        ((40, 4096), "cuda"),
        ((512, 16384), "cuda"),
        ((40, 4096, "backward"), "triton"),
        ((512, 4096, "backward"), "triton"),
        ((40, 77, "backward"), "cuda"),
        ((64, 4096, "forward", (10, 0)), "cudnn"),
        ((64, 4096, "forward", (9, 0), torch.float16), "cudnn"),
    ],
    ids=str,
)
def test_what_is_expected_of_hopper(call, first):
    if any(entry.measured for entry in dispatch.read("attention")):
        pytest.skip("it was measured")
    assert order(*call)[0] == first


@pytest.mark.parametrize(
    "call",
    [(64, 4096, "forward", (8, 9)), (64, 4096, "forward", (12, 0)), (64, 4096, "forward", HOPPER, torch.float32)],
)
def test_nothing_is_known_of_others(call):
    assert order(*call) is None


@pytest.mark.parametrize("capability", [(8, 6), HOPPER, (10, 0), (12, 0)])
def test_tensor_cores_come_first_where_there_are_options(capability):
    """Our CUDA kernels for masks, lengths, shared heads and dropout do without them."""
    if any(entry.measured for entry in dispatch.read("general_attention")):
        pytest.skip("it was measured")
    for kernel, count in (("general_attention", 3), ("general_attention_backward", 6)):
        for dtype, first in ((torch.bfloat16, "triton"), (torch.float16, "triton"), (torch.float32, None)):
            args = [torch.empty(2, 3, 77, 40, dtype=dtype, device="meta")] * count
            row = dispatch.row_of(kernel, capability, args)
            assert (row and row.order[0]) == first


def entry(capability=HOPPER, rows=(), measured=EACH) -> Entry:
    return Entry(capability, "bfloat16", "forward", measured, "", tuple(rows))


def test_the_nearest_row_is_taken():
    rows = [
        Row({"layout": "contiguous", "channels": 64, "pixels": 256}, ("cuda",)),
        Row({"layout": "channels_last", "channels": 64, "pixels": 256}, ("triton",)),
        Row({"layout": "contiguous", "channels": 64, "pixels": 16384}, ("triton", "cuda")),
    ]

    def taken(**features):
        return rows.index(dispatch.nearest(entry(rows=rows), {"layout": "contiguous", "channels": 64, **features}))

    assert taken(pixels=300) == 0
    assert taken(pixels=9000) == 2
    assert taken(pixels=2048) == 0, "of two as near, the first"
    assert taken(pixels=10**9, channels=1) == 2
    assert taken(pixels=0) == 0
    assert dispatch.nearest(entry(rows=rows), {"layout": "channels_last", "channels": 1, "pixels": 10**9}) is rows[1]


def test_the_nearest_gpu_of_the_generation_speaks():
    known = entry((8, 0)), entry((8, 9))
    with mock.patch.object(dispatch, "_read", return_value=known):
        dispatch.entry_of.cache_clear()
        found = [
            dispatch.entry_of("attention", "forward", capability, torch.bfloat16)
            for capability in ((8, 0), (8, 6), (8, 9), (9, 0))
        ]
    dispatch.entry_of.cache_clear()
    assert [one and one.capability for one in found] == [(8, 0), (8, 9), (8, 9), None]
    assert known[0].source == "measured on NVIDIA H200, 2026-12-24"


def test_the_batch_decides_nothing():
    """A sample's bits would else depend on the samples beside it."""
    calls = {
        "attention": lambda batch: [torch.empty(batch, 4, 100, 40)] * 3,
        "attention_backward": lambda batch: [torch.empty(batch, 4, 100, 40)] * 6,
        "attention_jvp": lambda batch: [torch.empty(batch, 4, 100, 40)] * 4,
        "attention_double_backward": lambda batch: [torch.empty(batch, 4, 100, 40)] * 5,
        "general_attention": lambda batch: [torch.empty(batch, 4, 100, 40)] * 3,
        "general_attention_backward": lambda batch: [torch.empty(batch, 4, 100, 40)] * 6,
        "general_attention_jvp": lambda batch: [torch.empty(batch, 4, 100, 40)] * 3,
        "general_attention_double_backward": lambda batch: [torch.empty(batch, 4, 100, 40)] * 6,
        "reparameterize_backward": lambda batch: [None, None, None, torch.empty(batch, 3, 8, 8)],
        "denoising_loss_backward": lambda batch: [torch.empty(batch), *[torch.empty(batch, 3, 8, 8)] * 2],
    }
    for kernel, (_, _, main) in dispatch.KERNELS.items():
        args = calls.get(kernel, lambda batch, main=main: [torch.empty(batch, 3, 8, 8)] * (main + 1))
        assert dispatch.features_of(kernel, args(2)) == dispatch.features_of(kernel, args(64))


def test_a_device_that_is_no_nvidia_gpu():
    assert dispatch.capability_of(torch.device("cpu")) == (0, 0)
    assert dispatch.row_of("attention", (0, 0), [torch.empty(1, 1, 5000, 64, dtype=torch.bfloat16)] * 3) is None


def test_a_call_costs_little_to_place():
    """No row is looked for twice."""
    q = torch.empty(1, 1, 5000, 64, dtype=torch.bfloat16, device="meta")
    dispatch.row_of("attention", HOPPER, (q, q, q))
    with mock.patch.object(dispatch, "nearest", side_effect=AssertionError):
        assert dispatch.row_of("attention", HOPPER, (q, q, q)) is not None


def test_who_is_not_here_is_passed_over(monkeypatch):
    """The second of a row where the first is not installed; the reasons of all where nobody is."""
    reasons = {"cpu": "it is the CPU's", "cuda": "there is no module", "triton": None}
    device = torch.device("cuda", 0)
    monkeypatch.setattr(choice, "_refusal", lambda name, device: reasons[name])
    monkeypatch.setattr(dispatch, "capability_of", lambda device: HOPPER)
    q = torch.empty(1, 1, 5000, 40, dtype=torch.bfloat16, device="meta")
    call = choice.Dispatched("attention", device)
    runner, source, refused = call.explained(q, q, q, 1 / math.sqrt(40))
    assert (runner, refused) == ("triton", {"cuda": "there is no module"})
    assert source.startswith(("not measured: ", "measured on "))
    reasons["triton"] = "it is not installed"
    with pytest.raises(choice.NoBackend, match="cuda: there is no module; triton: it is not installed"):
        call(q, q, q, 0.1)
