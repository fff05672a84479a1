"""A run that is really killed, many times, ends with the bits of one that was not.

The driver below (this file, run as a program) imports everything once and forks a process for each attempt. Every
other attempt is killed by its parent after a random while; the rest kill themselves at a random operation on files,
most of which belong to the writing of a checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train.comparing import without_time

STEPS = 30
# How often a run is killed: of a model in memory; of phases and optimisers of every kind, whose data processes of their
# own read, and which keeps its best checkpoint too.
KILLS = {"toy": 24, "toy-phases": 12}
SETTINGS = {
    "toy": {"clip": 1.0},
    "toy-phases": {"workers": 1, "validate_every": 2, "keep_best": True, "schedule": "cosine"},
}
DATA = {"toy": "bars", "toy-phases": "lazy-bars"}


def attempt(out: Path, model: str) -> None:
    from gencore.train import train

    settings = {"batch_size": 16, "log_every": 2, "checkpoint_every": 3, "average": {"decay": 0.9}, **SETTINGS[model]}
    train(model, data=DATA[model], out=out, steps=STEPS, settings={"train": settings}, resume=True, progress=False)


def die_at_file_operation(count: int) -> None:
    """Kills this process just before or after its ``count``-th sync, rename, replacement or removal."""
    left, process = count, os.getpid()

    def mortal(function):
        def call(*args, **kwargs):
            nonlocal left
            # The death of a process that reads images is another matter: the training itself tells of it.
            left -= os.getpid() == process
            if left == 0:
                os.kill(process, signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "replace", "rmdir", "unlink", "mkdir", "symlink"):
        setattr(os, name, mortal(getattr(os, name)))


def drive(out: Path, model: str, kills: int, seed: int, longest: float) -> None:
    """Attempts until one ends by itself; after ``kills`` killed ones it is let be. Prints what happened as JSON.

    Every other one is killed after `longest` seconds at the latest, the others at an operation on a file.
    """
    # Imported before forking, so that an attempt begins at once.
    import torch._dynamo  # noqa: F401 (torch's optimisers import it when first used)

    from gencore import train  # noqa: F401
    from gencore.plugins import MODELS

    MODELS.load(model)
    chance = random.Random(seed)
    report = {"killed": 0, "steps": []}
    started = time.monotonic()
    while True:
        end = chance.random()
        child = os.fork()
        if child == 0:
            if report["killed"] % 2 and report["killed"] < kills:
                die_at_file_operation(chance.randrange(1, 40))
            attempt(out, model)
            os._exit(0)
        if report["killed"] % 2 == 0 and report["killed"] < kills:
            time.sleep(end * longest)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert status == 0
            break
        report["killed"] += 1
        chance.random()
        report["steps"].append(sorted(path.name for path in out.glob("checkpoints/step-*")))
    report["seconds"] = time.monotonic() - started
    print(json.dumps(report))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("model", list(KILLS))
def test_a_killed_run_ends_with_the_same_bits(environment, tmp_path, model):
    reports, longest = {}, 0.0
    for name, kills in (("whole", 0), ("killed", KILLS[model])):
        done = subprocess.run(
            [sys.executable, __file__, str(tmp_path / name), model, str(kills), "1", str(longest)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        reports[name] = json.loads(done.stdout)
        # However fast the machine is, most of the kills come before the end.
        longest = reports["whole"]["seconds"] / 3
    assert reports["killed"]["killed"] >= 5, reports
    # It was killed in the midst, not only before its first checkpoint.
    assert len({tuple(steps) for steps in reports["killed"]["steps"]}) >= 3, reports
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    folders = [path.name for path in sorted((whole / "checkpoints").iterdir())]
    found = [path.name for path in sorted((killed / "checkpoints").iterdir())]
    # A kill between the last checkpoint and the removal of the oldest one leaves that: the run is long enough then.
    assert found[-2:] == folders[-2:]
    assert set(folders) <= set(found)
    assert len(found) <= len(folders) + 1
    if model == "toy":
        assert folders == ["step-00000027", "step-00000030"]
    else:
        assert folders[0] == "best"
        assert os.readlink(whole / "checkpoints" / "best") == os.readlink(killed / "checkpoints" / "best")
    for folder in folders:
        for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
            path = Path("checkpoints", folder, file)
            assert (whole / path).read_bytes() == (killed / path).read_bytes(), path

    assert not [path for path in killed.rglob(".*") if path.name != ".lock"]

    def metrics(run: Path) -> list[dict[str, float]]:
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return without_time(records)

    assert metrics(whole) == metrics(killed)


if __name__ == "__main__":
    drive(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
