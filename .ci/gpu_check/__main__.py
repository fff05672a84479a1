"""What only a machine with a GPU can tell, in minutes: python3 .ci/gpu_check [--cap SECONDS] [--dry] [STEP...].

Every step has a limit of its own, and none begins that the cap leaves no time for. What is found out goes to the folder
that OUT names, else to build/gpu-check: verdicts.jsonl, a line for each verdict as soon as it is known; log.txt, what
was printed; summary.txt; the reports of the benchmarks. A step that ran out of time is unfinished, not failed. Nothing
is installed or downloaded. docs/gpu.md says what to run in which order.

The exit code is 1 if anything failed, else 2 if anything is unfinished, else 0.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import modules  # noqa: E402
import verdicts  # noqa: E402

ROOT = modules.ROOT
PYTHON = sys.executable
# Seconds that a step has after the interrupt to write its results.
_GRACE = 5.0
# A step that has less than that is not begun.
_LEAST = 8.0
# Cores of the machine that the limits are for. Without a GPU, fewer may take as much longer as they are fewer.
_CORES = 16


@dataclass(frozen=True)
class Machine:
    """What the check runs on: the GPU as results name it, its architecture, the workers of pytest, where results go;
    whether there is no GPU, and how many times as long steps may then take."""

    gpu: str
    architecture: str
    workers: int
    out: Path
    dry: bool = False
    patience: float = 1.0


@dataclass(frozen=True)
class Step:
    """``commands(machine)`` are run within ``seconds``, each of them a verdict of its own.

    ``together``: all at once, not one after another. ``environment``: variables that they have beside the usual ones.
    """

    name: str
    seconds: float
    what: str
    commands: Callable[[Machine], Sequence[Sequence[str]]]
    together: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


def _launches(*arguments: str) -> list[str]:
    return [PYTHON, str(HERE / "launches.py"), *arguments]


def _smoke(machine: Machine) -> Sequence[Sequence[str]]:
    if machine.dry:
        return [_launches("emulated")]
    some = ("normal", "group_norm, channels_last", "attention, 64", "attention, options", "attention's derivatives, 64")
    return [_launches("cuda"), _launches("triton", *some)]


def tool(name: str) -> str:
    """A program of the CUDA toolkit, wherever it was installed; its bare name if it was not."""
    folders = ["/usr/local/cuda/bin", *sorted(glob.glob("/opt/nvidia/nsight-compute/*"), reverse=True)]
    return next((found for folder in (None, *folders) if (found := shutil.which(name, path=folder))), name)


def _pytest(machine: Machine, *arguments: str, workers: int | None = None) -> list[str]:
    many = ["-n", str(workers or machine.workers), "--dist", "worksteal"] if _has_xdist() else []
    return [PYTHON, "-m", "pytest", "-q", "-p", "verdicts", *many, "--no-header", "--tb=short", *arguments]


def _has_xdist() -> bool:
    return subprocess.run([PYTHON, "-c", "import xdist"], capture_output=True).returncode == 0


def _cuda(machine: Machine) -> Sequence[Sequence[str]]:
    # The CPU's part of it is the same: drawing, the definition in float64, comparing.
    kernels = "cpu-scalar" if machine.dry else "cuda"
    rooms = ["tests/ops", "tests/backends", "tests/bench/test_replay.py"]
    return [_pytest(machine, "--kernels", kernels, "-k", "not compile", *rooms)]


def _sanitize(machine: Machine) -> Sequence[Sequence[str]]:
    if machine.dry:
        # What the sanitizer of the emulator sees is in the tests; here is what the script takes by itself.
        return [_launches("emulated")] * 2
    sanitizer = [tool("compute-sanitizer"), "--error-exitcode", "9", "--report-api-errors", "no"]
    sanitizer += ["--target-processes", "all"]
    return [[*sanitizer, "--tool", name, *_launches("cuda")] for name in ("memcheck", "racecheck")]


def _triton(machine: Machine) -> Sequence[Sequence[str]]:
    names = "(float32 or bfloat16) and not compile"
    if machine.dry:
        return [_pytest(machine, "--kernels", "cpu-scalar", "-k", names, "tests/ops")]
    # test_ptx.py compiles for GPUs that are not there.
    own = ["tests/backends/triton", "--ignore=tests/backends/triton/test_ptx.py"]
    return [
        _pytest(machine, "--kernels", "triton", "-k", "not compile", "tests/backends/test_gpu.py"),
        _pytest(machine, "--kernels", "triton", "-k", names, "tests/ops"),
        _pytest(machine, "-k", "not float16 and not float64", *own),
    ]


def _large(machine: Machine) -> Sequence[Sequence[str]]:
    chosen = ["-m", "slow", "-k", "two_to_the_31", "tests/ops"]
    return [_pytest(machine, "--collect-only", *chosen) if machine.dry else _pytest(machine, *chosen, workers=2)]


def _figures(step: str, name: str) -> Callable[[Machine], Sequence[Sequence[str]]]:
    def commands(machine: Machine) -> Sequence[Sequence[str]]:
        report = machine.out / f"{machine.gpu}{name}.json"
        return [[PYTHON, str(HERE / "figures.py"), step, str(report), *(["--dry"] if machine.dry else [])]]

    return commands


def _ncu(machine: Machine) -> Sequence[Sequence[str]]:
    profiled = [PYTHON, str(HERE / "profiled.py")]
    if machine.dry:
        return [[*profiled, "--dry"]]
    # The clocks are left as they are: others may share the machine.
    ncu = [tool("ncu"), "--clock-control", "none", "--profile-from-start", "off", "--set", "detailed"]
    return [[*ncu, "--log-file", str(machine.out / "ncu.txt"), *profiled]]


# Each tensor has an allocation of its own, so that its bounds are seen.
_BOUNDS = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
STEPS = (
    Step("smoke", 40, "the kernels of every op once, against the CPU's", _smoke),
    Step("cuda", 60, "the tests of the ops on the CUDA kernels", _cuda),
    Step(
        "sanitize", 60, "compute-sanitizer over the CUDA kernels of every op: memory, races", _sanitize, True, _BOUNDS
    ),
    Step("headline", 80, "40 figures: attention, group norm, the steps", _figures("headline", "-headline")),
    Step("triton", 120, "the tests of the ops on Triton's kernels, float32 and bfloat16", _triton),
    Step("large", 30, "more than 2^31 elements", _large),
    Step("bench", 210, "every other benchmark of the ops", _figures("bench", "")),
    Step("ncu", 50, "the hardware's counters of three kernels", _ncu),
)
# A tool that says so may not look at this GPU, which is no fault of what it was to look at.
_NOT_ALLOWED = ("Device not supported", "LibraryNotLoaded", "ERR_NVGPUCTRPERM", "No supported GPU devices")


class Check:
    """Runs steps until ``end``, writes what they find out, sums it up after each."""

    def __init__(self, machine: Machine, end: float):
        self.machine, self.end = machine, end
        self.file, self.log = machine.out / "verdicts.jsonl", machine.out / "log.txt"
        # Lines of earlier runs stay.
        self.before = len(verdicts.read(self.file))
        self.seconds: dict[str, float] = {}
        self.environment = {
            **os.environ,
            verdicts.FILE: str(self.file),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "2",
        }

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The verdicts of this run."""
        return verdicts.read(self.file)[self.before :]

    def run(self, step: Step) -> None:
        begin = time.monotonic()
        end = min(self.end, begin + step.seconds * self.machine.patience)
        running: list[Running] = []
        try:
            for command in step.commands(self.machine):
                running += self._begun(step, command, end)
                if not step.together:
                    self._ended(running, end)
            self._ended(running, end)
        except BaseException:
            # It would go on without us.
            for one in running:
                stop(one.process)
            raise
        if not self.machine.dry and self._has_found_nothing(step):
            self.add(step.name, step.name, "failed", 0.0, "nothing passed, and nothing failed")
        self.seconds[step.name] = time.monotonic() - begin
        self.sum_up()

    def _begun(self, step: Step, command: Sequence[str], end: float) -> list[Running]:
        name = " ".join(Path(word).name if os.sep in word else word for word in command)
        if end - time.monotonic() < _LEAST:
            self.add(step.name, name, "unfinished", 0.0, "there was no time left to begin")
            return []
        if shutil.which(command[0]) is None:
            self.add(step.name, name, "unfinished", 0.0, f"{command[0]} is not installed")
            return []
        environment = {**self.environment, **step.environment, verdicts.STEP: step.name}
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"\n===== {step.name}: {name}\n")
            log.flush()
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
            return [Running(step.name, name, process, time.monotonic(), log.tell())]

    def _ended(self, running: list[Running], end: float) -> None:
        """Waits for commands, and writes their verdicts."""
        while running:
            one = running[0]
            try:
                status: int | None = one.process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                status = None
                stop(one.process)
            running.pop(0)
            seconds = time.monotonic() - one.begin
            with open(self.log, "rb") as log:
                log.seek(one.logged)
                said = log.read().decode(errors="replace")
            if status is None:
                self.add(one.step, one.name, "unfinished", seconds, f"it was stopped after {seconds:.0f} s")
            elif status and (told := [words for words in _NOT_ALLOWED if words in said]):
                self.add(one.step, one.name, "skipped", seconds, f"it may not run here: {told[0]}")
            else:
                self.add(
                    one.step,
                    one.name,
                    "failed" if status else "passed",
                    seconds,
                    f"exit code {status}" if status else "",
                )

    def _has_found_nothing(self, step: Step) -> bool:
        """Whether all commands ended well without a verdict of theirs, as where every test is skipped."""
        lines = [line for line in self.lines if line["step"] == step.name]
        if step.name == "ncu" or any(line["verdict"] != "passed" for line in lines if line.get("command")):
            return False
        return not any(line["verdict"] in ("passed", "failed") for line in lines if not line.get("command"))

    def add(self, step: str, name: str, verdict: str, seconds: float, detail: str) -> None:
        verdicts.append(self.file, step, name, verdict, seconds, detail, command=True)

    def sum_up(self) -> None:
        """One screen: a line for each step, and the first of what failed."""
        lines = self.lines
        told = [f"gpu-check on {self.machine.gpu}"]
        for step, seconds in self.seconds.items():
            of_step = [line for line in lines if line["step"] == step]
            found = verdicts.counts(line for line in of_step if not line.get("command"))
            told.append(f"  {step:9} {overall(of_step):10} {seconds:6.1f} s   {found}")
        wrong = [line for line in lines if line["verdict"] in ("failed", "unfinished")]
        for line in wrong[:12]:
            detail = " ".join(line["detail"].split())[:90]
            told.append(f"    {line['step']}: {line['name'][:70]}: {line['verdict']} {detail}")
        if len(wrong) > 12:
            told.append(f"    and {len(wrong) - 12} more, see {self.file.name}")
        text = "\n".join(told) + "\n"
        (self.machine.out / "summary.txt").write_text(text, encoding="utf-8")
        print(text, flush=True)


class Running(NamedTuple):
    """A command that was begun, and where in the log what it says begins."""

    step: str
    name: str
    process: subprocess.Popen[bytes]
    begin: float
    logged: int


def overall(lines: Sequence[dict[str, object]]) -> str:
    """The worst of the verdicts."""
    found = {line["verdict"] for line in lines}
    return next((word for word in ("failed", "unfinished", "passed") if word in found), "skipped")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupts a command and all it began, waits for what it writes then, and ends it."""
    for number, grace in ((signal.SIGINT, _GRACE), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    process.wait()


def machine_of(out: Path, dry: bool) -> Machine:
    cores = os.cpu_count() or 1
    if dry:
        return Machine("dry-run", "90", cores, out, dry, max(1.0, _CORES / cores))
    program = "import torch; print('%d%d' % torch.cuda.get_device_capability(), torch.cuda.get_device_name())"
    done = subprocess.run([PYTHON, "-c", program], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it says nothing"]
        raise SystemExit(f"torch finds no GPU to use (--dry does without): {said[-1]}")
    architecture, _, name = done.stdout.strip().partition(" ")
    return Machine(re.sub(r"[^a-z0-9._]+", "-", name.lower()), architecture, max(2, min(12, cores - 4)), out)


def have_modules(check: Check, machine: Machine) -> bool:
    """Puts the prebuilt modules in their place, or builds them; says whether they are there."""
    begin = time.monotonic()
    reason = modules.put_in_place(machine.architecture)
    verdict, detail = "passed", "prebuilt" if reason is None else f"built here: {reason}"
    if reason is not None:
        print(f"building the modules here, as to the prebuilt ones: {reason}", flush=True)
        try:
            architecture = machine.architecture + ("a" if machine.architecture == "90" else "")
            modules.build(PYTHON, architecture, limit=max(_LEAST, check.end - begin))
        except (OSError, subprocess.SubprocessError) as error:
            verdict, detail = "failed", f"not built: {error}; prebuilt: {reason}"
    check.add("modules", "modules", verdict, time.monotonic() - begin, detail)
    check.seconds["modules"] = time.monotonic() - begin
    check.sum_up()
    return verdict == "passed"


def main(arguments: Sequence[str]) -> int:
    begin, names = time.monotonic(), [step.name for step in STEPS]
    parser = argparse.ArgumentParser(prog="gpu_check", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"{', '.join(names)}; all, if none is named")
    parser.add_argument("--cap", type=float, metavar="SECONDS", help="of all steps together [570; none without a GPU]")
    parser.add_argument("--dry", action="store_true", help="without a GPU: what of each step the CPU does")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.steps if name not in names]:
        parser.error(f"STEP must be one of {', '.join(names)}, got {unknown[0]}")
    # A shell that began us in the background has us ignore the one; who ends us by the other, ends our steps too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out = Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check")
    out.mkdir(parents=True, exist_ok=True)
    machine = machine_of(out.resolve(), given.dry)
    if given.dry:
        # The emulator is built before anything is timed.
        subprocess.run(_launches("emulated", "normal"), check=True)
    check = Check(machine, begin + (given.cap or (math.inf if given.dry else 570.0)))
    if given.dry or have_modules(check, machine):
        for step in STEPS:
            if not given.steps or step.name in given.steps:
                print(f"===== {step.name}: {step.what}", flush=True)
                check.run(step)
    found = {line["verdict"] for line in check.lines}
    return 1 if "failed" in found else 2 if "unfinished" in found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
