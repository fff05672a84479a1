"""The check for a machine with a GPU, where there is none: limits, verdicts, what is run, what is found."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import ModuleType

import kernels
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / ".ci" / "gpu_check"
PLAIN_TRITON = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def check():
    """The modules of the check, by their names."""
    sys.path.insert(0, str(HERE))
    try:
        yield {name: load(name) for name in ("verdicts", "modules", "__main__", "launches", "figures")}
    finally:
        sys.path.remove(str(HERE))
        for name in ("verdicts", "modules"):
            sys.modules.pop(name, None)


def load(name: str) -> ModuleType:
    known = name if name in ("verdicts", "modules") else f"gpu_check_{name.strip('_')}"
    specification = importlib.util.spec_from_file_location(known, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    # Dataclasses look for the module that they are of.
    sys.modules[known] = module
    specification.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------ steps


def command_of(program):
    return [program] if program.startswith("no-such") else [sys.executable, "-c", program]


@pytest.fixture
def run(check, tmp_path, monkeypatch):
    """Runs steps of Python programs: ``run({name: (seconds, [program, ...])}, cap)`` gives the verdicts by name."""
    main = check["__main__"]
    monkeypatch.setattr(main, "_LEAST", 0.3)
    monkeypatch.setattr(main, "_GRACE", 2.0)
    monkeypatch.setattr(main, "_CORES", 0)
    # The emulator, that is.
    monkeypatch.setattr(main, "_launches", lambda *arguments: [sys.executable, "-c", "print(0)"])
    monkeypatch.setenv("OUT", str(tmp_path / "out"))

    def runs(steps, cap=60.0, names=()):
        made = tuple(
            main.Step(
                name, seconds, f"a test of {name}",
                lambda machine, programs=programs: [command_of(program) for program in programs],
            )
            for name, (seconds, programs) in steps.items()
        )  # fmt: skip
        monkeypatch.setattr(main, "STEPS", made)
        status = main.main(["--dry", "--cap", str(cap), *names])
        return status, check["verdicts"].read(tmp_path / "out" / "verdicts.jsonl"), tmp_path / "out"

    return runs


SAYS = "import verdicts; verdicts.add('a thing', 'passed', 0.5); print('said')"


def test_what_passes(run, capsys):
    status, lines, out = run({"one": (30, [SAYS]), "two": (30, ["print('more')"])})
    assert status == 0
    assert [(line["step"], line["verdict"]) for line in lines] == [("one", "passed")] * 2 + [("two", "passed")]
    # Another run adds to what there is, and tells of its own.
    status, both, _ = run({"three": (30, [SAYS])})
    assert [line["step"] for line in both] == ["one", "one", "two", "three", "three"]
    assert "one" not in (out / "summary.txt").read_text()
    assert lines[0]["name"] == "a thing"
    said = [line for line in (out / "log.txt").read_text().splitlines() if line in ("said", "more")]
    assert said == ["said", "more", "said"]
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("  one ")]) == 2


def test_what_fails_keeps_nothing_from_running(run):
    says = "import verdicts, sys; verdicts.add('a thing', 'failed', 0.5, 'off by\\n3'); sys.exit(4)"
    status, lines, out = run({"one": (30, [says, SAYS]), "two": (30, [SAYS])})
    assert status == 1
    assert [line["verdict"] for line in lines] == ["failed", "failed", "passed", "passed", "passed", "passed"]
    assert lines[1]["detail"] == "exit code 4"
    assert "one: a thing: failed off by 3" in (out / "summary.txt").read_text()


def test_what_takes_too_long_is_unfinished(run, interruptible):
    """It is interrupted, and writes what it has; a process that it began ends too."""
    program = """
import subprocess, sys, time, verdicts
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
try:
    time.sleep(60)
except KeyboardInterrupt:
    verdicts.add("what there was", "passed")
    print(child.wait(), flush=True)
    raise
"""
    begin = time.monotonic()
    status, lines, _ = run({"long": (3, [program, SAYS]), "next": (30, [SAYS])})
    assert time.monotonic() - begin < 30
    assert status == 2
    assert [(line["name"], line["verdict"]) for line in lines if line["step"] == "long" and "command" not in line] == [
        ("what there was", "passed")
    ]
    stopped, late = [line for line in lines if line["step"] == "long" and "command" in line]
    assert stopped["verdict"] == late["verdict"] == "unfinished"
    assert stopped["detail"].startswith("it was stopped after")
    assert late["detail"] == "there was no time left to begin"
    assert [line["verdict"] for line in lines if line["step"] == "next"] == ["passed", "passed"]


def test_who_does_not_listen_is_ended(run):
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    begin = time.monotonic()
    status, (line,), _ = run({"deaf": (1, [deaf])})
    assert time.monotonic() - begin < 20
    assert (status, line["verdict"]) == (2, "unfinished")


def test_what_a_tool_may_not_do_is_skipped(run):
    status, (line,), _ = run({"one": (30, ["print('ERR_NVGPUCTRPERM: no'); exit(3)"])})
    assert (status, line["verdict"], line["detail"]) == (0, "skipped", "it may not run here: ERR_NVGPUCTRPERM")


def test_commands_at_once(check, run, monkeypatch, tmp_path):
    """Each waits for the other."""
    main = check["__main__"]
    program = """
import pathlib, sys, time
here, there = (pathlib.Path({folder!r}) / name for name in {names})
here.touch()
while not there.exists():
    time.sleep(0.01)
"""
    programs = [program.format(folder=str(tmp_path), names=names) for names in (("a", "b"), ("b", "a"))]
    commands = [[sys.executable, "-c", one] for one in programs]
    monkeypatch.setattr(main, "STEPS", (main.Step("both", 30, "a test", lambda machine: commands, together=True),))
    assert main.main(["--dry"]) == 0


def test_who_is_ended_ends_its_steps(tmp_path):
    """As a machine does that is given back; a step that went on would keep the GPU."""
    program = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import importlib.util
spec = importlib.util.spec_from_file_location("gpu_check_main", {str(HERE / "__main__.py")!r})
main = importlib.util.module_from_spec(spec)
sys.modules["gpu_check_main"] = main
spec.loader.exec_module(main)
main._launches = lambda *arguments: [sys.executable, "-c", "0"]
child = "import os, pathlib, time; pathlib.Path({str(tmp_path)!r}, 'pid').write_text(str(os.getpid())); time.sleep(60)"
main.STEPS = (main.Step("long", 60, "a test", lambda machine: [[sys.executable, "-c", child]]),)
main.main(["--dry"])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "OUT": str(tmp_path)}, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_step_that_found_nothing_has_failed(check, run, monkeypatch, tmp_path):
    """As where every test is skipped, because a backend does not serve the GPU."""
    main = check["__main__"]
    machine = main.Machine("nvidia-h200", "90", 2, tmp_path)
    tested = main.Check(machine, time.monotonic() + 60)
    tested.run(main.Step("cuda", 30, "a test", lambda machine: [[sys.executable, "-c", "0"]]))
    assert [line["verdict"] for line in tested.lines] == ["passed", "failed"]
    tested.run(main.Step("two", 30, "a test", lambda machine: [[sys.executable, "-c", SAYS]]))
    assert [line["verdict"] for line in tested.lines] == ["passed", "failed", "passed", "passed"]


def test_the_cap_is_of_all_steps(run):
    status, lines, _ = run({"one": (30, ["import time; time.sleep(60)"]), "two": (30, [SAYS])}, cap=1.5)
    assert status == 2
    assert [line["verdict"] for line in lines] == ["unfinished", "unfinished"]


def test_some_steps_and_tools_that_are_not_there(run):
    steps = {"one": (30, [SAYS]), "two": (30, ["no-such-program"])}
    status, (line,), _ = run(steps, names=["two"])
    assert (status, line["verdict"], line["detail"]) == (2, "unfinished", "no-such-program is not installed")
    with pytest.raises(SystemExit):
        run(steps, names=["three"])


def test_the_steps(check, tmp_path):
    """Two runs, of four minutes and of seven, hold them all; on a GPU each has commands of its own."""
    main = check["__main__"]
    seconds = {step.name: step.seconds for step in main.STEPS}
    assert list(seconds) == ["smoke", "cuda", "sanitize", "headline", "triton", "large", "bench", "ncu"]
    assert sum(seconds[name] for name in ("smoke", "cuda", "sanitize", "headline")) <= 240
    assert sum(seconds[name] for name in ("triton", "large", "bench", "ncu")) <= 420
    machine = main.Machine("nvidia-h200", "90", 12, tmp_path)
    commands = {step.name: [list(command) for command in step.commands(machine)] for step in main.STEPS}
    assert commands["headline"][0][-1] == str(tmp_path / "nvidia-h200-headline.json")
    assert [command[-2] for command in commands["sanitize"]] == [str(HERE / "launches.py")] * 2
    assert not any("--dry" in command for some in commands.values() for command in some)
    for some in commands.values():
        for command in some:
            assert all(Path(word).exists() for word in command if word.startswith((str(HERE), "tests/")))


# ------------------------------------------------------------------------------------------------ tests as verdicts


def test_tests_are_verdicts(check, tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest, os\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2, 'off by one'\n"
        "def test_skipped(): pytest.skip('no reason')\n"
        "def test_gone(): os._exit(1)\n"
    )
    path = tmp_path / "verdicts.jsonl"
    # This process may be a worker itself, which the one that it begins is not.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "verdicts", "-n", "1", "-p", "no:cacheprovider", "."],
        cwd=tmp_path, capture_output=True, text=True,
        env={**outside, "PYTHONPATH": str(HERE), "GPU_CHECK_VERDICTS": str(path), "GPU_CHECK_STEP": "cuda"},
    )  # fmt: skip
    lines = {line["name"].partition("::")[2]: line for line in check["verdicts"].read(path)}
    assert {name: line["verdict"] for name, line in lines.items()} == {
        "test_right": "passed", "test_wrong": "failed", "test_skipped": "skipped", "test_gone": "unfinished",
    }, done.stdout  # fmt: skip
    assert "off by one" in lines["test_wrong"]["detail"]
    assert lines["test_right"]["step"] == "cuda"


def test_the_tests_of_one_kind_of_kernels():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "--kernels", "cuda", "tests/ops/test_uniform.py"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    found = [line for line in done.stdout.splitlines() if "::" in line and line.startswith("tests/")]
    assert len(found) > 50
    assert all("cuda" in line for line in found)


# ------------------------------------------------------------------------------------------------ launches


def test_every_launch_agrees_in_the_emulator(check, monkeypatch):
    """And every function of the module is called: the kernels of every op are launched."""
    launches, called = check["launches"], set()
    getattr_ = kernels._Watched.__getattr__

    def watched(self, name):
        called.add(name)
        return getattr_(self, name)

    monkeypatch.setattr(kernels._Watched, "__getattr__", watched)
    assert launches.main(["emulated"]) == 0
    with kernels.emulated() as backend:
        # Makers of structs begin with a capital letter.
        there = {name for name in dir(backend._module._emulator.module) if name[0].islower()}
    assert {name for name in there - {"build_info", "unusable"} if not name.endswith("_workspace")} <= called
    assert len({launch.name for launch in launches.LAUNCHES}) == len(launches.LAUNCHES)


def test_a_wrong_result_is_seen(check):
    launches = check["launches"]
    x = torch.randn(100)
    assert launches.fault([x], [x.clone()], 0.0) is None
    assert launches.fault([x + 1e-7], [x], 1e-6) is None
    assert "off by" in launches.fault([x + 1e-3], [x], 1e-6)
    assert "off by nan" in launches.fault([x * torch.nan], [x], 1e-6)
    assert "differs" in launches.fault([x + 1e-7], [x], 0.0)
    assert "float64" in launches.fault([x.double()], [x], 0.0)
    assert "(99,)" in launches.fault([x[1:]], [x], 0.0)


def test_a_launch_that_fails_is_a_verdict(check, monkeypatch, tmp_path):
    """Those after it are run."""
    launches, verdicts = check["launches"], check["verdicts"]

    def broken(draw):
        if draw(1).requires_grad and launches_on_the_device:
            raise RuntimeError("an illegal memory access was encountered")
        return [draw(2)]

    launches_on_the_device = False
    fine = launches.Launch("fine", lambda draw: [draw(3)])
    monkeypatch.setattr(launches, "LAUNCHES", (launches.Launch("broken", broken), fine))
    monkeypatch.setenv("GPU_CHECK_VERDICTS", str(tmp_path / "v.jsonl"))
    monkeypatch.setenv("GPU_CHECK_STEP", "smoke")
    running = launches.running

    def on_the_device(backend):
        nonlocal launches_on_the_device
        launches_on_the_device = True
        return running(backend)

    monkeypatch.setattr(launches, "running", on_the_device)
    assert launches.main(["emulated"]) == 1
    lines = verdicts.read(tmp_path / "v.jsonl")
    assert [(line["name"], line["verdict"]) for line in lines] == [
        ("emulated: broken", "failed"), ("emulated: fine", "passed"),
    ]  # fmt: skip
    assert lines[0]["detail"] == "RuntimeError: an illegal memory access was encountered"


# ------------------------------------------------------------------------------------------------ figures


def test_the_headline_has_the_most_telling(check):
    figures = check["figures"]
    tasks = figures.tasks_of("headline")
    assert 30 <= len(tasks) <= 42
    every = figures.tasks_of("bench")
    # What is measured in the one is left out of the other.
    assert not {task.name for task in tasks} & {task.name for task in every}
    assert every[0].benchmark.op == "attention"
    assert every[-1].benchmark.op == "normal"
    for size in (40, 64, 80, 128, 160, 512):
        for name in ("forward", "forward and backward"):
            assert any(
                task.benchmark.op == "attention" and task.benchmark.name == name and task.case.size == size
                for task in tasks
            )
    assert sum(task.benchmark.op == "group_norm" for task in tasks) == 8


def test_triton_compiles_ahead(tmp_path):
    """For the architecture of Hopper, in a process that does not interpret."""
    pytest.importorskip("triton")
    program = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import figures\n"
        "(task,) = (t for t in figures.tasks_of('headline') if t.name.endswith('normal') or '64x4x64x64' in t.name)\n"
        "print(figures.compile_for(task, True))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=PLAIN_TRITON | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "None\n", done.stdout + done.stderr
    assert list(tmp_path.rglob("fill_kernel.cubin"))


class FakeRun:
    """In the place of gencore.bench.run: results without a GPU, one of which may be a kernel's fault."""

    def __init__(self, real, broken=None):
        self.Interrupted, self.Settings, self.broken, self.real = real.Interrupted, real.Settings, broken, real

    def run(self, tasks, device, settings, on_result=None):
        from bench import reports

        results = []
        try:
            for task in tasks:
                failed = task.name == self.broken
                dtype = str(task.dtype).removeprefix("torch.")
                candidate = reports.failed("ours", "AcceleratorError: CUDA error") if failed else reports.ours()
                results.append(
                    reports.result(task.benchmark.op, task.benchmark.name, str(task.case), candidate, dtype=dtype)
                )
                on_result(results[-1])
        except KeyboardInterrupt:
            raise self.Interrupted(self._report(results)) from None
        return self._report(results)

    def _report(self, results):
        import dataclasses

        from bench import reports

        return dataclasses.replace(reports.report(), results=tuple(results), commit="unknown")


def test_the_report_grows_and_goes_on_after_a_fault(check, monkeypatch, tmp_path):
    figures, verdicts = check["figures"], check["verdicts"]
    tasks, path = figures.tasks_of("headline"), tmp_path / "report.json"
    from gencore.bench import run
    from gencore.bench.results import read

    monkeypatch.setattr(figures, "run", FakeRun(run, broken=tasks[5].name))
    monkeypatch.setattr(verdicts, "is_lost", lambda: True)

    class Gone(BaseException):
        pass

    def go_on_from(number, arguments):
        raise Gone(number, arguments)

    monkeypatch.setattr(verdicts, "go_on_from", go_on_from)
    monkeypatch.setenv("GPU_CHECK_VERDICTS", str(tmp_path / "v.jsonl"))
    monkeypatch.setenv("GPU_CHECK_STEP", "headline")
    with pytest.raises(Gone) as gone:
        figures.timed("headline", path, tasks, 0)
    assert gone.value.args == (6, ["headline", str(path)])
    before = read(path)
    assert [result.name for result in before.results] == [task.name for task in tasks[:6]]
    assert before.settings["complete"] is False
    figures.timed("headline", path, tasks, 6)
    whole = read(path)
    assert [result.name for result in whole.results] == [task.name for task in tasks]
    assert whole.settings["complete"] is True
    lines = verdicts.read(tmp_path / "v.jsonl")
    assert [line["verdict"] for line in lines] == ["failed" if i == 5 else "passed" for i in range(len(tasks))]
    assert lines[0]["figures"] == {"ours": 1e-3}


# ------------------------------------------------------------------------------------------------ modules


def test_prebuilt_modules(check, monkeypatch, tmp_path):
    modules = check["modules"]
    artifacts, root = tmp_path / "artifacts", tmp_path / "checkout"
    (root / "gencore").mkdir(parents=True)
    monkeypatch.setattr(modules, "ARTIFACTS", artifacts)
    assert modules.put_in_place("90") == "there are none"
    assert modules.commit() == "unknown"
    (artifacts / "gencore").mkdir(parents=True)
    whole = modules.fingerprint(python=True)
    note = {"fingerprint": modules.fingerprint(), "all": whole, "architectures": "80-real;90a", "commit": "abc"}
    (artifacts / modules.NOTE).write_text(json.dumps(note))
    assert modules.commit() == "abc"
    assert "No such file" in modules.put_in_place("90")
    assert modules.put_in_place("100") == "they were built for 80-real;90a"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for name in modules.MODULES:
        (artifacts / "gencore" / f"{name}{suffix}").write_bytes(b"of another machine")
    assert modules.put_in_place("90") is not None
    monkeypatch.setattr(modules, "importable", lambda folder: None)
    fingerprint = modules.fingerprint()
    monkeypatch.setattr(modules, "fingerprint", lambda python=False: whole if python else fingerprint)
    monkeypatch.setattr(modules, "ROOT", root)
    assert modules.put_in_place("80") is None
    assert len(list((root / "gencore").iterdir())) == 2
    monkeypatch.setattr(modules, "fingerprint", lambda python=False: "another")
    assert modules.put_in_place("90") == "they were built from other sources"
    assert modules.commit() == "unknown"


def test_the_module_of_this_machine_can_be_imported(check, monkeypatch):
    modules = check["modules"]
    monkeypatch.setattr(modules, "MODULES", ("_cpu",))
    assert modules.importable(ROOT / "gencore") is None
