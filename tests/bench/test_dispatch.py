"""The tables that ``make dispatch`` writes from results: who comes first, what is merged, what is left alone."""

from __future__ import annotations

import dataclasses
import importlib
import json

import pytest
import torch
from bench import reports
from bench.test_document import load
from support import laid_out

from gencore.backends import dispatch as tables
from gencore.backends.dispatch import Entry, Measured, Row
from gencore.bench import cases, suite

dispatch = load("dispatch")
H200 = {"name": "NVIDIA H200", "device": "cuda", "capability": [9, 0]}
CASE = "4x8x1024x40-tokens"


def times(cuda, triton, cudnn=None, call=1e-6, errors=0.0):
    """Candidates that take so many microseconds."""
    told = {"ours": cuda, "ours, CUDA": cuda, "ours, Triton": triton, "ours, cuDNN": cudnn, "eager": 1000.0}
    return [
        reports.peer(name, 1.0, 1e-6 * time, call_seconds=call, error=errors)
        for name, time in told.items()
        if time is not None
    ]


def report(*results, **machine):
    return dataclasses.replace(
        reports.report(),
        date="2026-12-24T10:00:00+00:00",
        machine=H200 | machine,
        versions={"torch": "2.11.0", "triton": "3.6.0"},
        results=results,
    )


def result(op, benchmark, case, candidates, dtype="bfloat16"):
    return reports.result(op, benchmark, case, *candidates, dtype=dtype, tolerance=1e-2)


def orders(found):
    return {(entry.dtype, entry.direction): [row.order for row in entry.rows] for entry in found}


def test_the_fastest_comes_first_and_the_gradient_is_what_is_left():
    found = dispatch.entries(
        report(
            result("attention", "forward", CASE, times(100, 80, 60)),
            result("attention", "forward and backward", CASE, times(300, 400, 200)),
        )
    )
    assert found.keys() == {"attention"}
    assert orders(found["attention"]) == {
        ("bfloat16", "forward"): [("cudnn", "triton", "cuda")],
        # 200 and 320: what PyTorch's own kernels take is no runner's.
        ("bfloat16", "backward"): [("cuda", "triton")],
    }
    forward, backward = found["attention"]
    assert forward.rows[0] == Row(
        {"size": 40, "tokens": 1024}, ("cudnn", "triton", "cuda"), {"cuda": 1e-4, "triton": 8e-5, "cudnn": 6e-5}
    )
    assert backward.rows[0].seconds == pytest.approx({"cuda": 2e-4, "triton": 3.2e-4})
    assert forward.measured == Measured("NVIDIA H200", "2026-12-24", reports.report().commit, "2.11.0", "3.6.0")
    assert forward.source == "measured on NVIDIA H200, 2026-12-24"


@pytest.mark.parametrize(
    ("candidates", "order"),
    [
        (times(100, 96), ("cuda", "triton")),
        (times(100, 94), ("triton", "cuda")),
        # The host is what such calls wait for.
        (times(10, 5, call=2e-5), ("cuda", "triton")),
        # Who computes something else does not count.
        ([*times(100, 80, 60)[:3], reports.peer("ours, cuDNN", 1.0, 6e-5, error=1.0)], ("triton", "cuda")),
        ([*times(100, 80)[:2], reports.failed("ours, Triton"), *times(100, 80, 60)[3:]], ("cudnn", "cuda")),
    ],
)
def test_the_order(candidates, order):
    (entry,) = dispatch.entries(report(result("attention", "forward", CASE, candidates)))["attention"]
    assert [row.order for row in entry.rows] == [order]


def test_a_gradient_that_is_not_known_without_its_forward_pass():
    found = dispatch.entries(report(result("attention", "forward and backward", CASE, times(300, 400))))
    assert found == {}
    alone = dispatch.entries(report(result("reparameterize", "backward", "64x4x64x64", times(30, 20), "float32")))
    assert orders(alone["reparameterize"]) == {("float32", "backward"): [("triton", "cuda")]}


def test_problems_that_a_call_cannot_tell_apart_are_one():
    found = dispatch.entries(
        report(
            result("attention", "forward", "4x8x1024x80-heads", times(100, 50)),
            result("attention", "forward", "4x8x1024x80-tokens", times(400, 50)),
        )
    )
    (entry,) = found["attention"]
    assert entry.rows == (Row({"size": 80, "tokens": 1024}, ("triton", "cuda"), {"cuda": 2e-4, "triton": 5e-5}),)


def test_a_gradient_that_took_less_than_no_time_says_nothing():
    found = dispatch.entries(
        report(
            result("attention", "forward", CASE, times(100, 80)),
            result("attention", "forward and backward", CASE, times(300, 70)),
        )
    )
    assert orders(found["attention"]) == {("bfloat16", "forward"): [("triton", "cuda")]}


def test_where_one_alone_was_measured_nothing_is_to_be_chosen():
    only = [candidate for candidate in times(100, 80) if candidate.name != "ours, Triton"]
    assert dispatch.entries(report(result("group_norm", "forward", "4x320x64x64-32groups", only))) == {}


def test_float16_is_left_to_bfloat16():
    assert dispatch.entries(report(result("attention", "forward", CASE, times(100, 80), "float16"))) == {}


def test_what_is_measured_takes_the_place_of_what_is_expected(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "tables"
    folder.mkdir()
    monkeypatch.setattr(tables, "FOLDER", folder)
    row = (Row({"size": 64, "tokens": 512}, ("triton", "cuda")),)
    expected = [
        Entry(capability, "bfloat16", direction, None, "because", row)
        for capability in ((9, 0), (10, 0))
        for direction in ("forward", "backward")
    ]
    (folder / "attention.json").write_text(dispatch.text(expected))
    assert list(tables.read("attention", folder)) == expected
    paths = [tmp_path / "old.json", tmp_path / "new.json", tmp_path / "cpu.json"]
    new = result("attention", "forward", CASE, times(100, 80))
    report(result("attention", "forward", CASE, times(10, 80))).write(paths[0])
    dataclasses.replace(report(new), date="2027-01-01T00:00:00+00:00").write(paths[1])
    report(new, name="a CPU", device="cpu", capability=None).write(paths[2])
    assert dispatch.main([str(path) for path in (paths[1], paths[0], paths[2])]) == 0
    assert "attention.json: 1 of 4 entries are measured" in capsys.readouterr().out
    found = {(entry.capability, entry.direction): entry for entry in tables.read("attention", folder)}
    assert found[(9, 0), "forward"].measured.date == "2027-01-01"
    assert found[(9, 0), "forward"].rows[0].order == ("triton", "cuda")
    for key in (((9, 0), "backward"), ((10, 0), "forward"), ((10, 0), "backward")):
        assert found[key].measured is None
        assert found[key].why == "because"
    assert json.loads((folder / "attention.json").read_text())


def test_reports_of_one_commit_are_one():
    """Those of another are not: figures before a change and after it do not mix."""
    first = report(
        result("attention", "forward", CASE, times(100, 80)),
        result("attention", "forward", "1x1x77x40-heads", times(1, 2)),
    )
    second = dataclasses.replace(
        report(result("attention", "forward", CASE, times(50, 80))), date="2026-12-24T11:00:00+00:00"
    )
    other = dataclasses.replace(first, commit="another", date="2026-12-23T11:00:00+00:00")
    cpu = report(name="a CPU", device="cpu", capability=None)
    found = dispatch.joined([second, cpu, other, first])
    assert [one.commit for one in found] == ["another", first.commit]
    assert {one.case: one.candidates[0].seconds for one in found[1].results} == pytest.approx(
        {CASE: 5e-5, "1x1x77x40-heads": 1e-6}
    )


def test_results_of_cpus_alone_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    reports.report().write(tmp_path / "cpu.json")
    assert dispatch.main([str(tmp_path / "cpu.json")]) == 0
    assert capsys.readouterr().out == "there are no results of a GPU\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu.json"]


def test_the_benchmarks_are_there():
    for op, names in dispatch.BENCHMARKS.items():
        known = {benchmark.name for benchmark in suite.benchmarks([op])}
        assert set(names) - {None} <= known
        directions = {kernel.direction for kernel in tables.KERNELS.values() if kernel.op == op}
        assert ("backward" in directions) == (names[1] is not None)


def test_they_time_each_backend(monkeypatch):
    """What looks like a GPU here is the CPU, and backends are not called."""
    for op, names in dispatch.BENCHMARKS.items():
        module = importlib.import_module(f"gencore.bench.suite.{op}")
        monkeypatch.setattr(module, "on_backends", lambda call, device: {"ours, CUDA": call, "ours, Triton": call})
        for benchmark in module.BENCHMARKS:
            if benchmark.name in names:
                case = next(case for case in benchmark.cases if benchmark.fits(case) and "cuda" in case.timed)
                calls = benchmark.make(case.shrunk(), torch.float32, "cpu").calls
                assert {"ours, CUDA", "ours, Triton"} <= calls.keys(), (op, benchmark.name)


def test_a_case_has_the_features_of_its_tensors():
    for case in cases.ATTENTION:
        if case.layout in ("heads", "tokens") and case.elements < 1 << 16:
            q, k, v = case.tensors(torch.float32)
            assert dispatch.features_of("attention", case) == tables.features_of("attention", (q, k, v, 1.0))
    for op, some in (("group_norm", cases.GROUP_NORM), ("add_noise", cases.DIFFUSION)):
        for case in some:
            # A tensor of one pixel or channel is in both formats.
            if 0 < case.elements < 1 << 16 and min(case.shape[1:], default=0) > 1:
                x = laid_out(torch.empty(case.shape), case)
                assert dispatch.features_of(op, case) == tables.features_of(op, (x,)), case
