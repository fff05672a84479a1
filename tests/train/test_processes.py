"""Trainings, samples and measures in several processes, started by torchrun: those of one process, to rounding."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gencore.train.checkpoint import Checkpoint, read
from gencore.train.log import read_metrics

# Of rounding: sums of the processes are added in another order, and Adam divides small numbers by each other.
TOLERANCE = {"rtol": 1e-3, "atol": 2e-5}
SMALL_DDPM = ("--set", "channels=8,16", "--set", "num_groups=4", "--set", "conditional=true", "--set", "dropout=0.2")
SMALL_GAN = (
    "--set", "generator_sizes=16", "--set", "discriminator_sizes=16", "--set", "dropout=0.3",
    "--set", "augmentation.images=500", "--set", "augmentation.every=2",
)  # fmt: skip


def by_torchrun(count: int, *arguments: str | Path) -> list[str]:
    """The command line of ``gencore`` in so many processes."""
    # On a port that is free: one for all would be taken by another test.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return [sys.executable, *launcher, "-m", "gencore", *map(str, arguments)]


def serve() -> None:
    """Runs the commands that it is told, each in as many forked processes as it is to have, and says how they ended.

    So what takes longest, to import everything, is done once.
    """
    import torch._dynamo  # noqa: F401 (torch's optimisers import it when first used)

    from gencore import data, train  # noqa: F401
    from gencore.cli import app, main  # noqa: F401

    for line in sys.stdin:
        count, arguments, output = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(count):
            child = os.fork()
            if child == 0:
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
                descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                code = main(arguments)
                sys.stdout.flush()
                os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


@pytest.fixture(scope="module")
def server(environment):
    """The process of :func:`serve`."""
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def gencore(server, tmp_path):
    """Runs ``gencore`` in so many processes to their ends, and gives what they said."""

    def run(count: int, *arguments: str | Path, code: int = 0) -> str:
        output = tmp_path / "said.txt"
        output.unlink(missing_ok=True)
        server.stdin.write(json.dumps([count, list(map(str, arguments)), str(output)]) + "\n")
        server.stdin.flush()
        assert select.select([server.stdout], [], [], 200)[0], "it hangs"
        codes = json.loads(server.stdout.readline())
        said = output.read_text() if output.exists() else ""
        assert codes == [code] * count, said
        return said

    return run


def differing(one: Path, other: Path, name: str = "model") -> list[str]:
    """The weights that are not those of the other run."""
    first, second = (read(path).tensors(name) for path in (one, other))
    assert first.keys() == second.keys()
    return [key for key in first if not torch.allclose(first[key].double(), second[key].double(), **TOLERANCE)]


def losses(run: Path) -> list[dict[str, Any]]:
    """The figures of a run's log, without its times."""
    timed = ("seconds", "images_per_second", "waiting_for_data")
    return [{k: v for k, v in record.items() if k not in timed} for record in read_metrics(run / "metrics.jsonl")]


def check_same(one: Path, other: Path) -> None:
    """Weights, average, optimiser and log of two runs are the same, to rounding."""
    saved: Sequence[Checkpoint] = [read(one), read(other)]
    assert saved[0].step == saved[1].step
    for name in ("model", "ema", "optimizer"):
        assert not differing(one, other, name)
    for ours, theirs in zip(losses(one), losses(other), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder that the tests of this file share."""
    return tmp_path_factory.mktemp("runs")


GAN = ("train", "gan", *SMALL_GAN, "--steps", "8", "--batch-size", "50", "--ema", "0.9", "--set", "train.log_every=3")
DDPM = ("train", "ddpm", *SMALL_DDPM, "--steps", "4", "--batch-size", "16", "--ema", "0.9", "--set", "train.clip=1")


@pytest.mark.parametrize(("arguments", "count"), [(GAN, 2), (DDPM, 3)], ids=["gan-2", "ddpm-3"])
def test_processes_end_with_the_weights_of_one(gencore, runs, arguments, count):
    alone = runs / arguments[1]
    if not alone.exists():
        gencore(1, *arguments, "--out", alone)
    said = gencore(count, *arguments, "--out", runs / f"{arguments[1]}-{count}")
    assert f"in {count} processes" in said
    assert said.count("training ") == 1
    assert "arning" not in said
    check_same(alone, runs / f"{arguments[1]}-{count}")


def test_parts_of_a_minibatch_and_of_its_processes_are_the_same_too(gencore, runs):
    alone = runs / "gan"
    if not alone.exists():
        gencore(1, *GAN, "--out", alone)
    gencore(2, *GAN, "--out", runs / "parts", "--set", "train.accumulate=3")
    check_same(alone, runs / "parts")


def test_batch_statistics_are_those_of_the_whole_minibatch(gencore, runs):
    arguments = ("train", "toy", "--data", "bars", "--steps", "6", "--batch-size", "16", "--ema", "0.9")
    quiet = ("--set", "dropout=0")
    gencore(1, *arguments, *quiet, "--out", runs / "toy")
    gencore(2, *arguments, *quiet, "--out", runs / "toy-2")
    # A bias before a batch norm has the gradient 0, but for rounding, which Adam makes steps of full size of. The mean
    # of what it is added to moves with it; the variance does not.
    assert set(differing(runs / "toy", runs / "toy-2")) <= {"encoder.0.bias", "encoder.1.running_mean"}


@pytest.mark.parametrize("sharing", [(), ("--set", "train.sharding=full")], ids=["whole", "divided"])
def test_phases_that_share_an_optimiser_end_with_the_weights_of_one_process(gencore, runs, sharing):
    arguments = ("train", "toy-phases", "--data", "bars", "--steps", "6", "--batch-size", "16", "--ema", "0.5")
    # The last test image is that of one process alone.
    told = ("--set", "train.validate_every=2", "--set", "train.sample_every=3", "--set", "train.samples=4")
    if not (runs / "phases").exists():
        gencore(1, *arguments, "--out", runs / "phases")
    out = runs / ("phases-whole" if not sharing else "phases-divided")
    gencore(2, *arguments, *told, *sharing, "--set", "train.accumulate=2", "--out", out)
    for name in ("model", "ema", "optimizer"):
        assert not differing(runs / "phases", out, name)


def test_divided_weights_are_those_of_one_process(gencore, runs):
    arguments = (
        "train",
        "vae",
        "--set",
        "hidden_sizes=16",
        "--steps",
        "5",
        "--ema",
        "0.9",
        "--set",
        "likelihood=gaussian",
    )
    told = ("--set", "train.validate_every=2", "--set", "train.sample_every=4", "--set", "train.samples=9")
    gencore(1, *arguments, *told, "--out", runs / "vae")
    gencore(2, *arguments, *told, "--set", "train.sharding=full", "--out", runs / "vae-2")
    check_same(runs / "vae", runs / "vae-2")
    pictures = [sorted((runs / name / "samples").iterdir()) for name in ("vae", "vae-2")]
    assert [[path.name for path in each] for each in pictures] == [["step-00000004.png", "step-00000005.png"]] * 2
    # And go on in one process, undivided.
    for name in ("vae", "vae-2"):
        gencore(1, "train", "--out", runs / name, "--resume", "--steps", "8", "--set", "train.sharding=none")
    check_same(runs / "vae", runs / "vae-2")


def test_a_gradient_penalty_with_divided_weights_is_refused(gencore, tmp_path):
    said = gencore(2, *GAN, "--out", tmp_path, "--set", "train.sharding=full", code=2)
    assert "train.sharding=full cannot train phase 'discriminator'" in said
    assert not list(tmp_path.rglob("step-*"))


def started(tmp_path: Path, environment: dict[str, str], count: int, *arguments: str | Path) -> subprocess.Popen[str]:
    """A training in the background, whose output goes to a file."""
    with open(tmp_path / "said.txt", "w") as said:
        return subprocess.Popen(
            by_torchrun(count, *arguments),
            stdout=said,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )


def wait_for(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun has started, those of the lowest number first."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                is_ours = parent == process.pid and b"gencore" in (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if is_ours:
                environment = (folder / "environ").read_bytes().split(b"\0")
                rank = next(int(each[5:]) for each in environment if each.startswith(b"RANK="))
                found.append((rank, int(folder.name)))
    return [pid for _, pid in sorted(found)]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_all_and_the_run_goes_on_in_another_number(
    gencore, toy_environment, tmp_path, runs, victim
):
    out = tmp_path / "run"
    frequent = ("--set", "train.checkpoint_every=5")
    endless = ["100000" if each == "8" else each for each in GAN]
    process = started(tmp_path, toy_environment, 2, *endless, *frequent, "--out", out)
    try:
        wait_for(lambda: len(list((out / "checkpoints").glob("step-*"))) > 0)
        os.kill(workers_of(process)[victim], signal.SIGKILL)
        wait_for(lambda: process.poll() is not None, 60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert "another of the processes has ended" in (tmp_path / "said.txt").read_text()
    steps = read(out).step + 5
    gencore(3, "train", "--out", out, "--resume", "--steps", steps)
    shorter = [str(steps) if each == "8" else each for each in GAN]
    gencore(1, *shorter, *frequent, "--out", tmp_path / "alone")
    assert read(out).step == steps
    assert not differing(out, tmp_path / "alone")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_a_signal_to_one_process_saves_the_step_of_all(toy_environment, tmp_path):
    out = tmp_path / "run"
    endless = [*GAN, "--out", out]
    endless[endless.index("8")] = "100000"
    process = started(tmp_path, toy_environment, 2, *endless)
    try:
        wait_for(lambda: len(read_metrics(out / "metrics.jsonl")) > 0)
        os.kill(workers_of(process)[1], signal.SIGTERM)
        wait_for(lambda: process.poll() is not None, 60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    said = (tmp_path / "said.txt").read_text()
    assert said.count("go on with: gencore train --out") == 1
    assert read(out).step > 0


def test_samples_and_measures_are_those_of_one_process(gencore, runs):
    run = runs / "gan"
    if not run.exists():
        gencore(1, *GAN, "--out", run)
    for count in (1, 3):
        for form in ("npz", "png"):
            options = ("--format", form, "--out", runs / f"samples-{count}{'.npz' if form == 'npz' else ''}")
            gencore(count, "sample", run, "-n", "11", "--batch-size", "2", *options)
        said = gencore(count, "evaluate", run, "-n", "30", "--out", runs / f"measures-{count}.json")
        assert said.count("effective classes") == 1
    first, second = (np.load(runs / f"samples-{count}.npz")["arr_0"].astype(int) for count in (1, 3))
    assert first.shape == second.shape == (11, 8, 8, 1)
    # A value between two levels may be rounded to either.
    assert np.abs(first - second).max() <= 1
    assert [path.name for path in sorted((runs / "samples-3").iterdir())] == [f"{i:06d}.png" for i in range(11)]
    one, other = (json.loads((runs / f"measures-{count}.json").read_text()) for count in (1, 3))
    assert one["classes"]["counts"] == other["classes"]["counts"]
    assert one["frechet"]["distance"] == pytest.approx(other["frechet"]["distance"], rel=1e-3)


def test_accelerate_launches_processes_too(toy_environment, tmp_path):
    pytest.importorskip("accelerate")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # It asks for GPUs, and starts processes whether there are any or not; those of a CPU need MPI with it.
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", str(port)]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    arguments = ["train", "gan", *SMALL_GAN, "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "gencore", *arguments]
    done = subprocess.run(command, env=toy_environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "for 2 steps on cpu, in 2 processes" in done.stdout


def test_what_is_wrong_in_all_processes_is_said_once(gencore, tmp_path):
    said = gencore(2, "train", "gan", "--out", tmp_path, "--set", "latent_sise=3", code=2)
    assert said.count("did you mean latent_size?") == 1
    assert "Traceback" not in said


def test_too_small_a_minibatch_is_refused(gencore, tmp_path):
    said = gencore(2, "train", "gan", "--out", tmp_path, "--batch-size", "3", "--set", "train.accumulate=2", code=2)
    assert "train.batch_size must be at least one image for 2 processes and 2 parts each, was 3" in said


def test_commands_that_are_not_shared_are_the_first_process_s(gencore, runs):
    run = runs / "vae-alone"
    gencore(1, "train", "vae", "--set", "hidden_sizes=8", "--steps", "2", "--out", run)
    assert gencore(2, "list").count("variational autoencoder, MLP") == 1
    assert gencore(2, "reconstruct", run).count("reconstructions") == 2


if __name__ == "__main__":
    serve()
