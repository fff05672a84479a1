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

STEPS, KILLS = 30, 24


def attempt(out: Path) -> None:
    from gencore import data, plugins
    from gencore.train import TrainConfig, Trainer

    bars = data.load("bars", split="train")
    plugin = plugins.load_model("toy")
    model = plugin.config.from_dict({"image_shape": bars.image_shape, "num_classes": bars.num_classes})
    settings = {"steps": STEPS, "batch_size": 16, "log_every": 2, "checkpoint_every": 3, "ema": 0.9, "clip": 1.0}
    config = TrainConfig.from_dict(settings)
    trainer = Trainer(plugin, model, bars, config, out, data_name="bars", progress=False)
    trainer.fit(resume=True)


def die_at_file_operation(count: int) -> None:
    """Kills this process just before or after its ``count``-th sync, rename, replacement or removal."""
    left = count

    def mortal(function):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "replace", "rmdir", "unlink", "mkdir"):
        setattr(os, name, mortal(getattr(os, name)))


def drive(out: Path, kills: int, seed: int, longest: float) -> None:
    """Attempts until one ends by itself; after ``kills`` killed ones it is let be. Prints what happened as JSON.

    Every other one is killed after `longest` seconds at the latest, the others at an operation on a file.
    """
    # Imported before forking, so that an attempt begins at once.
    import torch._dynamo  # noqa: F401 (torch's optimisers import it when first used)

    from gencore import plugins, train  # noqa: F401

    plugins.load_model("toy")
    chance = random.Random(seed)
    report = {"killed": 0, "steps": []}
    started = time.monotonic()
    while True:
        end = chance.random()
        child = os.fork()
        if child == 0:
            if report["killed"] % 2 and report["killed"] < kills:
                die_at_file_operation(chance.randrange(1, 40))
            attempt(out)
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
def test_a_killed_run_ends_with_the_same_bits(toy_environment, tmp_path):
    reports, longest = {}, 0.0
    for name, kills in (("whole", 0), ("killed", KILLS)):
        done = subprocess.run(
            [sys.executable, __file__, str(tmp_path / name), str(kills), "1", str(longest)],
            env=toy_environment,
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
    assert folders == [path.name for path in sorted((killed / "checkpoints").iterdir())]
    assert folders == ["step-00000027", "step-00000030"]
    for folder in folders:
        for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
            path = Path("checkpoints", folder, file)
            assert (whole / path).read_bytes() == (killed / path).read_bytes(), path

    assert not [path for path in killed.rglob(".*") if path.name != ".lock"]

    def metrics(run: Path) -> list[dict[str, float]]:
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in record.items() if k != "seconds"} for record in records]

    assert metrics(whole) == metrics(killed)


if __name__ == "__main__":
    drive(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
