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
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import modules  # noqa: E402
import verdicts  # noqa: E402

ROOT = modules.ROOT
PYTHON = sys.executable
# What a step is given to write what it has, once it was interrupted.
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
    """``commands(machine)`` run one after another within ``seconds``, each of them a verdict of its own."""

    name: str
    seconds: float
    what: str
    commands: Callable[[Machine], Sequence[Sequence[str]]]


def _launches(*arguments: str) -> list[str]:
    return [PYTHON, str(HERE / "launches.py"), *arguments]


def _smoke(machine: Machine) -> Sequence[Sequence[str]]:
    if machine.dry:
        return [_launches("emulated")]
    return [_launches("cuda"), _launches("triton", "normal", "group_norm, channels_last", "attention, 64")]


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
    return [_pytest(machine, "--kernels", "triton", "-k", names, "tests/ops", "tests/backends/test_gpu.py")]


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


STEPS = (
    Step("smoke", 20, "every kernel once against the CPU's", _smoke),
    Step("cuda", 60, "the tests of the ops on the CUDA kernels", _cuda),
    Step("sanitize", 50, "compute-sanitizer over every kernel: memory, races", _sanitize),
    Step("headline", 80, "38 figures: attention, group norm, the steps", _figures("headline", "-headline")),
    Step("triton", 120, "the tests of the ops on Triton's kernels, float32 and bfloat16", _triton),
    Step("large", 30, "more than 2^31 elements", _large),
    Step("bench", 180, "every benchmark of the ops", _figures("bench", "")),
    Step("ncu", 60, "the hardware's counters of three kernels", _ncu),
)


class Check:
    """Runs steps, writes what they find out, sums it up after each."""

    def __init__(self, machine: Machine, cap: float):
        self.machine, self.end = machine, time.monotonic() + cap
        self.file, self.log = machine.out / "verdicts.jsonl", machine.out / "log.txt"
        self.seconds: dict[str, float] = {}
        self.environment = {
            **os.environ,
            verdicts.FILE: str(self.file),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "2",
        }

    def run(self, step: Step) -> None:
        begin = time.monotonic()
        end = min(self.end, begin + step.seconds * self.machine.patience)
        for command in step.commands(self.machine):
            name = " ".join(Path(word).name if os.sep in word else word for word in command)
            if end - time.monotonic() < _LEAST:
                self.add(step.name, name, "unfinished", 0.0, "there was no time left to begin")
                continue
            if shutil.which(command[0]) is None:
                self.add(step.name, name, "skipped", 0.0, f"{command[0]} is not installed")
                continue
            self._run(step.name, name, command, end - time.monotonic())
        self.seconds[step.name] = time.monotonic() - begin
        self.sum_up()

    def _run(self, step: str, name: str, command: Sequence[str], limit: float) -> None:
        begin = time.monotonic()
        environment = {**self.environment, verdicts.STEP: step}
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"\n===== {step}: {name}\n")
            log.flush()
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
            try:
                status: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
                stop(process)
        seconds = time.monotonic() - begin
        if status is None:
            self.add(step, name, "unfinished", seconds, f"it was stopped after {limit:.0f} s")
        else:
            self.add(step, name, "failed" if status else "passed", seconds, f"exit code {status}" if status else "")

    def add(self, step: str, name: str, verdict: str, seconds: float, detail: str) -> None:
        verdicts.append(self.file, step, name, verdict, seconds, detail, command=True)

    def sum_up(self) -> None:
        """One screen: a line for each step, and what failed, the first of it."""
        lines = verdicts.read(self.file)
        told = [f"gpu-check on {self.machine.gpu}"]
        for step, seconds in self.seconds.items():
            of_step = [line for line in lines if line["step"] == step]
            commands = [line for line in of_step if line.get("command")]
            found = verdicts.counts(line for line in of_step if line not in commands)
            told.append(f"  {step:9} {overall(commands):10} {seconds:6.1f} s   {found}")
        wrong = [line for line in lines if line["verdict"] in ("failed", "unfinished")]
        for line in wrong[:12]:
            detail = " ".join(line["detail"].split())[:90]
            told.append(f"    {line['step']}: {line['name'][:70]}: {line['verdict']} {detail}")
        if len(wrong) > 12:
            told.append(f"    and {len(wrong) - 12} more, see {self.file.name}")
        text = "\n".join(told) + "\n"
        (self.machine.out / "summary.txt").write_text(text, encoding="utf-8")
        print(text, flush=True)


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
        return Machine("dry-run", "90a", cores, out, dry, max(1.0, _CORES / cores))
    program = "import torch; print('%d%d' % torch.cuda.get_device_capability(), torch.cuda.get_device_name())"
    done = subprocess.run([PYTHON, "-c", program], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"torch finds no GPU to use (--dry does without): {done.stderr.strip().splitlines()[-1]}")
    architecture, _, name = done.stdout.strip().partition(" ")
    return Machine(name.lower().replace(" ", "-"), architecture, max(2, min(12, cores - 4)), out)


def have_modules(check: Check, machine: Machine) -> None:
    """Puts the prebuilt modules in their place, or builds them."""
    begin = time.monotonic()
    reason = modules.put_in_place()
    detail = "prebuilt" if reason is None else f"built here: {reason}"
    if reason is not None:
        print(f"building the modules here, as to the prebuilt ones: {reason}", flush=True)
        architecture = machine.architecture + ("a" if machine.architecture == "90" else "")
        modules.build(PYTHON, architecture)
    check.add("modules", "modules", "passed", time.monotonic() - begin, detail)
    check.seconds["modules"] = time.monotonic() - begin
    print(f"modules: {detail}, {time.monotonic() - begin:.0f} s", flush=True)


def main(arguments: Sequence[str]) -> int:
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.partition("\n")[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"{', '.join(names)}; all, if none is named")
    parser.add_argument("--cap", type=float, metavar="SECONDS", help="of all steps together [580; none without a GPU]")
    parser.add_argument("--dry", action="store_true", help="without a GPU: what of each step the CPU does")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.steps if name not in names]:
        parser.error(f"STEP must be one of {', '.join(names)}, got {unknown[0]}")
    out = Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check")
    out.mkdir(parents=True, exist_ok=True)
    for name in ("verdicts.jsonl", "log.txt", "summary.txt"):
        (out / name).unlink(missing_ok=True)
    machine = machine_of(out.resolve(), given.dry)
    if given.dry:
        # The emulator is built before anything is timed.
        subprocess.run(_launches("emulated", "normal"), check=True)
    check = Check(machine, given.cap or (math.inf if given.dry else 580.0))
    if not given.dry:
        have_modules(check, machine)
    for step in STEPS:
        if not given.steps or step.name in given.steps:
            print(f"===== {step.name}: {step.what}", flush=True)
            check.run(step)
    found = {line["verdict"] for line in verdicts.read(check.file)}
    return 1 if "failed" in found else 2 if "unfinished" in found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
