"""What is timed runs, computes the same, and is chosen as asked."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.util
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from gencore import Key, ops
from gencore.bench import cases, limits, peers, suite
from gencore.bench.cases import NetworkCase
from gencore.bench.results import OURS
from gencore.bench.suite import base, group_norm, networks, training
from gencore.bench.suite.base import HALF, is_compiled

ROOT = Path(__file__).resolve().parents[2]
EVERY = suite.benchmarks()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def name_of(benchmark):
    return f"{benchmark.op}-{benchmark.slug}"


def smallest(benchmark):
    """The least of each kind of its cases: layouts and networks."""
    found = {}
    for case in sorted((case for case in benchmark.cases if benchmark.fits(case)), key=lambda case: -case.elements):
        if case.timed or case.presets:
            shrunk = case.shrunk()
            found[shrunk.layout, getattr(shrunk, "name", ""), shrunk.draws] = shrunk
    return list(found.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("benchmark_", EVERY, ids=name_of)
def test_every_candidate_computes_the_same(benchmark_, dtype):
    for case in smallest(benchmark_):
        torch.manual_seed(0)
        comparison = benchmark_.make(case, dtype, "cpu")
        names = list(comparison.calls)
        assert names[0] == OURS
        assert any(not name.startswith(OURS) for name in names), "no peer"
        assert comparison.error is not None
        assert comparison.tolerance is not None
        for name, call in comparison.calls.items():
            if not is_compiled(name):
                assert comparison.error(call()) <= comparison.tolerance, (str(case), name)
        assert comparison.work.nbytes or comparison.work.values or comparison.work.products
        assert comparison.work.flops or benchmark_.op in ("normal", "uniform")


def test_without_diffusers_the_peers_are_pytorchs_operations(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "diffusers" else find(name, *a))
    monkeypatch.setattr(peers, "diffusers_scheduler", lambda *args, **options: None)
    for benchmark in EVERY:
        if benchmark.section == "ops":
            continue
        for case in smallest(benchmark):
            comparison = benchmark.make(case, torch.float32, "cpu")
            assert {"ours", "ours, compiled", "eager", "compile"} <= comparison.calls.keys()
            assert not any("diffusers" in name for name in comparison.calls)
            for name, call in comparison.calls.items():
                if not is_compiled(name):
                    result = call()
                    if comparison.error is not None:
                        assert comparison.error(result) <= comparison.tolerance, (str(case), name)


@pytest.mark.parametrize("make", [group_norm.forward, group_norm.forward_and_backward])
@pytest.mark.parametrize(
    "broken",
    [
        lambda x, weight, bias: F.silu(F.group_norm(x, 2, weight, bias)) * 1.001,
        lambda x, weight, bias: F.silu(F.group_norm(x, 4, weight, bias)),
        lambda x, weight, bias: F.silu(F.group_norm(x, 2, bias, weight)),
        lambda x, weight, bias: F.silu(F.group_norm(x, 2, weight, bias)) * math.nan,
    ],
)
def test_a_wrong_peer_is_found(monkeypatch, make, broken):
    monkeypatch.setattr(group_norm, "_peers", lambda *args: {"broken": broken})
    comparison = make(cases.Case((2, 8, 4, 4), "", groups=2), torch.float32, "cpu")
    assert comparison.error(comparison.calls["ours"]()) <= comparison.tolerance
    assert comparison.error(comparison.calls["broken"]()) > comparison.tolerance


@pytest.mark.parametrize("of_the_value", [True, False])
def test_a_wrong_training_step_of_ours_is_found(monkeypatch, of_the_value):
    """A loss that is too large, or one whose gradient alone is."""
    case = NetworkCase("ddpm", 32, 16, "", small=True)
    right = ops.denoising_loss

    def wrong(*args, **options):
        loss = right(*args, **options)
        return 2.5 * loss if of_the_value else 2.5 * loss - 1.5 * loss.detach()

    comparison = training.training_step(case, torch.float32, "cpu")
    for name in ("ours", "eager"):
        assert comparison.error(comparison.calls[name]()) <= comparison.tolerance
    monkeypatch.setattr(ops, "denoising_loss", wrong)
    assert comparison.error(comparison.calls["ours"]()) > comparison.tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_noise_is_found(dtype):
    noise, most = ops.normal((4, 1 << 14), Key(0), dtype=dtype), base.NOISE_TOLERANCES[dtype]
    assert base.noise_error(base.judged(noise)) <= most
    for wrong in (noise + 0.2, noise * 1.1, noise * 0, noise * math.nan, noise * math.inf):
        assert base.noise_error(base.judged(wrong)) > most


def test_noise_is_judged_by_the_first_samples_and_in_logical_order():
    noise = torch.arange(2.0 * 3 * 4 * 5).view(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert torch.equal(base.judged(noise), torch.arange(120.0).double().view(2, 60))
    assert base.judged(torch.empty(3, 0)).numel() == 0
    assert base.judged(torch.ones(5)).shape == (5,)
    assert base.judged(torch.ones(64, 1 << 17)).shape == (32, 1 << 17)
    assert base.judged(torch.ones(2, (1 << 22) + 3)).shape == (1, 1 << 22)


def test_an_error_of_another_shape_or_number_of_tensors_is_told():
    error = base.largest_error(lambda: [torch.ones(2), None])
    assert error([torch.tensor([1.0, 1.5]), torch.ones(3)]) == 0.5
    assert error([torch.tensor([1.0, math.nan]), torch.ones(3)]) == math.inf
    with pytest.raises(ValueError, match="2 tensors were expected, got 1"):
        error(torch.ones(2))
    with pytest.raises(ValueError, match=r"shape \(2,\) was expected, got \(3,\)"):
        error([torch.ones(3), None])


@pytest.fixture
def packages(monkeypatch):
    """xformers and flash-attn as their manuals have them: tokens before heads. What they were given is kept."""
    given = []

    def attend(name):
        def attention(q, k, v):
            given.append((name, q, k, v))
            return F.scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in (q, k, v))).transpose(1, 2)

        return attention

    for name, function in (
        ("xformers", None),
        ("xformers.ops", "memory_efficient_attention"),
        ("flash_attn", "flash_attn_func"),
    ):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        if function:
            setattr(module, function, attend(name.split(".")[0]))
        monkeypatch.setitem(sys.modules, name, module)
    return given


@pytest.mark.parametrize("layout", ["heads", "tokens"])
@pytest.mark.parametrize("keys", [5, 7])
def test_packages_for_attention_are_given_tokens_before_heads(packages, layout, keys):
    case = cases.AttentionCase(2, 3, 5, keys, 8, "", layout=layout)
    q, k, v = case.tensors(torch.bfloat16)
    found = peers.attention_packages(torch.bfloat16, "cuda")
    assert list(found) == ["xformers", "flash-attn"]
    for attend in found.values():
        out = attend(q, k, v)
        assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))
    assert [name for name, *_ in packages] == ["xformers", "flash_attn"]
    for _, of_q, of_k, of_v in packages:
        assert of_q.shape == (2, 5, 3, 8)
        assert of_k.shape == of_v.shape == (2, keys, 3, 8)
        assert of_q.stride(3) == 1
        # Not copied.
        assert of_q.data_ptr() == q.data_ptr()


def test_packages_for_attention_are_asked_for_what_they_have(packages):
    assert list(peers.attention_packages(torch.float32, "cuda")) == ["xformers"]
    assert peers.attention_packages(torch.bfloat16, "cpu") == {}


def test_the_floor_of_a_network_counts_every_product():
    case = cases.NetworkCase("ddpm-cifar10", 2, 8, "", small=True)
    built = networks.pair(case, "cpu")
    count = networks.products(built)
    twice = networks.products(networks.pair(dataclasses.replace(case, batch=4), "cpu"))
    assert count > 0
    assert twice == 2 * count
    # Backward are two products for each, but of the image no gradient is needed.
    assert 2.8 * count < networks.products(built, backward=True) <= 3 * count
    # Of diffusers' network as of ours on PyTorch's operations.
    plain = networks.Pair(built.ours, built.ours, None, built.inputs)
    assert networks.products(plain) == count


def test_the_share_of_triton_is_ours_on_a_gpu_alone():
    assert base.on_backends(lambda: None, "cpu") == {}
    assert list(base.on_backends(lambda: None, "cuda")) == ["ours, CUDA", "ours, Triton"]


def test_every_op_has_a_module():
    for name in suite.OPS:
        of_op = suite.benchmarks([name])
        assert of_op
        assert {(benchmark.op, benchmark.section) for benchmark in of_op} == {(name, "ops")}
        assert len({benchmark.name for benchmark in of_op}) == len(of_op)
    assert {benchmark.section for benchmark in suite.benchmarks(suite.NETWORKS)} == {"networks"}
    assert {benchmark.section for benchmark in suite.benchmarks(suite.END_TO_END)} == {"end to end"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_benchmark_is_timed_somewhere_and_every_task_is_one_of_a_kind(device):
    tasks = suite.tasks(device=device)
    assert {task.benchmark.name for task in tasks} == {benchmark.name for benchmark in EVERY}
    assert len({task.name for task in tasks}) == len(tasks)
    assert all(device in task.case.timed for task in tasks)
    assert all(task.dtype in task.benchmark.dtypes[device] for task in tasks)


def test_tasks_of_names_and_dtypes():
    tasks = suite.tasks(["normal", "attention"], dtypes=[torch.float16])
    assert {task.benchmark.op for task in tasks} == {"normal", "attention"}
    assert {task.dtype for task in tasks} == {torch.float16}
    # A dtype that is asked for is timed at every shape, and not only where it is by default.
    assert len({task.case.size for task in tasks if task.benchmark.op == "attention"}) > 1
    by_default = {task.case.size for task in suite.tasks(["attention"]) if task.dtype == torch.float16}
    assert by_default == {64}


def test_tasks_of_a_preset_and_of_all():
    for preset in cases.PRESETS:
        tasks = suite.tasks(shapes=preset)
        assert all(preset in task.case.presets for task in tasks)
    ops_of = {task.benchmark.op for task in suite.tasks(shapes="sd15")}
    assert {"group_norm", "attention", "diffusion_step", "unet"} <= ops_of
    every = {task.name for task in suite.tasks(shapes="all")}
    assert {task.name for task in suite.tasks(shapes="sdxl")} | {task.name for task in suite.tasks()} <= every


def test_quick_tasks_are_one_of_each_benchmark():
    tasks = suite.tasks(quick=True)
    assert len(tasks) == len(EVERY)
    assert all(task.case.elements <= 1 << 22 for task in tasks)
    assert all(task.dtype not in HALF for task in tasks)


def test_tasks_of_the_users_own_table(tmp_path):
    path = tmp_path / "cases.json"
    path.write_text(
        '{"group_norm": [{"shape": [1, 4, 3, 3], "groups": 2}, {"shape": [1, 4, 3], "groups": 2}],'
        ' "attention": [{"batch": 1, "heads": 1, "queries": 4, "size": 8, "layout": "channels_last"}]}'
    )
    tasks = suite.tasks(shapes=cases.read_table(path), dtypes=[torch.float16])
    names = {f"{task.benchmark.op}: {task.benchmark.name}" for task in tasks}
    assert names == {f"group_norm: {benchmark.name}" for benchmark in suite.benchmarks(["group_norm"])} | {
        f"attention: {benchmark.name}"
        for benchmark in suite.benchmarks(["attention"])
        if benchmark.name.startswith(("images", "block"))
    }
    for task in tasks:
        comparison = task.benchmark.make(task.case, task.dtype, "cpu")
        assert comparison.error(comparison.calls["ours"]()) <= comparison.tolerance
    with pytest.raises(ValueError, match="nothing is left to run"):
        suite.tasks(["normal"], shapes=cases.read_table(path))


def test_what_is_not_there_cannot_be_chosen():
    with pytest.raises(ValueError, match=r"op must be one of normal, .*, unet, training, got 'norm'"):
        suite.tasks(["norm"])
    with pytest.raises(ValueError, match=r"shapes must be timed, all or one of sd15, .*, got 'sd3'"):
        suite.tasks(shapes="sd3")
    with pytest.raises(ValueError, match="nothing is left to run"):
        suite.tasks(["reparameterize"], shapes="ddpm-cifar10")


def test_a_floor_is_that_of_the_work():
    comparison = group_norm.forward(cases.Case((1, 4, 3, 3), "", groups=2), torch.float32, "cpu")
    seconds, limit = limits.floor(comparison.work, torch.float32)
    assert seconds > 0
    assert limit == "memory"


def test_group_norm_reads_twice_what_nothing_on_a_gpu_holds():
    """A group of a megabyte, in a tensor beyond the cache: once for its statistics, once to normalise."""
    large = cases.Case((64, 32, 128, 128), "a test", groups=2)
    few = cases.Case((8, 32, 128, 128), "a test", groups=2)
    fine = cases.Case((64, 32, 128, 128), "a test", groups=32)
    reads = [
        group_norm._reads(4 * case.elements, case, device)
        for case, device in ((large, "cuda"), (few, "cuda"), (fine, "cuda"), (large, "cpu"))
    ]
    assert reads == [2, 1, 1, 1]
